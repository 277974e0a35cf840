"""CURVE keys: who has the right one talks, everybody else meets silence."""

import stat
from pathlib import Path

import pytest
import zmq

from ipc.channel import DealerChannel, RouterChannel, wait
from ipc.curve import (
    CurveClientKeys,
    CurveServerKeys,
    load_client_keys,
    load_server_keys,
    make_key_directory,
)
from ipc.errors import ConfigError
from ipc.messages import Heartbeat, core_to_frontend_decoder, frontend_to_core_decoder

REFUSAL_S = 0.5  # a handshake takes about 20 ms here


def make_keys(tmp_path: Path) -> tuple[CurveServerKeys, CurveClientKeys]:
    make_key_directory(tmp_path / "keys")
    return load_server_keys(tmp_path / "keys"), load_client_keys(tmp_path / "keys")


def hears(
    server_keys: CurveServerKeys, client_keys: CurveClientKeys | None, limit_s: float
) -> bool:
    """Whether a message of a client with these keys reaches a server with those."""
    router = RouterChannel(frontend_to_core_decoder, curve_keys=server_keys)
    dealer = DealerChannel(core_to_frontend_decoder, curve_keys=client_keys)
    try:
        dealer.connect(router.bind("tcp://127.0.0.1:0"))
        is_sent = False
        for _ in range(round(limit_s / 0.02)):
            is_sent = is_sent or dealer.try_send(Heartbeat(1.0))
            wait([router], 0.02)
            if router.receive() is not None:
                return True
        return False
    finally:
        dealer.close()
        router.close()


def test_a_client_with_an_authorised_key_is_heard(tmp_path: Path) -> None:
    server_keys, client_keys = make_keys(tmp_path)

    assert hears(server_keys, client_keys, limit_s=10.0)


def test_a_client_without_keys_is_not_heard(tmp_path: Path) -> None:
    server_keys, _ = make_keys(tmp_path)

    assert not hears(server_keys, None, REFUSAL_S)


def test_a_key_that_is_not_on_the_list_is_not_heard(tmp_path: Path) -> None:
    server_keys, client_keys = make_keys(tmp_path)
    public, secret = zmq.curve_keypair()
    stranger = CurveClientKeys(
        server_public=client_keys.server_public, public=public, secret=secret
    )

    assert not hears(server_keys, stranger, REFUSAL_S)


def test_a_client_that_expects_another_server_is_not_heard(tmp_path: Path) -> None:
    server_keys, client_keys = make_keys(tmp_path)
    other, _ = zmq.curve_keypair()
    deceived = CurveClientKeys(
        server_public=other, public=client_keys.public, secret=client_keys.secret
    )

    assert not hears(server_keys, deceived, REFUSAL_S)


def test_secrets_are_their_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    paths = make_key_directory(tmp_path / "keys")

    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    with pytest.raises(ConfigError, match="never overwritten"):
        make_key_directory(tmp_path / "keys")


def test_more_clients_are_let_in_by_a_line_each(tmp_path: Path) -> None:
    server_keys, client_keys = make_keys(tmp_path)
    public, _ = zmq.curve_keypair()
    with (tmp_path / "keys" / "authorized_clients").open("ab") as file:
        file.write(b"# the second machine\n\n" + public + b"\n")

    assert server_keys.authorized == {client_keys.public}
    assert load_server_keys(tmp_path / "keys").authorized == {client_keys.public, public}


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_key_directory(tmp_path)
    (tmp_path / "client.secret").chmod(0o644)

    with pytest.raises(ConfigError, match=r"client\.secret can be read by others"):
        load_client_keys(tmp_path)


@pytest.mark.parametrize("text", ["", "short", "é" * 40, "x" * 41, '"' * 40])
def test_a_file_without_a_key_is_named(tmp_path: Path, text: str) -> None:
    make_key_directory(tmp_path)
    (tmp_path / "server.public").write_text(text)

    with pytest.raises(ConfigError, match=r"server\.public holds no key"):
        load_client_keys(tmp_path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        load_server_keys(tmp_path / "missing")
