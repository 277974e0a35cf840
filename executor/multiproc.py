"""The ``mp`` executor: one process per rank on this host, behind one channel.

Runs in the core's process and imports no torch. Every rank gets the same messages; the output rank
answers steps. A worker's death is a group death: whatever ends one, its mates are killed, and every
later use of the executor raises the cause.
"""

import logging
import secrets
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from executor.executor import OnProgress
from executor.failures import dead_error, start_error
from executor.step_watch import StepWatch
from executor.worker_process import WorkerProcess, find_killed, identity_of, killed_error
from ipc import errors
from ipc.channel import RouterChannel, wait
from ipc.config import EngineConfig, encode_config
from ipc.errors import EngineDeadError, EngineError, EngineStartError
from ipc.messages import (
    Call,
    CallResult,
    LoadProgress,
    ModelRunnerOutput,
    SchedulerOutput,
    Shutdown,
    WorkerError,
    WorkerInfo,
    WorkerReady,
    worker_to_core_decoder,
)
from ipc.operations import AnyOperation, CheckWorkers
from ipc.stacks import ask_for_stacks, is_stopped
from ipc.tensors import Frames

SHUTDOWN_S = 5.0  # for a worker to end by itself
KILL_S = 10.0  # for the kernel to end it
_LOOK_S = 1.0  # how often to look whether silent workers are stuck

logger = logging.getLogger(__name__)


