"""The engine core's loop: messages in, steps through the executor, outputs out to frontends.

One thread, no locks. It sleeps in one place, ``_rest``, until a frontend, a worker or a signal has
something to say. It knows who is connected and how much each may still be sent; what requests
are and what runs next is ``EngineCore``'s.
"""

import gc
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine_core.dispatch import answer_call, dispatch
from engine_core.drain import Drain
from engine_core.outbox import FrontendState
from engine_core.progress import Phase, ProgressPage, make_page_file
from ipc.channel import RouterChannel, wait
from ipc.config import EngineConfig, encode_config
from ipc.errors import ExitCode, ProtocolError
from ipc.messages import (
    PROTOCOL_VERSION,
    Ack,
    Call,
    CoreToFrontend,
    EngineDraining,
    EngineFailed,
    EngineOutputs,
    FrontendToCore,
    Goodbye,
    Heartbeat,
    Hello,
    Limits,
    Refused,
    Welcome,
    schema_hash,
)
from ipc.processes import SignalWatch
from ipc.tensors import Frames

if TYPE_CHECKING:
    from engine_core.core import EngineCore
    from executor.executor import Executor

SILENCE_S = 10.0  # a frontend silent for so long is asked whether it is still there
MAX_FRONTENDS = 1024

_MAX_MESSAGES_PER_PASS = 256  # then a step: a flood must not stop the others' tokens
_SETTLED_S = 1.0  # idle for so long: collect garbage
_BEAT_S = 0.25  # the longest sleep with open requests: whoever watches wants to see us move
_POLL_S = 0.001  # a wait for messages ends up to so much late
_IDLE_S = 5.0  # the longest sleep while there are frontends to look after
_GC_THRESHOLDS = (100_000, 50, 100)  # in case a core is never idle

logger = logging.getLogger(__name__)


