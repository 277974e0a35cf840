"""A frontend's connection to an engine core: handshake, credits, signs of life. Never waits.

Both clients of ``core_client.py`` are loops around one ``CoreLink``: one sleeps in a system call,
the other in an event loop.
"""

import os
import socket
import time
from collections import deque

import msgspec

from ipc import errors
from ipc.channel import DealerChannel
from ipc.curve import CurveClientKeys
from ipc.errors import EngineDeadError, EngineError, EngineOverloadedError, ProtocolError
from ipc.messages import (
    PROTOCOL_VERSION,
    Ack,
    Call,
    CallResult,
    CoreToFrontend,
    EngineFailed,
    EngineOutputs,
    FrontendToCore,
    Goodbye,
    Heartbeat,
    Hello,
    ReclaimedRequest,
    Refused,
    SchedulerStats,
    Welcome,
    WorkerInfo,
    core_to_frontend_decoder,
    schema_hash,
)
from ipc.operations import AnyOperation, CheckWorkers, GetStats, ReclaimRequest
from ipc.tensors import Frames

HELLO_EVERY_S = 0.5  # until there is a welcome
PING_EVERY_S = 1.0
SILENCE_LIMIT_S = 5.0  # a core whose process cannot be watched is dead after this
WELCOME_LIMIT_S = 60.0  # for a core that runs, but may be busy
NOBODY_LIMIT_S = 5.0  # for an address where perhaps nobody listens
MAX_UNSENT = 10_000  # messages that wait here because the core takes none

_GOODBYE_S = 0.2  # for the last message to leave

Received = tuple[CoreToFrontend, list[memoryview]]


class CoreLink:
    """Owns the DEALER socket and what is due on it: unsent messages, credits to give back, pings.

    Pings are sent only to a core whose process cannot be watched: elsewhere the kernel knows
    better and sooner.
    """

    def __init__(
        self, address: str, *, curve_keys: CurveClientKeys | None, has_pings: bool
    ) -> None:
        self.address = address
        self.has_pings = has_pings
        self.welcome: Welcome | None = None
        self._channel = DealerChannel(core_to_frontend_decoder, curve_keys=curve_keys)
        self._channel.connect(address)
        self._unsent: deque[tuple[FrontendToCore, Frames]] = deque()
        self._num_to_acknowledge = 0
        self._next_call_id = 0
        self._next_ping_s = 0.0
        self._unanswered_since_s: float | None = None
        self._next_hello_s = 0.0
        self._say_hello()

    @property
    def channel(self) -> "DealerChannel[CoreToFrontend]":
        """What to wait for."""
        return self._channel

    @property
    def has_unsent(self) -> bool:
        """Whether messages wait for the core to take them: call ``flush`` again soon."""
        return bool(self._unsent)

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Send, or keep for later what the core does not take now.

        Raises:
            EngineOverloadedError: too much is kept already; nothing was sent.
        """
        if len(self._unsent) >= MAX_UNSENT:
            raise EngineOverloadedError(f"the engine has not taken {MAX_UNSENT} messages")
        self._unsent.append((message, frames))
        self.flush()

    def flush(self) -> bool:
        """Send what was kept, as far as the core takes it; whether that was anything."""
        num_before = len(self._unsent)
        while self._unsent and self._channel.try_send(*self._unsent[0]):
            self._unsent.popleft()
        return len(self._unsent) < num_before

    def make_call(self, operation: AnyOperation) -> Call:
        """A call with an id of its own."""
        self._next_call_id += 1
        return Call(self._next_call_id, operation)

    def receive(self) -> Received | None:
        """The next message that concerns the caller, or None when there is none now.

        Raises:
            EngineDeadError: the core said that it ends.
            ProtocolError: the core does not accept this frontend.
        """
        while True:
            received = self._channel.receive(0)
            if received is None:
                # Receiving may have noticed that there is room now, and sending that there is
                # something to receive: the descriptor will not tell again.
                if self.flush():
                    continue
                return None
            self._unanswered_since_s = None
            match received[0]:
                case Heartbeat():
                    continue
                case Welcome():
                    self.welcome = received[0]
                    continue
                case EngineFailed():
                    raise EngineDeadError(received[0].reason, received[0].exit_code)
                case Refused():
                    raise ProtocolError(f"the engine refused us: {received[0].reason}")
                case EngineOutputs():
                    self._num_to_acknowledge += 1
            return received

    def acknowledge(self) -> None:
        """Give back credits for what was taken in so far, once that is worth a message."""
        assert self.welcome is not None
        if self._num_to_acknowledge >= max(1, self.welcome.limits.credits // 4):
            num_outputs, self._num_to_acknowledge = self._num_to_acknowledge, 0
            self.send(Ack(num_outputs))

    def tick(self) -> None:
        """Do what time asks for; call it about once a second while waiting.

        Raises:
            EngineDeadError: the core has been silent for too long.
        """
        self.flush()
        now = time.monotonic()
        if self.welcome is None and now >= self._next_hello_s:
            self._say_hello()  # one core may have taken the last one along when it died
        if not self.has_pings:
            return
        if self._unanswered_since_s is not None:
            silence_s = now - self._unanswered_since_s
            if silence_s >= SILENCE_LIMIT_S:
                raise EngineDeadError(
                    f"the engine at {self.address} is silent for {silence_s:.1f} s"
                )
        if now >= self._next_ping_s and self.welcome is not None and not self._unsent:
            self._next_ping_s = now + PING_EVERY_S
            if self._unanswered_since_s is None:
                self._unanswered_since_s = now
            self.send(Heartbeat(now))

    def _say_hello(self) -> None:
        self._next_hello_s = time.monotonic() + HELLO_EVERY_S
        self.send(Hello(PROTOCOL_VERSION, schema_hash(), socket.gethostname(), os.getpid()))

    def close(self, *, says_goodbye: bool) -> None:
        """Close the connection, after a goodbye where somebody is left to hear it."""
        if says_goodbye and self.welcome is not None and self._channel.try_send(Goodbye()):
            self._channel.close(linger_s=_GOODBYE_S)
        else:
            self._channel.close()
        self.welcome = None


def read_result(operation: AnyOperation, answer: CallResult) -> object:
    """The value that an operation documents.

    Raises:
        EngineError: the operation failed; of the class that the core named.
    """
    if answer.error is not None:
        kind = getattr(errors, answer.error_kind, EngineError)
        is_ours = isinstance(kind, type) and issubclass(kind, EngineError)
        raise kind(answer.error) if is_ours else EngineError(answer.error)
    assert answer.result is not None
    match operation:
        case GetStats():
            return msgspec.msgpack.decode(answer.result, type=SchedulerStats)
        case CheckWorkers():
            return msgspec.msgpack.decode(answer.result, type=list[WorkerInfo])
        case ReclaimRequest():
            return msgspec.msgpack.decode(answer.result, type=ReclaimedRequest)
        case _:
            return msgspec.msgpack.decode(answer.result)
