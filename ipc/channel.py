"""Typed ROUTER/DEALER channels: messages in, messages out, no pickle and no thread of ours.

A multipart message is [header, extra frames ...]; the header is one msgpack message of the
union that the channel's decoder knows, the frames are raw arrays (``ipc/tensors.py``). A channel
is used by one thread. Whatever a peer sends, ``receive`` never raises: what does not decode is
counted and dropped, and a peer that sends too much of it is not listened to any more.
"""

import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from ipc.addresses import (
    check_address,
    claim_ipc_path,
    make_ipc_directory,
    resolve_for_bind,
    split_tcp,
)
from ipc.curve import ZAP_DOMAIN, CurveClientKeys, CurveGate, CurveServerKeys
from ipc.errors import ConfigError, EngineDeadError
from ipc.messages import encoder
from ipc.records import Message
from ipc.tensors import Frames

MAX_MESSAGE_BYTES = 64 * 2**20  # a frame above this cuts the connection
HIGH_WATER_MARK = 1000  # messages queued per peer and direction
MAX_EXTRA_FRAMES = 4096
MAX_MALFORMED = 100  # after these a peer is not listened to any more

_MAX_TRACKED_PEERS = 4096
_MAX_DROPS_PER_RECEIVE = 256  # then the caller gets a turn: a flood must not hold it
# Plain numbers: arithmetic on enums is slow.
_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
_MORE_NOBLOCK = int(zmq.SNDMORE | zmq.NOBLOCK)
_RECONNECT_MS = 1000
_TCP_PING_MS, _TCP_SILENCE_MS = 1000, 5000

T = TypeVar("T")
Socket = zmq.Socket[bytes]
Decoder = msgspec.msgpack.Decoder

logger = logging.getLogger(__name__)


class _Malformed(Exception):
    """A received message that is not one of the channel's union."""


class RouterChannel(Generic[T]):
    """The listening end: owns one ROUTER socket and what it knows about bad peers.

    Sending never blocks. An address ``ipc://*`` makes a private directory, which ``close``
    removes; ``tcp://host:0`` takes a free port.
    """

    def __init__(
        self,
        decoder: "Decoder[T]",
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        high_water_mark: int = HIGH_WATER_MARK,
        curve_keys: CurveServerKeys | None = None,
    ) -> None:
        self._decoder = decoder
        self._curve_keys = curve_keys
        # The gate's address is one per context, so each channel has its own context.
        self._context: zmq.Context[Socket] = zmq.Context()
        self._gate = CurveGate(self._context, curve_keys) if curve_keys else None
        self._socket = self._context.socket(zmq.ROUTER)
        _configure(self._socket, max_message_bytes, high_water_mark)
        self._socket.router_mandatory = True
        self._directory: Path | None = None
        self._socket_file: Path | None = None
        self._malformed: OrderedDict[bytes, int] = OrderedDict()  # by peer, oldest first
        self.num_malformed = 0
        self.num_ignored = 0  # messages of peers that were cut off

    def bind(self, address: str = "ipc://*") -> str:
        """Listen, and return the address that peers connect to.

        Raises:
            ConfigError: the address is malformed, in use, or open to the network without keys.
        """
        if address == "ipc://*":
            self._directory = make_ipc_directory()
            address = f"ipc://{self._directory}/socket"
        check_address(address, has_curve=self._curve_keys is not None)
        if self._curve_keys is not None:
            self._socket.curve_server = True
            self._socket.curve_secretkey = self._curve_keys.secret
            self._socket.zap_domain = ZAP_DOMAIN
        if address.startswith("ipc://"):
            claim_ipc_path(address)
            self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        else:
            _configure_tcp(self._socket, address)
            if self._curve_keys is None:
                logger.warning("%s is open to every user of this machine: no keys", address)
        former_umask = os.umask(0o177)  # the socket file is the owner's from its first moment
        try:
            self._socket.bind(_wildcard_port(resolve_for_bind(address)))
        except zmq.ZMQError as err:
            raise ConfigError(f"cannot listen at {address}: {err.strerror}") from err
        finally:
            os.umask(former_umask)
        if address.startswith("ipc://"):
            self._socket_file = Path(address.removeprefix("ipc://"))
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.rstrip(b"\0").decode()

    def send(self, peer: bytes, message: Message, frames: Frames = ()) -> bool:
        """Queue a message for a peer; False when it is gone or takes nothing any more."""
        return self._try_send(peer, message, frames) == 0

    def probe(self, peer: bytes, message: Message) -> bool:
        """Send if there is room; False only when the peer is not connected any more."""
        return self._try_send(peer, message, ()) != zmq.EHOSTUNREACH

    def receive(self) -> tuple[bytes, T, list[memoryview]] | None:
        """The next good message and its sender, or None when there is none now."""
        if self._gate is not None:
            self._gate.serve()
        for _ in range(_MAX_DROPS_PER_RECEIVE):
            if (received := _receive_parts(self._socket, num_copied=2)) is None:
                return None
            sender, *parts = received
            if self._malformed.get(sender, 0) >= MAX_MALFORMED:
                self.num_ignored += 1
                continue
            try:
                message, frames = _decode(self._decoder, parts)
            except _Malformed as err:
                self._count_malformed(sender, err)
                continue
            return sender, message, frames
        return None

    def sockets(self) -> list[Socket]:
        """What ``wait`` polls."""
        return [self._socket] if self._gate is None else [self._socket, self._gate.socket]

    def close(self, linger_s: float = 0.0) -> None:
        """Close, giving what was not sent yet ``linger_s`` to leave. Harmless when repeated."""
        if self._gate is not None:
            self._gate.close()
        self._socket.close(linger=_milliseconds(linger_s))
        self._context.term()
        if self._socket_file is not None:
            self._socket_file.unlink(missing_ok=True)
            self._socket_file = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _try_send(self, peer: bytes, message: Message, frames: Frames) -> int:
        try:
            _send_parts(self._socket, [peer, encoder.encode(message), *frames])
        except zmq.ZMQError as err:
            if err.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return err.errno
            raise
        return 0

    def _count_malformed(self, peer: bytes, reason: _Malformed) -> None:
        self.num_malformed += 1
        count = self._malformed.pop(peer, 0) + 1
        self._malformed[peer] = count
        if len(self._malformed) > _MAX_TRACKED_PEERS:
            self._malformed.popitem(last=False)
        if count == MAX_MALFORMED:
            logger.warning("peer %s sent %d malformed messages: cut off", peer.hex(), count)
        else:
            logger.debug("dropped a malformed message from %s: %s", peer.hex(), reason)


