"""The frontend's only door to the engine core: in this process, or in one of its own.

Three clients with one vocabulary: messages in, messages out, typed calls. Credits, heartbeats and
the discovery of a dead core happen inside. No threads, no signal handlers, and the core's code is
imported only when it is to run in this process.
"""

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from frontend.core_link import Engine, Received, read_result
from frontend.launcher import STOP_GRACE_S, Launch
from frontend.loop_hooks import LoopHooks, until_readable, weakly
from ipc.channel import wait
from ipc.config import EngineConfig
from ipc.curve import CurveClientKeys
from ipc.errors import EngineDeadError, EngineError, EngineStartError
from ipc.messages import (
    Ack,
    Call,
    CallResult,
    CoreToFrontend,
    FrontendToCore,
    Goodbye,
    Heartbeat,
    Hello,
    Welcome,
)
from ipc.operations import AnyOperation
from ipc.tensors import Frames

_TICK_S = 1.0
_SLOW_TICK_S = 10.0  # where nothing but messages that could not leave needs a look
_HANDSHAKE_TICK_S = 0.05  # a connection that comes about does not always wake us
_LAST_WORDS_S = 0.05  # for what a dead core sent before it died
# How long messages are taken in before other tasks of the event loop get their turn. While more
# come than that takes in, turns grow: each stream then gets more at once, which costs less.
_TURN_S, _MAX_TURN_S = 0.01, 0.08
_INPROC_PEER = b"inproc"

OnMessage = Callable[[CoreToFrontend, Frames], None]
OnDead = Callable[[EngineDeadError], None]


class InprocCoreClient:
    """The core and its executor in this process; steps run inside ``receive``."""

    def __init__(
        self, config: EngineConfig, executor_class: Callable[[EngineConfig], Any] | None = None
    ) -> None:
        from engine_core.dispatch import answer_call, dispatch
        from engine_core.start import start_core

        started = start_core(
            config, on_progress=lambda _progress: None, executor_class=executor_class
        )
        self._answer_call, self._dispatch = answer_call, dispatch
        self._core = started.core
        self._finalizer = weakref.finalize(self, started.executor.shutdown)
        self.welcome: Welcome = started.welcome
        self._received: deque[tuple[CoreToFrontend, Frames]] = deque()
        self._dead: EngineDeadError | None = None

    def __reduce__(self) -> str:
        raise RuntimeError("an engine cannot be pickled: it holds a model and its cache")

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Hand a message to the core."""
        self._check_alive()
        if isinstance(message, Goodbye):
            self._core.remove_client(_INPROC_PEER)
        elif not isinstance(message, Hello | Ack | Heartbeat | Call):
            self._dispatch(self._core, _INPROC_PEER, message, frames)

    def receive(self, timeout_s: float | None) -> tuple[CoreToFrontend, Frames] | None:
        """The next message, stepping until there is one; None when idle or out of time.

        Raises:
            EngineDeadError: a step failed; this engine is done for.
        """
        self._check_alive()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._take(self._core.drain_outputs())
        while not self._received and self._core.has_unfinished:
            try:
                self._take(self._core.step(timeout_s))
            except Exception as err:
                self._dead = _as_dead(err)
                raise self._dead from err
            if deadline is not None and time.monotonic() >= deadline:
                break
        return self._received.popleft() if self._received else None

    def call(self, operation: AnyOperation) -> Any:
        """Run a control operation."""
        self._check_alive()
        return read_result(operation, self._answer_call(self._core, Call(0, operation)))

    def close(self) -> None:
        """Free everything. May be repeated."""
        self._dead = EngineDeadError("the engine was closed")
        self._finalizer()

    def _take(self, results: Sequence[tuple[bytes, CoreToFrontend, Frames]]) -> None:
        self._received.extend((message, frames) for _, message, frames in results)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead


class ProcessCoreClient:
    """A core in a process of its own, for a caller without an event loop.

    Args:
        engine: a ``Launch``, which then belongs to this client, or the address of a daemon.
    """

    def __init__(
        self,
        engine: Launch | str,
        curve_keys: CurveClientKeys | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._engine = Engine(engine, curve_keys)
        self._finalizer = weakref.finalize(self, self._engine.close)
        self._received: deque[Received] = deque()
        self._dead: EngineDeadError | None = None
        try:
            self.welcome = self._shake_hands(timeout_s or self._engine.welcome_limit_s)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> str:
        raise RuntimeError("an engine cannot be pickled: it is a connection to processes")

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Send a message to the core; does not wait.

        Raises:
            EngineDeadError: the core is gone.
            EngineOverloadedError: the core takes nothing and too much waits; nothing was sent.
        """
        self._check_alive()
        self._engine.link.send(message, frames)

    def receive(self, timeout_s: float | None) -> tuple[CoreToFrontend, Frames] | None:
        """The next message, or None after ``timeout_s`` (0: at once; None: never).

        What was received before counts as taken in: its credits go back to the core.

        Raises:
            EngineDeadError: the core is gone; carries the cause.
        """
        self._check_alive()
        self._engine.link.acknowledge()
        if self._received:
            return self._received.popleft()
        return self._receive_new(None if timeout_s is None else time.monotonic() + timeout_s)

    def call(self, operation: AnyOperation) -> Any:
        """Run a control operation and wait for its answer; other messages are kept.

        Raises:
            EngineError: the operation failed.
            EngineDeadError: the core is gone.
        """
        self._check_alive()
        call = self._engine.link.make_call(operation)
        self._engine.link.send(call)
        while True:
            received = self._receive_new(None)
            assert received is not None
            message = received[0]
            if isinstance(message, CallResult) and message.call_id == call.call_id:
                return read_result(operation, message)
            self._received.append(received)

    def close(self) -> None:
        """Leave the core, and end its processes if they are ours. May be repeated."""
        self._dead = EngineDeadError("the engine was closed")
        self._finalizer()

    def _shake_hands(self, timeout_s: float) -> Welcome:
        deadline = time.monotonic() + timeout_s
        while (welcome := self._engine.link.welcome) is None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise _no_answer(self._engine.link.address, timeout_s)
            received = self._take()
            assert received is None, "a core spoke before its welcome"
            if self._engine.link.welcome is None:
                self._wait(min(remaining_s, _HANDSHAKE_TICK_S))
        return welcome

    def _receive_new(self, deadline: float | None) -> Received | None:
        while True:
            received = self._take()
            if received is not None:
                return received
            remaining_s = None if deadline is None else deadline - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                return None
            self._wait(remaining_s)

    def _take(self) -> Received | None:
        try:
            received = self._engine.link.receive()
            if received is None:
                self._engine.link.tick()
        except EngineDeadError as err:
            self._dead = err
            raise
        return received

    def _wait(self, timeout_s: float | None) -> None:
        """Sleep until something arrives. Messages that a dying core sent are still delivered."""
        link, pidfd = self._engine.link, self._engine.pidfd
        if link.has_pings or link.has_unsent:
            timeout_s = _TICK_S if timeout_s is None else min(timeout_s, _TICK_S)
        ready = wait([link.channel] if pidfd is None else [link.channel, pidfd], timeout_s)
        if pidfd is not None and pidfd in ready and not wait([link.channel], _LAST_WORDS_S):
            self._dead = self._engine.describe_end()
            raise self._dead

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead


