"""Addresses of sockets, and the private directory that holds the local ones.

A local socket lives in a directory that only its owner may enter, named after the process that
made it. Directories whose process is gone are swept by the next one that makes its own.
"""

import ipaddress
import logging
import os
import re
import secrets
import shutil
import socket
import struct
import tempfile
from pathlib import Path

from ipc.errors import ConfigError
from ipc.processes import is_alive

MAX_PATH_BYTES = 107  # of a unix socket on Linux, the closing zero not counted

_PREFIX = "heliograph"
_DIRECTORY_NAME = re.compile(rf"{_PREFIX}-(\d+)-[0-9a-f]+")

logger = logging.getLogger(__name__)


def make_ipc_directory(runtime_directory: Path | None = None) -> Path:
    """Make this process's private directory for sockets, after sweeping stale ones.

    Args:
        runtime_directory: the parent; None picks the user's runtime directory, else the
            directory for temporary files.
    """
    parent = find_runtime_directory() if runtime_directory is None else runtime_directory
    sweep_stale_directories(parent)
    path = parent / f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(8)}"
    path.mkdir(mode=0o700)
    return path


def find_runtime_directory() -> Path:
    """The user's runtime directory if there is one to write to, else the temporary one."""
    candidate = os.environ.get("XDG_RUNTIME_DIR")
    if candidate and os.path.isdir(candidate) and os.access(candidate, os.W_OK | os.X_OK):
        return Path(candidate)
    return Path(tempfile.gettempdir())


def sweep_stale_directories(parent: Path) -> list[Path]:
    """Remove our own directories in ``parent`` whose process is gone; return them."""
    swept = []
    for path in parent.glob(f"{_PREFIX}-*"):
        match = _DIRECTORY_NAME.fullmatch(path.name)
        if match is None or path.is_symlink() or is_alive(int(match[1])):
            continue
        try:
            if path.stat().st_uid != os.getuid() or any(map(_is_listening, path.iterdir())):
                continue  # a number may be alive in another namespace that shares this directory
            shutil.rmtree(path)
        except FileNotFoundError:
            continue  # another process sweeps too
        swept.append(path)
        logger.info("removed the stale socket directory %s", path)
    return swept


def check_address(address: str, *, has_curve: bool) -> None:
    """Refuse an address that cannot work or that would talk in the clear across machines.

    Raises:
        ConfigError: with the sentence for the user.
    """
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        if not path.startswith("/"):
            raise ConfigError(f"the path in {address!r} must be absolute, as in ipc:///run/engine")
        num_bytes = len(os.fsencode(path))
        if num_bytes > MAX_PATH_BYTES:
            raise ConfigError(
                f"the socket path {path!r} has {num_bytes} bytes, the system takes at most "
                f"{MAX_PATH_BYTES}: choose a shorter one, or a shorter XDG_RUNTIME_DIR or TMPDIR"
            )
        return
    host, _ = split_tcp(address)
    if not has_curve and not is_loopback(host):
        raise ConfigError(
            f"{address} can be reached from other machines: give --curve-keys DIR (made with "
            f"'heliograph keys DIR'), or listen on 127.0.0.1 or an ipc:// path"
        )


def split_tcp(address: str) -> tuple[str, str]:
    """Host and port of ``tcp://host:port``; brackets of an IPv6 host are removed.

    Raises:
        ConfigError: it has another form.
    """
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.%\w]+\]|[^:/\s\[\]]+):(\d+|\*)", address)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise ConfigError(f"an address is ipc:///path or tcp://host:port, got {address!r}")
    return match[1].strip("[]"), match[2]


def is_loopback(host: str) -> bool:
    """Whether every address that ``host`` names stays on this machine."""
    if host in ("*", ""):
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass  # a name
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as err:
        raise ConfigError(f"the host name {host!r} cannot be resolved: {err}") from err
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def resolve_for_bind(address: str) -> str:
    """A TCP address with its host name replaced by the number that it names first."""
    if not address.startswith("tcp://"):
        return address
    host, port = split_tcp(address)
    if host != "*":
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as err:
            raise ConfigError(f"the host name {host!r} cannot be resolved: {err}") from err
        host = str(found[0][4][0])
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def claim_ipc_path(address: str) -> None:
    """Make sure that nobody listens at an ``ipc://`` address; binding would push them out.

    Raises:
        ConfigError: a live process listens there, the path is no socket, or its parent is missing.
    """
    path = Path(address.removeprefix("ipc://"))
    if not path.parent.is_dir():
        raise ConfigError(f"the directory of {address} does not exist")
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"{path} exists and is no socket")
    if _is_listening(path):
        raise ConfigError(f"another process listens at {address}")


def find_listener(address: str) -> int | None:
    """Process id of who listens at an ``ipc://`` address, as this process may use it.

    None for other addresses, when nobody listens, and when the listener lives in another process
    namespace, where its number would mean somebody else.
    """
    if not address.startswith("ipc://"):
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = int(struct.unpack("3i", credentials)[0])
    return pid or None


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False  # left behind by a dead process
    return True