class DealerChannel(Generic[T]):
    """The connecting end: owns one DEALER socket.

    With asyncio: register ``fileno`` with ``loop.add_reader`` and drain with ``receive(0)`` until
    None. The descriptor signals changes, not states, and sending may swallow one: also drain
    once after each send.
    """

    def __init__(
        self,
        decoder: "Decoder[T]",
        *,
        identity: bytes | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        high_water_mark: int = HIGH_WATER_MARK,
        curve_keys: CurveClientKeys | None = None,
    ) -> None:
        self._decoder = decoder
        self._curve_keys = curve_keys
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket, max_message_bytes, high_water_mark)
        # Not ``immediate``: it would throw away what a peer said just before it left.
        self._socket.reconnect_ivl_max = _RECONNECT_MS
        if identity is not None:
            self._socket.routing_id = identity
        self.num_malformed = 0

    def connect(self, address: str) -> None:
        """Start connecting; the connection is made, and made again, in the background.

        Raises:
            ConfigError: the address is malformed, or leaves the machine without keys.
        """
        check_address(address, has_curve=self._curve_keys is not None)
        if self._curve_keys is not None:
            self._socket.curve_serverkey = self._curve_keys.server_public
            self._socket.curve_publickey = self._curve_keys.public
            self._socket.curve_secretkey = self._curve_keys.secret
        if address.startswith("tcp://"):
            _configure_tcp(self._socket, address)
        self._socket.connect(address)

    def send(self, message: Message, frames: Frames = (), timeout_s: float = 10.0) -> None:
        """Send, waiting for room while there is none. Before a connection stands, it is queued.

        Raises:
            EngineDeadError: the peer took nothing for ``timeout_s``.
        """
        parts = [encoder.encode(message), *frames]
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                _send_parts(self._socket, parts)
                return
            except zmq.Again:
                remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or not self._socket.poll(_milliseconds(remaining_s), zmq.POLLOUT):
                raise EngineDeadError(f"the other side took no message for {timeout_s:g} s")

    def try_send(self, message: Message, frames: Frames = ()) -> bool:
        """Send if there is room now, else False."""
        try:
            _send_parts(self._socket, [encoder.encode(message), *frames])
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float | None) -> tuple[T, list[memoryview]] | None:
        """The next good message, or None after ``timeout_s`` (0: at once; None: never)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            received = self._receive_now()
            if received is not None or timeout_s == 0:
                return received
            remaining_s = None if deadline is None else deadline - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                return None
            self._socket.poll(None if remaining_s is None else _milliseconds(remaining_s))

    def fileno(self) -> int:
        """The descriptor that becomes readable when the socket's state changes."""
        return self._socket.fileno()

    def sockets(self) -> list[Socket]:
        """What ``wait`` polls."""
        return [self._socket]

    def close(self, linger_s: float = 0.0) -> None:
        """Close, giving what was not sent yet ``linger_s`` to leave. Harmless when repeated."""
        self._socket.close(linger=_milliseconds(linger_s))
        self._context.term()

    def _receive_now(self) -> tuple[T, list[memoryview]] | None:
        for _ in range(_MAX_DROPS_PER_RECEIVE):
            if (parts := _receive_parts(self._socket, num_copied=1)) is None:
                return None
            try:
                return _decode(self._decoder, parts)
            except _Malformed as err:
                self.num_malformed += 1
                logger.debug("dropped a malformed message: %s", err)
        return None