class AsyncCoreClient:
    """A core in a process of its own, for an event loop (asyncio's own, or uvloop).

    Made by ``launch``, ``attach``, or from a ``Launch`` where no loop runs yet. Belongs to the loop
    in which ``start`` is called; may be collected while the loop runs, which ends the engine.
    """

    def __init__(self, engine: Launch | str, curve_keys: CurveClientKeys | None = None) -> None:
        self._engine = Engine(engine, curve_keys)
        self._hooks = LoopHooks()
        self._finalizer = weakref.finalize(self, _close_async, self._hooks, self._engine)
        self._calls: dict[int, tuple[AnyOperation, asyncio.Future[Any]]] = {}
        self._on_message: OnMessage | None = None
        self._on_dead: OnDead | None = None
        self._dead: EngineDeadError | None = None
        self._refusal: EngineError | None = None  # what ``_dead`` was made of
        self._is_drain_due = False
        self._turn_s = _TURN_S
        self._welcomed: asyncio.Event = asyncio.Event()

    def __reduce__(self) -> str:
        raise RuntimeError("an engine cannot be pickled: it is a connection to processes")

    @classmethod
    async def launch(cls, config: EngineConfig) -> "AsyncCoreClient":
        """Start an engine of our own; other tasks run while it loads.

        Raises:
            ConfigError, EngineStartError: as ``Launch.wait_ready``.
        """
        return await cls.attach(Launch(config))

    @classmethod
    async def attach(
        cls,
        engine: Launch | str,
        curve_keys: CurveClientKeys | None = None,
        timeout_s: float | None = None,
    ) -> "AsyncCoreClient":
        """Connect to an engine that runs, or to one of our own as soon as it is ready.

        Raises:
            ConfigError, EngineStartError: as ``Launch.wait_ready``, or it did not answer in time.
            ProtocolError: it speaks another protocol or schema.
        """
        if isinstance(engine, Launch):
            await _until_ready(engine)
        client = cls(engine, curve_keys)
        try:
            await client.connect(timeout_s)
        except BaseException:
            await client.aclose()
            raise
        return client

    @property
    def welcome(self) -> Welcome:
        """What the core said about itself."""
        welcome = self._engine.link.welcome
        assert welcome is not None, "not connected yet"
        return welcome

    async def connect(self, timeout_s: float | None = None) -> None:
        """Begin to listen in the running loop, and wait for the core's welcome."""
        self._listen()
        timeout_s = timeout_s or self._engine.welcome_limit_s
        try:
            await asyncio.wait_for(self._welcomed.wait(), timeout_s)
        except TimeoutError:
            raise _no_answer(self._engine.link.address, timeout_s) from None
        if self._refusal is not None:
            raise self._refusal

    def start(self, on_message: OnMessage, on_dead: OnDead) -> None:
        """Deliver messages from now on, in the running loop. ``on_dead`` is called once, at most.

        When ``on_message`` returns, its message counts as taken in.
        """
        self._on_message, self._on_dead = on_message, on_dead
        if self._dead is not None:
            self._hooks.loop.call_soon(on_dead, self._dead)
        self._drain_soon()

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Send a message to the core; never blocks.

        Raises:
            EngineDeadError: the core is gone.
            EngineOverloadedError: the core takes nothing and too much waits; nothing was sent.
        """
        self._check_alive()
        self._engine.link.send(message, frames)
        self._drain_soon()  # sending may have swallowed the descriptor's signal

    async def call(self, operation: AnyOperation) -> Any:
        """Run a control operation.

        Raises:
            EngineError: the operation failed.
            EngineDeadError: the core is gone.
        """
        self._check_alive()
        call = self._engine.link.make_call(operation)
        answer: asyncio.Future[Any] = self._hooks.loop.create_future()
        self._calls[call.call_id] = operation, answer
        try:
            self.send(call)
            return await answer
        finally:
            self._calls.pop(call.call_id, None)

    def close(self) -> None:
        """Leave the core, and end its processes if they are ours. May be repeated."""
        self._fail(EngineDeadError("the engine was closed"), tells=False)
        self._finalizer()

    async def aclose(self) -> None:
        """As ``close``; other tasks run while the processes end."""
        self._fail(EngineDeadError("the engine was closed"), tells=False)
        self._hooks.close()
        launch = self._engine.launch
        if launch is not None and self._finalizer.alive:
            launch.request_stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(until_readable(launch.pidfd), STOP_GRACE_S)
        self._finalizer()

    # ------------------------------------------------------------ inside the loop

    def _listen(self) -> None:
        hooks, link = self._hooks, self._engine.link
        hooks.open(asyncio.get_running_loop())
        hooks.add(link.channel.fileno(), weakly(self._drain))
        if self._engine.pidfd is not None:
            hooks.add(self._engine.pidfd, weakly(self._note_exit))
        hooks.repeat(weakly(self._tick), _TICK_S if link.has_pings else _SLOW_TICK_S)
        self._drain_soon()

    def _drain_soon(self) -> None:
        if not self._is_drain_due:
            self._is_drain_due = True
            self._hooks.loop.call_soon(weakly(self._drain))

    def _drain(self) -> None:
        self._is_drain_due = False
        link = self._engine.link
        ends_s = time.monotonic() + self._turn_s
        try:
            while time.monotonic() < ends_s:
                if self._dead is not None:
                    return
                received = link.receive()
                if link.welcome is not None:
                    self._welcomed.set()
                if received is None:
                    self._turn_s = _TURN_S
                    return
                self._deliver(*received)
                link.acknowledge()
        except EngineError as err:
            self._fail(err)
            return
        self._turn_s = min(2 * self._turn_s, _MAX_TURN_S)
        self._drain_soon()

    def _deliver(self, message: CoreToFrontend, frames: Frames) -> None:
        if not isinstance(message, CallResult):
            if self._on_message is not None:
                self._on_message(message, frames)
            return
        operation, answer = self._calls.pop(message.call_id, (None, None))
        if operation is None or answer is None or answer.done():
            return  # its caller was cancelled
        try:
            answer.set_result(read_result(operation, message))
        except EngineError as err:
            answer.set_exception(err)

    def _tick(self) -> None:
        try:
            self._engine.link.tick()
        except EngineError as err:
            self._fail(err)

    def _note_exit(self) -> None:
        """The process has ended: take in what it said last, then tell."""
        assert self._engine.pidfd is not None
        self._hooks.remove(self._engine.pidfd)
        self._hooks.loop.call_later(_LAST_WORDS_S, weakly(self._give_up))

    def _give_up(self) -> None:
        self._drain()
        if self._dead is None:
            self._fail(self._engine.describe_end())

    def _fail(self, error: EngineError, *, tells: bool = True) -> None:
        """Note the end once, and tell everybody who waits."""
        if self._dead is not None:
            return
        self._dead = _as_dead(error)
        self._refusal = error
        self._welcomed.set()
        for _, answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(str(error)))
        if tells and self._on_dead is not None:
            self._on_dead(self._dead)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead


def _close_async(hooks: LoopHooks, engine: Engine) -> None:
    hooks.close()
    engine.close()


async def _until_ready(launch: Launch) -> None:
    """As ``Launch.wait_ready``, while other tasks run."""
    try:
        while not launch.update():
            await until_readable(launch.fileno())
    except BaseException:
        launch.terminate()
        raise


def _no_answer(address: str, timeout_s: float) -> EngineStartError:
    return EngineStartError(
        f"no engine answered at {address} within {timeout_s:g} s: is one listening there, "
        f"and does it know our key?"
    )


def _as_dead(error: Exception) -> EngineDeadError:
    if isinstance(error, EngineDeadError):
        return error
    dead = EngineDeadError(f"{type(error).__name__}: {error}")
    dead.__cause__ = error
    return dead