class CoreServer:
    """Owns the channel to the frontends and the record of each.

    A peer is served from its ``Hello`` to its ``Goodbye``, its disconnection, or the core's end;
    whichever comes first frees its requests.
    """

    def __init__(
        self,
        core: "EngineCore",
        executor: "Executor",
        channel: "RouterChannel[FrontendToCore]",
        welcome: Welcome,
        signals: SignalWatch,
        drain: Drain,
        progress: ProgressPage | None = None,
    ) -> None:
        self._core = core
        self._executor = executor
        self._channel = channel
        self._welcome = welcome
        self._signals = signals
        self._drain = drain
        self._progress = ProgressPage(make_page_file()) if progress is None else progress
        self._frontends: dict[bytes, FrontendState] = {}
        self._next_check_s = 0.0
        self._has_garbage = False

    def run(self) -> None:
        """Serve until a termination signal, and the drain after it; frontends are told."""
        while (reason := self._stop_reason()) is None:
            self._beat(Phase.STEPPING, has_work=True)
            began_s = time.monotonic()
            has_moved = self._drain_frontends()
            has_moved |= self._step()
            if began_s >= self._next_check_s:
                self._drop_departed(SILENCE_S)
            if not has_moved:
                self._rest(began_s)
        self._publish(self._core.drain_outputs())
        self.announce_end(reason, ExitCode.CLEAN)

    def _stop_reason(self) -> str | None:
        """Why to end now, if so; the first signal makes everybody know that the end is near."""
        signals = self._signals.take()
        if not signals and self._drain.ends_s is None:
            return None
        owes_outputs = any(state.pending is not None for state in self._frontends.values())
        reason = self._drain.advance(signals, time.monotonic(), owes_outputs=owes_outputs)
        if reason is None and signals:
            for peer in list(self._frontends):
                self._send(peer, EngineDraining(self._welcome.epoch, self._drain.reason))
        return reason

    def announce_end(self, reason: str, exit_code: ExitCode) -> None:
        """Say the last words to every frontend, after what waited for its credits."""
        failed = EngineFailed(self._welcome.epoch, reason, exit_code)
        for peer, frontend in self._frontends.items():
            if frontend.pending is not None:
                self._channel.send(peer, frontend.pending)
            self._channel.send(peer, failed)

    def _step(self) -> bool:
        """Take in what was computed and plan what can be planned; False when nothing moved.

        The workers wait for plans, so these leave before the outputs do.
        """
        results = []
        while (answer := self._executor.receive(0)) is not None:
            results.append(self._core.take_output(*answer))
        has_submitted = self._core.submit_steps()
        for result in results:
            self._publish(result)
        self._publish(self._core.drain_outputs())
        return has_submitted or bool(results)

    def _rest(self, tried_s: float) -> None:
        """Sleep until there is something to do; at ``tried_s`` there was nothing to plan."""
        timeout_s = _IDLE_S if self._frontends else None
        if self._core.has_unfinished:
            timeout_s = _BEAT_S
        elif self._has_garbage:
            timeout_s = _SETTLED_S
        for moment_s in (self._core.gate.next_deadline_s, self._drain.ends_s):
            if moment_s is not None:
                left_s = max(0.0, moment_s - time.monotonic())
                timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        self._beat(Phase.STEPPING, has_work=self._core.has_unfinished)
        due_s = self._core.scheduler.pipeline.plan_due_s
        if due_s is not None and due_s > tried_s:
            left_s = due_s - time.monotonic()
            if left_s < _POLL_S:
                time.sleep(max(0.0, left_s))
                return
            timeout_s = min(timeout_s or left_s, left_s - _POLL_S)
        ready = wait([self._channel, *self._executor.channels, self._signals.fileno()], timeout_s)
        if not ready and self._has_garbage and not self._core.has_unfinished:
            gc.collect()
            self._has_garbage = False

    def _beat(self, phase: Phase, *, has_work: bool) -> None:
        self._progress.write(phase, self._core.scheduler.num_planned_steps, has_work)

    # ------------------------------------------------------------ frontends

    def _drain_frontends(self) -> bool:
        for num_handled in range(_MAX_MESSAGES_PER_PASS):
            received = self._channel.receive()
            if received is None:
                return num_handled > 0
            self._handle(*received)
        return True

    def _handle(self, peer: bytes, message: FrontendToCore, frames: Frames) -> None:
        self._has_garbage = True
        if isinstance(message, Hello):
            self._greet(peer, message)
            return
        frontend = self._frontends.get(peer)
        if frontend is None:
            if not isinstance(message, Goodbye):
                self._channel.send(peer, Refused("the engine does not know you: say Hello first"))
            return
        frontend.last_heard_s = time.monotonic()
        frontend.has_spoken = True
        match message:
            case Ack():
                due = frontend.acknowledge(message.num_outputs, self._welcome.limits.credits)
                if due is not None:
                    self._send(peer, due)
            case Heartbeat():
                self._send(peer, message)
            case Goodbye():
                self._remove(peer, "it said goodbye")
            case Call():
                self._beat(Phase.OPERATION, has_work=True)
                self._send(peer, answer_call(self._core, message))
            case _:
                try:
                    dispatch(self._core, peer, message, frames)
                except ProtocolError as err:
                    logger.warning("%.64r sent an unusable tensor: %.200s", frontend.name, err)

    def _greet(self, peer: bytes, hello: Hello) -> None:
        if (known := self._frontends.get(peer)) is not None and not known.has_spoken:
            return  # it said Hello again while we were starting: it was answered
        reason = find_mismatch(hello)
        if len(self._frontends) >= MAX_FRONTENDS:
            self._drop_departed(0.0)
        if peer in self._frontends:
            self._remove(peer, "it starts again")
        elif reason is None and len(self._frontends) >= MAX_FRONTENDS:
            reason = f"{MAX_FRONTENDS} frontends are attached already"
        if reason is not None:
            logger.warning("refused %.64r (pid %d): %.200r", hello.name, hello.pid, reason)
            self._channel.send(peer, Refused(reason))
            return
        self._frontends[peer] = FrontendState(
            peer=peer,
            name=hello.name,
            pid=hello.pid,
            credits=self._welcome.limits.credits,
            last_heard_s=time.monotonic(),
        )
        self._send(peer, self._welcome)
        if self._drain.ends_s is not None:
            self._send(peer, EngineDraining(self._welcome.epoch, self._drain.reason))

    def _drop_departed(self, silence_s: float) -> None:
        """Find out which silent frontends are gone: sending to those fails.

        A frontend whose process is stopped or busy for long is still connected, and keeps its
        requests: being paused in a debugger is no death.
        """
        now = time.monotonic()
        self._next_check_s = now + _IDLE_S
        for frontend in list(self._frontends.values()):
            if now - frontend.last_heard_s < silence_s:
                continue
            if not self._channel.probe(frontend.peer, Heartbeat(now)):
                self._remove(frontend.peer, "its connection is gone")

    def _publish(self, results: Iterable[tuple[bytes, EngineOutputs, Frames]]) -> None:
        for peer, outputs, frames in results:
            frontend = self._frontends.get(peer)
            due = None if frontend is None else frontend.offer(outputs, frames)
            if due is not None:
                self._send(peer, due, frames)

    def _send(self, peer: bytes, message: CoreToFrontend, frames: Frames = ()) -> None:
        if not self._channel.send(peer, message, frames):
            self._remove(peer, "it is gone or takes nothing")

    def _remove(self, peer: bytes, reason: str) -> None:
        frontend = self._frontends.pop(peer, None)
        if frontend is not None:
            logger.info("frontend %.64r (pid %d) left: %s", frontend.name, frontend.pid, reason)
            self._core.remove_client(peer)


def make_welcome(config: EngineConfig, limits: Limits, model_digest: str, epoch: int) -> Welcome:
    """What every frontend learns about this core."""
    return Welcome(
        protocol_version=PROTOCOL_VERSION,
        schema_hash=schema_hash(),
        epoch=epoch,
        model_digest=model_digest,
        limits=limits,
        config=encode_config(config),
    )


def find_mismatch(hello: Hello) -> str | None:
    """Why a frontend cannot be served, with both sides' values; None when it can."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return f"protocol version {hello.protocol_version} there, {PROTOCOL_VERSION} here"
    if hello.schema_hash != schema_hash():
        return (
            f"message schema {hello.schema_hash} there, {schema_hash()} here: "
            f"both sides must run the same version"
        )
    return None


def settle_garbage_collection() -> None:
    """Take what start-up made out of the collector's sight, and make it run seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
