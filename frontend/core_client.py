"""The frontend's door to an engine core in a process of its own, with and without an event loop.

The clients (``inproc_client.py`` holds a third) have one vocabulary: messages in, messages out,
typed calls. Credits, heartbeats, the discovery of a dead core and the way to its successor
happen inside. No threads, no signal handlers.
"""

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from frontend.core_engine import Engine
from frontend.core_link import HELLO_EVERY_S, Received, read_result
from frontend.inproc_client import as_dead
from frontend.launcher import STOP_GRACE_S, Launch
from frontend.loop_hooks import LoopHooks, until_readable, weakly
from frontend.pending_calls import PendingCalls
from ipc.channel import wait
from ipc.config import EngineConfig
from ipc.curve import CurveClientKeys
from ipc.errors import EngineDeadError, EngineError, EngineRestartingError, EngineStartError
from ipc.messages import CallResult, CoreToFrontend, FrontendToCore, Welcome
from ipc.operations import AnyOperation
from ipc.processes import is_readable
from ipc.tensors import Frames

_TICK_S = 1.0
_SLOW_TICK_S = 10.0  # where nothing but messages that could not leave needs a look
_HANDSHAKE_TICK_S = 0.05  # a connection that comes about does not always wake us
_LAST_WORDS_S = 0.05  # for what a dead core sent before it died
# How long messages are taken in before other tasks of the event loop get their turn. While more
# come than that takes in, turns grow: each stream then gets more at once, which costs less.
_TURN_S, _MAX_TURN_S = 0.01, 0.08

