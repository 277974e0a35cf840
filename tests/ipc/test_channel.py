"""Channels over real sockets: delivery, bounds, and peers that send nonsense."""

import os
import random
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from ipc import channel as channel_module
from ipc.channel import MAX_MALFORMED, DealerChannel, RouterChannel, wait
from ipc.errors import ConfigError, EngineDeadError
from ipc.messages import (
    AbortRequests,
    FrontendToCore,
    Heartbeat,
    core_to_frontend_decoder,
    encoder,
    frontend_to_core_decoder,
)
from ipc.processes import SignalWatch
from tests.ipc.samples import make_messages

LIMIT_S = 10.0


@contextmanager
def make_pair(
    address: str = "ipc://*", identity: bytes | None = None, **router_options: Any
) -> Iterator[tuple[RouterChannel[FrontendToCore], DealerChannel[Any]]]:
    router = RouterChannel(frontend_to_core_decoder, **router_options)
    dealer = DealerChannel(core_to_frontend_decoder, identity=identity)
    try:
        dealer.connect(router.bind(address))
        yield router, dealer
    finally:
        dealer.close()
        router.close()


@contextmanager
def make_attacker(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A bare socket, which may send anything."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.sndtimeo = 10_000
        socket.connect(address)
        yield socket


def receive_one(router: RouterChannel[Any]) -> tuple[bytes, Any, list[memoryview]]:
    deadline = time.monotonic() + LIMIT_S
    while (received := router.receive()) is None:
        assert wait([router], deadline - time.monotonic()), "nothing arrived"
    return received


@pytest.mark.parametrize("address", ["ipc://*", "tcp://127.0.0.1:0", "tcp://[::1]:0"])
def test_messages_and_frames_travel_both_ways(address: str) -> None:
    with make_pair(address) as (router, dealer):
        dealer.send(Heartbeat(1.0), [b"small", memoryview(bytes(200_000))])
        peer, message, frames = receive_one(router)
        assert message == Heartbeat(1.0)
        assert [frame.nbytes for frame in frames] == [5, 200_000]
        assert bytes(frames[0]) == b"small"

        assert router.send(peer, Heartbeat(2.0), [b"back"])
        answer = dealer.receive(LIMIT_S)
        assert answer is not None
        assert answer[0] == Heartbeat(2.0)
        assert bytes(answer[1][0]) == b"back"
        assert dealer.receive(0) is None


def test_a_chosen_identity_names_the_peer() -> None:
    with make_pair(identity=b"rank-3") as (router, dealer):
        dealer.send(Heartbeat(1.0))

        assert receive_one(router)[0] == b"rank-3"


def test_messages_of_one_peer_keep_their_order() -> None:
    with make_pair() as (router, dealer):
        for number in range(500):
            dealer.send(Heartbeat(float(number)))

        assert [receive_one(router)[1].sent_at_s for _ in range(500)] == list(range(500))


def test_a_private_address_lives_in_a_directory_of_its_owner_and_is_removed() -> None:
    router: RouterChannel[Any] = RouterChannel(frontend_to_core_decoder)
    path = Path(router.bind().removeprefix("ipc://"))

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    router.close()
    assert not path.parent.exists()
    router.close()  # harmless


def test_a_given_path_gets_a_socket_of_its_owner_alone(tmp_path: Path) -> None:
    with make_pair(f"ipc://{tmp_path}/core"):
        assert stat.S_IMODE((tmp_path / "core").stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_a_second_listener_is_told_that_the_address_is_taken(tmp_path: Path) -> None:
    router: RouterChannel[Any] = RouterChannel(frontend_to_core_decoder)
    for address in (f"ipc://{tmp_path}/core", "tcp://127.0.0.1:0"):
        with make_pair(address) as (first, _), pytest.raises(ConfigError, match="listen"):
            router.bind(first_address(first))
    router.close()


def first_address(router: RouterChannel[Any]) -> str:
    (socket,) = router.sockets()
    return str(socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())


def test_the_network_is_refused_without_keys_at_both_ends() -> None:
    router: RouterChannel[Any] = RouterChannel(frontend_to_core_decoder)
    dealer: DealerChannel[Any] = DealerChannel(core_to_frontend_decoder)
    with pytest.raises(ConfigError, match="--curve-keys"):
        router.bind("tcp://0.0.0.0:0")
    with pytest.raises(ConfigError, match="--curve-keys"):
        dealer.connect("tcp://192.0.2.1:5555")
    router.close()
    dealer.close()


def test_sending_to_an_unknown_or_departed_peer_says_so() -> None:
    with make_pair() as (router, dealer):
        assert not router.send(b"nobody", Heartbeat(1.0))
        assert not router.probe(b"nobody", Heartbeat(1.0))
        dealer.send(Heartbeat(1.0))
        peer = receive_one(router)[0]
        assert router.probe(peer, Heartbeat(1.0))

        dealer.close()
        deadline = time.monotonic() + LIMIT_S
        while router.probe(peer, Heartbeat(1.0)):
            assert time.monotonic() < deadline
            wait([router], 0.01)
        assert not router.send(peer, Heartbeat(1.0))


def test_a_peer_that_reads_nothing_fills_its_own_queue_only() -> None:
    with make_pair(high_water_mark=10) as (router, lazy):
        other: DealerChannel[Any] = DealerChannel(core_to_frontend_decoder)
        other.connect(first_address(router))
        lazy.send(Heartbeat(1.0))
        lazy_peer = receive_one(router)[0]
        other.send(Heartbeat(1.0))
        other_peer = receive_one(router)[0]

        padding = [bytes(100_000)]
        num_sent = sum(router.send(lazy_peer, Heartbeat(1.0), padding) for _ in range(3000))
        assert 10 <= num_sent < 3000
        assert router.probe(lazy_peer, Heartbeat(1.0))  # full, and still there
        assert router.send(other_peer, Heartbeat(2.0))
        assert other.receive(LIMIT_S) is not None
        other.close()


def test_sending_gives_up_in_time_when_there_is_no_room(tmp_path: Path) -> None:
    dealer: DealerChannel[Any] = DealerChannel(core_to_frontend_decoder, high_water_mark=2)
    dealer.connect(f"ipc://{tmp_path}/nobody")
    while dealer.try_send(Heartbeat(1.0)):
        pass

    with pytest.raises(EngineDeadError, match=r"took no message for 0\.05 s"):
        dealer.send(Heartbeat(1.0), timeout_s=0.05)
    dealer.close()


def test_what_is_sent_early_arrives_when_somebody_listens(tmp_path: Path) -> None:
    dealer: DealerChannel[Any] = DealerChannel(core_to_frontend_decoder)
    dealer.connect(f"ipc://{tmp_path}/socket")
    dealer.send(Heartbeat(1.0))
    router: RouterChannel[Any] = RouterChannel(frontend_to_core_decoder)
    router.bind(f"ipc://{tmp_path}/socket")

    assert receive_one(router)[1] == Heartbeat(1.0)
    dealer.close()
    router.close()


def test_the_last_words_of_a_peer_that_left_are_heard() -> None:
    with make_pair() as (router, dealer):
        dealer.send(Heartbeat(1.0))
        peer = receive_one(router)[0]
        for number in range(100):
            assert router.send(peer, Heartbeat(float(number)))
        router.close(linger_s=LIMIT_S)
        assert wait([dealer], LIMIT_S)
        assert not wait([], 0.2)  # by now the connection is known to be gone

        heard = [dealer.receive(LIMIT_S) for _ in range(100)]
        assert [None if item is None else item[0].sent_at_s for item in heard] == list(range(100))


def test_receiving_gives_up_in_time() -> None:
    with make_pair() as (_, dealer):
        started = time.monotonic()

        assert dealer.receive(0.05) is None
        assert 0.05 <= time.monotonic() - started < 5.0


def test_waiting_names_the_channels_and_descriptors_that_are_ready() -> None:
    readable, writable = os.pipe()
    with make_pair() as (router, dealer):
        assert wait([router, dealer, readable], 0.01) == []
        os.write(writable, b"x")
        dealer.send(Heartbeat(1.0))
        found: set[Any] = set()
        while found != {router, readable}:
            found |= set(wait([router, dealer, readable], LIMIT_S))
    os.close(readable)
    os.close(writable)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([], id="nothing"),
        pytest.param([b""], id="an empty header"),
        pytest.param([b"\x80\x04\x95\x0c"], id="a pickle"),
        pytest.param([b"\xc1"], id="a byte that msgpack never uses"),
        pytest.param([b"\x92\xa5Hello"], id="a truncated message"),
        pytest.param([b"\x92\xa7Nothing\x01"], id="an unknown message"),
        pytest.param([b"\x91" * 100_000], id="nested without end"),
        pytest.param([b"\xdd\xff\xff\xff\xff"], id="four billion elements announced"),
        pytest.param([b"\x92\xadAbortRequests\x91\xa1\xff"], id="text that is not UTF-8"),
        pytest.param([encoder.encode(Heartbeat(1.0))] + [b""] * 5000, id="too many frames"),
    ],
)
def test_a_malformed_message_is_counted_and_dropped(parts: list[bytes]) -> None:
    with make_pair() as (router, dealer), make_attacker(first_address(router)) as attacker:
        if parts:
            attacker.send_multipart(parts)
        else:
            attacker.send(b"", zmq.SNDMORE)
            attacker.send(b"")
        while router.num_malformed == 0:
            assert wait([router], LIMIT_S)
            assert router.receive() is None
        dealer.send(Heartbeat(3.0))

        assert receive_one(router)[1] == Heartbeat(3.0)
        assert router.num_malformed == 1


