"""Addresses: private directories, stale ones swept, none open to the network by accident."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ipc.addresses import (
    MAX_PATH_BYTES,
    check_address,
    claim_ipc_path,
    find_listener,
    is_loopback,
    make_ipc_directory,
    resolve_for_bind,
    sweep_stale_directories,
)
from ipc.errors import ConfigError


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_directory(parent: Path, pid: int) -> Path:
    path = parent / f"heliograph-{pid}-0123456789abcdef"
    path.mkdir()
    (path / "core").touch()
    return path


def test_a_directory_for_sockets_is_its_owners_alone(tmp_path: Path) -> None:
    path = make_ipc_directory(tmp_path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert f"-{os.getpid()}-" in path.name
    assert make_ipc_directory(tmp_path) != path


def test_directories_of_dead_processes_are_swept_and_no_others(tmp_path: Path) -> None:
    stale = make_directory(tmp_path, dead_pid())
    alive = make_directory(tmp_path, os.getpid())
    foreign = tmp_path / "heliograph-notes"
    foreign.mkdir()

    assert sweep_stale_directories(tmp_path) == [stale]
    assert not stale.exists()
    assert alive.exists()
    assert foreign.exists()


def test_a_directory_where_somebody_listens_is_left_alone(tmp_path: Path) -> None:
    path = make_directory(tmp_path, dead_pid())  # as a process of another namespace looks
    (path / "core").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path / "core"))
        listener.listen()

        assert sweep_stale_directories(tmp_path) == []
    assert sweep_stale_directories(tmp_path) == [path]


def test_a_link_with_our_name_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    link = tmp_path / f"heliograph-{dead_pid()}-00"
    link.symlink_to(precious)

    assert sweep_stale_directories(tmp_path) == []
    assert precious.exists()


def test_the_longest_path_that_the_system_takes_passes_and_one_byte_more_does_not() -> None:
    longest = "/" + "a" * (MAX_PATH_BYTES - 1)
    check_address(f"ipc://{longest}", has_curve=False)

    with pytest.raises(ConfigError, match=r"has 108 bytes, the system takes at most 107"):
        check_address(f"ipc://{longest}b", has_curve=False)


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:1", "tcp://*:1", "tcp://192.0.2.7:1", "tcp://[::]:1", "tcp://[2001:db8::1]:1"],
)
def test_an_address_open_to_the_network_needs_keys(address: str) -> None:
    with pytest.raises(ConfigError, match="--curve-keys"):
        check_address(address, has_curve=False)
    check_address(address, has_curve=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_hosts_need_no_keys(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://a b:1",
        "tcp://127.0.0.1:1;127.0.0.1:2",
        "inproc://x",
        "udp://127.0.0.1:1",
        "ipc://relative/path",
        "ipc://@abstract",
    ],
)
def test_other_forms_of_address_are_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        check_address(address, has_curve=True)


def test_host_names_become_numbers_to_listen_on() -> None:
    assert resolve_for_bind("tcp://localhost:7") in ("tcp://127.0.0.1:7", "tcp://[::1]:7")
    assert resolve_for_bind("tcp://[::1]:7") == "tcp://[::1]:7"
    assert resolve_for_bind("tcp://*:7") == "tcp://*:7"
    assert resolve_for_bind("ipc:///x") == "ipc:///x"


def test_a_path_where_somebody_listens_is_not_taken_over(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/socket"
    claim_ipc_path(address)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        with pytest.raises(ConfigError, match="another process listens"):
            claim_ipc_path(address)
        assert find_listener(address) == os.getpid()
    claim_ipc_path(address)  # left behind by the dead
    assert find_listener(address) is None


def test_a_file_in_the_way_and_a_missing_directory_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists and is no socket"):
        claim_ipc_path(f"ipc://{tmp_path}/file")
    with pytest.raises(ConfigError, match="does not exist"):
        claim_ipc_path(f"ipc://{tmp_path}/missing/socket")