OnMessage = Callable[[CoreToFrontend, Frames], None]
OnDead = Callable[[EngineDeadError], None]


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
        self._engine.send(message, frames)

    def receive(self, timeout_s: float | None) -> tuple[CoreToFrontend, Frames] | None:
        """The next message, or None after ``timeout_s`` (0: at once; None: never).

        What was received before counts as taken in: its credits go back to the core. A
        ``Welcome`` means that the core was lost and this one is in its place: it knows nothing
        of what was sent before.

        Raises:
            EngineDeadError: the core is gone; carries the cause.
        """
        self._check_alive()
        self._engine.acknowledge()
        if self._received:
            return self._received.popleft()
        return self._receive_new(None if timeout_s is None else time.monotonic() + timeout_s)

    def call(self, operation: AnyOperation) -> Any:
        """Run a control operation and wait for its answer; other messages are kept.

        While the engine restarts this waits; the operation is for the new core.

        Raises:
            EngineError: the operation failed.
            EngineRestartingError: the core was lost before it had answered.
            EngineDeadError: the engine ended.
        """
        self._check_alive()
        engine = self._engine
        self._wait(0)
        while engine.loss is not None:
            if (received := self._take()) is not None:
                self._received.append(received)
            else:
                self._wait(None)
        call = engine.make_call(operation)
        engine.send(call)
        while True:
            received = self._take()
            if received is None:
                if engine.loss is not None:
                    raise engine.restarting_error()
                self._wait(None)
                continue
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
        while (welcome := self._engine.welcome) is None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise no_answer(self._engine.link.address, timeout_s)
            received = self._take()
            assert received is None, "a core spoke before its welcome"
            if self._engine.welcome is None:
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
        """What can be had now; the moves of a connection from one core to the next happen here."""
        engine = self._engine
        try:
            received = engine.receive()
            if received is None:
                engine.tick()
            if engine.needs_settling:
                engine.settle()
        except EngineDeadError as err:
            self._dead = err
            raise
        if isinstance(message := received and received[0], Welcome):
            self.welcome = message
        return received

    def _wait(self, timeout_s: float | None) -> None:
        """Sleep until something arrives. Messages that a dying core sent are still delivered."""
        engine = self._engine
        if engine.needs_ticks:
            tick_s = _TICK_S if engine.loss is None else HELLO_EVERY_S
            timeout_s = tick_s if timeout_s is None else min(timeout_s, tick_s)
        ready = wait([engine.link.channel, *engine.pidfds], timeout_s)
        if engine.link.channel in ready or not ready or wait([engine.link.channel], _LAST_WORDS_S):
            return
        try:
            if engine.end_pidfd in ready:
                raise engine.describe_end()
            engine.lose()
            engine.settle()
        except EngineDeadError as err:
            self._dead = err
            raise

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
        self._calls = PendingCalls()
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
        welcome = self._engine.welcome
        assert welcome is not None, "not connected yet"
        return welcome

    @property
    def restarting(self) -> EngineRestartingError | None:
        """Set while there is no core, and another one is awaited."""
        return None if self._engine.loss is None else self._engine.restarting_error()

    async def connect(self, timeout_s: float | None = None) -> None:
        """Begin to listen in the running loop, and wait for the core's welcome."""
        self._hooks.open(asyncio.get_running_loop())
        self._move()
        timeout_s = timeout_s or self._engine.welcome_limit_s
        try:
            await asyncio.wait_for(self._welcomed.wait(), timeout_s)
        except TimeoutError:
            raise no_answer(self._engine.link.address, timeout_s) from None
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
        self._engine.send(message, frames)
        self._drain_soon()  # sending may have swallowed the descriptor's signal

    async def call(self, operation: AnyOperation) -> Any:
        """Run a control operation.

        Raises:
            EngineError: the operation failed.
            EngineRestartingError: there is no core now, or it was lost before it had answered.
            EngineDeadError: the engine ended.
        """
        self._check_alive()
        call = self._engine.make_call(operation)
        answer = self._calls.open(call)
        try:
            self.send(call)
            return await answer
        finally:
            self._calls.close(call)

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

    def _drain_soon(self) -> None:
        if not self._is_drain_due:
            self._is_drain_due = True
            self._hooks.loop.call_soon(weakly(self._drain))

    def _drain(self) -> None:
        self._is_drain_due = False
        engine = self._engine
        ends_s = time.monotonic() + self._turn_s
        try:
            while time.monotonic() < ends_s:
                if self._dead is not None:
                    return
                received = engine.receive()
                if engine.needs_settling:
                    self._move()
                if received is None:
                    self._turn_s = _TURN_S
                    return
                if isinstance(received[0], CallResult):
                    self._calls.answer(received[0])
                elif self._on_message is not None:
                    self._on_message(*received)
                engine.acknowledge()
        except EngineError as err:
            self._fail(err)
            return
        self._turn_s = min(2 * self._turn_s, _MAX_TURN_S)
        self._drain_soon()

    def _tick(self) -> None:
        try:
            self._engine.tick()
            if self._engine.needs_settling:
                self._move()
        except EngineError as err:
            self._fail(err)

    def _note_exit(self) -> None:
        """A process has ended: take in what it said last, then see what that means."""
        for pidfd in self._engine.pidfds:
            if is_readable(pidfd):
                self._hooks.remove(pidfd)
        self._hooks.loop.call_later(_LAST_WORDS_S, weakly(self._face_exit))

    def _face_exit(self) -> None:
        self._drain()
        if self._dead is not None:
            return
        end_pidfd = self._engine.end_pidfd
        if end_pidfd is not None and is_readable(end_pidfd):
            self._fail(self._engine.describe_end())
            return
        try:
            self._engine.lose()
            self._move()
        except EngineDeadError as err:
            self._fail(err)

    def _move(self) -> None:
        """Follow the engine from one core to the next: watch what is to be watched now."""
        engine, hooks = self._engine, self._hooks
        if engine.welcome is not None:
            self._welcomed.set()
        hooks.clear()
        engine.settle()
        hooks.add(engine.link.channel.fileno(), weakly(self._drain))
        for pidfd in engine.pidfds:
            hooks.add(pidfd, weakly(self._note_exit))
        interval_s = _TICK_S if engine.link.has_pings else _SLOW_TICK_S
        hooks.repeat(weakly(self._tick), interval_s if engine.link.welcome else HELLO_EVERY_S)
        if engine.loss is not None:
            self._calls.fail_all(engine.restarting_error())
        self._drain_soon()

    def _fail(self, error: EngineError, *, tells: bool = True) -> None:
        """Note the end once, and tell everybody who waits."""
        if self._dead is not None:
            return
        self._dead = as_dead(error)
        self._refusal = error
        self._welcomed.set()
        self._calls.fail_all(EngineDeadError(str(error)))
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


def no_answer(address: str, timeout_s: float) -> EngineStartError:
    """The error for an address that does not say Welcome."""
    return EngineStartError(
        f"no engine answered at {address} within {timeout_s:g} s: is one listening there, "
        f"and does it know our key?"
    )