def test_a_peer_is_not_listened_to_after_a_hundred_malformed_messages() -> None:
    with make_pair() as (router, dealer), make_attacker(first_address(router)) as attacker:
        for _ in range(MAX_MALFORMED):
            attacker.send(b"nonsense")
        for _ in range(5):
            attacker.send(encoder.encode(AbortRequests(["a"])))
        while router.num_ignored < 5:
            assert wait([router], LIMIT_S)
            assert router.receive() is None
        dealer.send(Heartbeat(1.0))

        assert receive_one(router)[1] == Heartbeat(1.0)
        assert router.num_malformed == MAX_MALFORMED


def test_a_message_above_the_limit_cuts_its_own_connection_only() -> None:
    with make_pair(max_message_bytes=10_000) as (router, dealer):
        with make_attacker(first_address(router)) as attacker:
            attacker.send(encoder.encode(AbortRequests(["x" * 20_000])))
            assert wait([router], 0.3) == []
        dealer.send(Heartbeat(1.0))

        assert receive_one(router)[1] == Heartbeat(1.0)
        assert router.num_malformed == 0  # it never got in


def test_what_is_remembered_of_bad_peers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_MAX_TRACKED_PEERS", 3)
    with make_pair() as (router, _):
        for _ in range(10):
            with make_attacker(first_address(router)) as attacker:
                seen = router.num_malformed
                attacker.send(b"nonsense")
                while router.num_malformed == seen:
                    assert wait([router], LIMIT_S)
                    assert router.receive() is None

        assert len(router._malformed) == 3


