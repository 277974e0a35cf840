"""A ``CoreServer`` in a thread of the test: a fake core behind it, real sockets in front."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine_core.core_server import CoreServer, make_welcome
from engine_core.drain import Drain
from ipc.channel import DealerChannel, RouterChannel
from ipc.messages import (
    PROTOCOL_VERSION,
    CoreToFrontend,
    Hello,
    core_to_frontend_decoder,
    frontend_to_core_decoder,
    schema_hash,
)
from ipc.records import Message
from tests.engine_core.fake_core import FakeCore, FakeExecutor, make_config, make_limits

LIMIT_S = 10.0


class FakeSignals:
    """Signals on request, for a server that is not in the main thread."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)

    def fileno(self) -> int:
        """Readable after ``send``."""
        return self._receiver.fileno()

    def send(self, number: int) -> None:
        """Deliver a signal."""
        self._sender.send(bytes([number]))

    def take(self) -> list[Any]:
        """The signals so far."""
        import signal

        try:
            return [signal.Signals(number) for number in self._receiver.recv(16)]
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Close both ends."""
        self._receiver.close()
        self._sender.close()


@dataclass
class ServerRig:
    """A running server and what stands behind it."""

    address: str
    core: FakeCore
    signals: FakeSignals
    channel: RouterChannel[Any]
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def running_server(
    credits: int = 64,
    channel: RouterChannel[Any] | None = None,
    address: str = "ipc://*",
    drain_s: float = 0.0,
) -> Iterator[ServerRig]:
    """Serve until the block ends; its failure is the test's."""
    channel = RouterChannel(frontend_to_core_decoder) if channel is None else channel
    signals = FakeSignals()
    executor = FakeExecutor()
    core: Any = FakeCore(executor)
    welcome = make_welcome(make_config(), make_limits(credits), "digest", epoch=3)
    fake_executor: Any = executor
    fake_signals: Any = signals
    server = CoreServer(core, fake_executor, channel, welcome, fake_signals, Drain(core, drain_s))
    rig = ServerRig(channel.bind(address), core, signals, channel)

    def serve() -> None:
        try:
            server.run()
        except BaseException as err:
            rig.failures.append(err)
        finally:
            channel.close(linger_s=1.0)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield rig
    finally:
        signals.send(15)
        thread.join(LIMIT_S)
        signals.close()
    assert not thread.is_alive(), "the server did not stop"
    assert not rig.failures, rig.failures


class BareFrontend:
    """A frontend that says exactly what a test wants it to say."""

    def __init__(self, address: str) -> None:
        self._channel: DealerChannel[CoreToFrontend] = DealerChannel(core_to_frontend_decoder)
        self._channel.connect(address)

    def __enter__(self) -> "BareFrontend":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def say(self, *messages: Message, frames: tuple[bytes, ...] = ()) -> None:
        """Send messages."""
        for message in messages:
            self._channel.send(message, frames)

    def hear(self) -> Any:
        """The next message; there must be one."""
        received = self._channel.receive(LIMIT_S)
        assert received is not None, "the server said nothing"
        return received[0]

    def hears_nothing(self) -> bool:
        """Whether nothing arrives for a moment."""
        return self._channel.receive(0.1) is None

    def greet(self) -> Any:
        """Say a proper Hello; the answer."""
        self.say(make_hello())
        return self.hear()


def make_hello(version: int = PROTOCOL_VERSION, digest: str | None = None) -> Hello:
    """A Hello, proper by default."""
    return Hello(version, schema_hash() if digest is None else digest, "test", 1)


def wait_until(condition: Any) -> None:
    """Wait for another thread or process to make ``condition()`` true."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)