class MultiprocExecutor:
    """Owns the worker processes and the channel to them. Used by one thread."""

    def __init__(self, config: EngineConfig, module: str = "executor") -> None:
        self._config = config
        self._module = module  # run as ``python -m``
        self._router: RouterChannel[Any] = RouterChannel(worker_to_core_decoder)
        self._token = secrets.token_hex(16)  # in the name of every channel of our own workers
        self._workers: list[WorkerProcess] = []
        self._ready: dict[int, WorkerReady] = {}
        self._steps = StepWatch(
            config.parallel_config.iteration_timeout_s,
            counts_processor_time=config.device_config.device == "cpu",
        )
        self._results: dict[int, dict[int, CallResult]] = {}  # by call and rank
        self._last_call_id = 0
        self._last_words: WorkerError | None = None
        self._dead: EngineDeadError | None = None
        self._on_progress: OnProgress | None = None

    @property
    def channels(self) -> list[Any]:
        """The channel and every worker's pidfd."""
        return [self._router, *(worker.pidfd for worker in self._workers if worker.pidfd >= 0)]

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [worker.pid for worker in self._workers]

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Start every worker and wait until all are ready.

        Raises:
            ConfigError: a value cannot work on this machine.
            EngineStartError: names the rank, the stage and the real cause. No process is left.
        """
        self._on_progress = on_progress
        address = self._router.bind()
        world_size = self._config.parallel_config.world_size
        try:
            for rank in range(world_size):
                self._workers.append(
                    WorkerProcess(
                        rank=rank,
                        module=self._module,
                        address=address,
                        rendezvous=str(Path(address.removeprefix("ipc://")).with_name("ranks")),
                        config=encode_config(self._config),
                        token=self._token,
                        prefixed=world_size > 1,
                    )
                )
            while len(self._ready) < world_size:
                wait(self.channels, None)
                self._drain()
                if self._last_words is not None:
                    raise start_error(self._last_words)
                for worker in self._workers:
                    if worker.has_exited():
                        raise EngineStartError(
                            f"worker {worker.rank} {worker.describe_exit()} before it was ready; "
                            f"its own output says more",
                            killed_by=worker.killed_by(),
                        )
        except BaseException:
            self.shutdown()
            raise
        return min(self._ready.values(), key=lambda ready: ready.num_gpu_blocks)

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Send one step to every rank.

        Raises:
            EngineDeadError: a worker is gone.
        """
        self._send(plan, frames)
        self._steps.expect()

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """The next answer, in step order; None when the time is over.

        Raises:
            EngineDeadError: a worker is gone or stuck; carries the cause.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._drain()
            if (answer := self._steps.take()) is not None:
                return answer
            self._look_now_and_then()
            remaining_s = _LOOK_S if deadline is None else deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            wait(self.channels, min(remaining_s, _LOOK_S))

    def call(self, operation: AnyOperation) -> list[Any]:
        """Run a control operation on every rank; one result per rank.

        Raises:
            RequestError: it cannot be done now.
            EngineDeadError: a worker is gone or stuck.
        """
        is_quick = isinstance(operation, CheckWorkers)  # the others may move weights for minutes
        self._last_call_id += 1
        call_id = self._last_call_id
        results = self._results[call_id] = {}
        try:
            self._send(Call(call_id, operation))
            if is_quick:
                self._steps.expect()
            while len(results) < len(self._workers):
                wait(self.channels, _LOOK_S)
                self._drain()
                if len(results) < len(self._workers):
                    self.check_health()
            if is_quick:
                self._steps.note_answer()
        finally:
            del self._results[call_id]
        return [_value_of(operation, results[rank]) for rank in sorted(results)]

    def check_health(self) -> None:
        """Raise ``EngineDeadError`` when a worker is gone, or has been stuck for too long."""
        if self._dead is not None:
            raise self._dead
        if not self._workers:
            raise EngineDeadError("the executor was not started")
        if self._last_words is not None:
            # A rank whose mate was killed fails too, and may say so before the mate is seen dead.
            self._die(find_killed(self._workers) or dead_error(self._last_words))
        for worker in self._workers:
            if worker.has_exited():
                self._drain()  # its last words may have come with its end
                words = self._last_words
                self._die(killed_error(worker) if words is None else dead_error(words))
        if (stuck := self._steps.describe_stuck(self._workers)) is not None:
            ask_for_stacks(w.pid for w in self._workers if not is_stopped(w.pid))
            self._die(EngineDeadError(stuck))

    def _look_now_and_then(self) -> None:
        """Check the workers if that was not done a moment ago: it costs a system call for each."""
        if self._last_words is not None or self._steps.is_look_due():
            self.check_health()

    def shutdown(self) -> None:
        """Ask the workers to end, then end them. No process is left when it returns."""
        is_orderly = self._dead is None and len(self._ready) == len(self._workers)
        if self._dead is None:
            self._dead = EngineDeadError("the executor was shut down")
        if is_orderly:
            for worker in self._workers:
                self._router.send(identity_of(self._token, worker.rank), Shutdown())
            deadline = time.monotonic() + SHUTDOWN_S
            for worker in self._workers:
                worker.reap(max(0.0, deadline - time.monotonic()))
        self._end_group()
        self._router.close()

    def _send(self, message: SchedulerOutput | Call, frames: Frames = ()) -> None:
        self._look_now_and_then()
        if self._dead is not None:
            raise self._dead
        for worker in self._workers:
            if not self._router.send(identity_of(self._token, worker.rank), message, frames):
                self.check_health()
                self._die(EngineDeadError(f"worker {worker.rank} takes no messages any more"))

    def _drain(self) -> None:
        """Sort everything that has arrived."""
        if self._dead is not None:
            return
        while (received := self._router.receive()) is not None:
            peer, message, frames = received
            if not peer.startswith(self._token.encode()):
                continue  # a stranger found the socket: its words are nobody's
            match message:
                case ModelRunnerOutput():
                    self._steps.keep(message, frames)
                case CallResult():
                    self._results.get(message.call_id, {})[_rank_of(peer)] = message
                case LoadProgress():
                    if self._on_progress is not None:
                        self._on_progress(message)
                case WorkerReady():
                    self._ready[message.rank] = message
                case WorkerError():
                    logger.error("worker %d failed:\n%s", message.rank, message.traceback)
                    self._last_words = self._last_words or message

    def _die(self, cause: EngineDeadError) -> NoReturn:
        self._dead = cause
        self._end_group()
        raise cause

    def _end_group(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            if not worker.reap(KILL_S):
                logger.error("worker %d (process %d) does not end", worker.rank, worker.pid)


def _rank_of(peer: bytes) -> int:
    return int(peer.rpartition(b"-")[2])


def _value_of(operation: AnyOperation, result: CallResult) -> object:
    """A rank's result, or the error that it reported."""
    if result.error is not None or result.result is None:
        kind = getattr(errors, result.error_kind, EngineError)
        raise kind(result.error)
    if isinstance(operation, CheckWorkers):
        return msgspec.msgpack.decode(result.result, type=WorkerInfo)
    return msgspec.msgpack.decode(result.result)