def hostile_header(rng: random.Random, samples: list[bytes]) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(300))
    if kind == 1:
        extension = msgspec.msgpack.Ext(rng.randrange(128), rng.randbytes(20))
        return msgspec.msgpack.encode([rng.choice(["Hello", "AddRequest", "Call"]), extension])
    data = bytearray(rng.choice(samples))
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if kind == 2:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def test_hostile_peers_disturb_no_good_one() -> None:
    fuzz(3000)


def fuzz(num_inputs: int) -> None:
    """Random and mutated messages from peer after peer; every good message arrives in order."""
    samples = [encoder.encode(x) for wire in make_messages().values() for x in wire]
    rng = random.Random(0)
    with make_pair() as (router, dealer):
        dealer.send(Heartbeat(-1.0))
        good_peer = receive_one(router)[0]
        address = first_address(router)

        def attack() -> None:
            for _ in range(num_inputs // 150):
                with make_attacker(address) as attacker:
                    attacker.linger = 1000
                    for _ in range(150):
                        frames = [rng.randbytes(8)] * rng.choice([0, 0, 2])
                        attacker.send_multipart([hostile_header(rng, samples), *frames])

        attacking = threading.Thread(target=attack)
        attacking.start()
        heard: list[float] = []
        num_sent = 0
        while attacking.is_alive() or num_sent < 50 or len(heard) < num_sent:
            while num_sent < len(heard) + 10 and (attacking.is_alive() or num_sent < 50):
                dealer.send(Heartbeat(float(num_sent)))
                num_sent += 1
            wait([router], 0.1)
            while (received := router.receive()) is not None:
                if received[0] == good_peer:
                    heard.append(received[1].sent_at_s)
        attacking.join()

        assert heard == list(range(num_sent))
        assert router.num_malformed + router.num_ignored > num_inputs / 4


def test_signals_are_seen_by_who_waits_for_several_things() -> None:
    import signal

    former = signal.getsignal(signal.SIGUSR2)
    try:
        watch = SignalWatch(signal.SIGUSR2)
        assert wait([watch.fileno()], 0) == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert wait([watch.fileno()], LIMIT_S) == [watch.fileno()]
        assert watch.take() == [signal.SIGUSR2]
        assert watch.take() == []
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR2, former)
        watch.close()