Waitable = RouterChannel[Any] | DealerChannel[Any] | int


def wait(channels: Sequence[Waitable], timeout_s: float | None) -> list[Waitable]:
    """Sleep until a channel has something to receive; return those that do.

    Args:
        channels: channels, and plain file descriptors (a pidfd, a pipe) waited for as readable.
        timeout_s: None waits for ever.
    """
    polled: list[tuple[Socket | int, int]] = []
    owners: list[Waitable] = []
    for channel in channels:
        for item in [channel] if isinstance(channel, int) else channel.sockets():
            polled.append((item, zmq.POLLIN))
            owners.append(channel)
    ready = zmq.zmq_poll(polled, -1 if timeout_s is None else _milliseconds(timeout_s))
    is_ready = {item for item, _ in ready}
    found = [owner for (item, _), owner in zip(polled, owners, strict=True) if item in is_ready]
    return list(dict.fromkeys(found))


def _configure(socket: Socket, max_message_bytes: int, high_water_mark: int) -> None:
    socket.linger = 0
    socket.maxmsgsize = max_message_bytes
    socket.sndhwm = high_water_mark
    socket.rcvhwm = high_water_mark


def _configure_tcp(socket: Socket, address: str) -> None:
    """Let the transport notice a machine that is gone; a local peer's end is seen anyway."""
    socket.ipv6 = ":" in split_tcp(address)[0]
    socket.heartbeat_ivl = _TCP_PING_MS
    socket.heartbeat_timeout = _TCP_SILENCE_MS


def _send_parts(socket: Socket, parts: Sequence[Any]) -> None:
    """Queue one multipart message, whole or not at all.

    Raises:
        zmq.ZMQError: it cannot be taken now, or its receiver is unknown.
    """
    for part in parts[:-1]:
        socket.send(part, _MORE_NOBLOCK)
    socket.send(parts[-1], _NOBLOCK)


def _receive_parts(socket: Socket, num_copied: int) -> list[Any] | None:
    """One multipart message, None when there is none: the first parts as bytes, then frames."""
    events = socket.getsockopt(zmq.EVENTS)
    assert isinstance(events, int)
    if not events & _POLLIN:  # cheaper than an exception
        return None
    parts: list[Any] = [socket.recv(_NOBLOCK)]
    while socket.getsockopt(zmq.RCVMORE):  # the rest is there: messages arrive whole
        parts.append(socket.recv(copy=len(parts) < num_copied))
    return parts


def _decode(decoder: "Decoder[T]", parts: list[Any]) -> tuple[T, list[memoryview]]:
    if not 1 <= len(parts) <= 1 + MAX_EXTRA_FRAMES:
        raise _Malformed(f"{len(parts)} frames")
    try:
        message = decoder.decode(parts[0])
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as err:
        raise _Malformed(str(err)) from err
    return message, [frame.buffer for frame in parts[1:]]


def _milliseconds(seconds: float) -> int:
    return max(0, -int(-seconds * 1000 // 1))  # rounded up: a wait of 0 would spin


def _wildcard_port(address: str) -> str:
    return (
        f"{address[:-1]}*" if address.startswith("tcp://") and address.endswith(":0") else address
    )
