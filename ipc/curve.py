"""Keys and admission for sockets that leave the machine (CurveZMQ, RFC 26; ZAP, RFC 27).

A key directory holds everything for one engine: the server keeps ``server.*`` and
``authorized_clients``, a client needs ``server.public`` and ``client.*``. Files hold one key in
Z85 text; the list of clients holds one per line, ``#`` starts a comment.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from ipc.errors import ConfigError

ZAP_DOMAIN = b"heliograph"

_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # fixed by the protocol; one per zmq context
_ZAP_REQUEST_PARTS = 7  # version, id, domain, address, identity, mechanism, the client's key


@dataclass(frozen=True, kw_only=True)
class CurveServerKeys:
    """What a server needs: its pair, and the public keys it lets in."""

    public: bytes
    secret: bytes
    authorized: frozenset[bytes]


@dataclass(frozen=True, kw_only=True)
class CurveClientKeys:
    """What a client needs: its pair, and the server's public key."""

    server_public: bytes
    public: bytes
    secret: bytes


def make_key_directory(directory: Path) -> list[Path]:
    """Write a fresh server pair and an authorised client pair; return the files.

    Raises:
        ConfigError: one of the files exists; keys are never overwritten.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    contents = {
        "server.public": server_public,
        "server.secret": server_secret,
        "client.public": client_public,
        "client.secret": client_secret,
        "authorized_clients": client_public,
    }
    for name in contents:
        if (directory / name).exists():
            raise ConfigError(f"{directory / name} exists: keys are never overwritten")
    paths = []
    for name, content in contents.items():
        path = directory / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content + b"\n")
        paths.append(path)
    return paths


def load_server_keys(directory: Path) -> CurveServerKeys:
    """Read the server's side of a key directory.

    Raises:
        ConfigError: a file is missing, holds no key, or lets others read a secret.
    """
    authorized = frozenset(
        _check_key(line, directory / "authorized_clients")
        for line in _read(directory / "authorized_clients").splitlines()
        if line.strip() and not line.startswith(b"#")
    )
    return CurveServerKeys(
        public=_read_key(directory / "server.public"),
        secret=_read_secret(directory / "server.secret"),
        authorized=authorized,
    )


def load_client_keys(directory: Path) -> CurveClientKeys:
    """Read a client's side of a key directory.

    Raises:
        ConfigError: as ``load_server_keys``.
    """
    return CurveClientKeys(
        server_public=_read_key(directory / "server.public"),
        public=_read_key(directory / "client.public"),
        secret=_read_secret(directory / "client.secret"),
    )


class CurveGate:
    """Answers the handshakes of one server socket: known client keys pass, all others do not.

    It needs no thread: its socket is polled and served with the server's own.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", keys: CurveServerKeys) -> None:
        self._authorized = frozenset(z85.decode(key) for key in keys.authorized)
        self.num_refused = 0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(_ZAP_ADDRESS)

    def serve(self) -> None:
        """Answer every waiting handshake."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(parts)

    def close(self) -> None:
        """Close the socket; handshakes after this fail."""
        self.socket.close()

    def _answer(self, parts: list[bytes]) -> None:
        boundary = parts.index(b"") + 1  # routing prefix of the request, then the request
        request = parts[boundary:]
        is_known = (
            len(request) == _ZAP_REQUEST_PARTS
            and request[2] == ZAP_DOMAIN
            and request[5] == b"CURVE"
            and request[6] in self._authorized
        )
        self.num_refused += not is_known
        status = [b"200", b"OK"] if is_known else [b"400", b"unknown key"]
        self.socket.send_multipart([*parts[:boundary], b"1.0", request[1], *status, b"", b""])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(f"--curve-keys: {path} cannot be read: {err.strerror}") from err


def _read_key(path: Path) -> bytes:
    return _check_key(_read(path), path)


def _read_secret(path: Path) -> bytes:
    key = _read_key(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"--curve-keys: {path} can be read by others; run chmod 600 on it")
    return key


def _check_key(text: bytes, path: Path) -> bytes:
    key = text.strip()
    try:
        is_key = len(key) == 40 and len(z85.decode(key)) == 32
    except (KeyError, ValueError):
        is_key = False
    if not is_key:
        raise ConfigError(f"--curve-keys: {path} holds no key of 40 characters")
    return key
