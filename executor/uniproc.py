"""The executor whose one worker lives in the caller's process.

A submitted step is executed at once. On a CPU it is then done; on a GPU it runs while the caller
goes on, as with worker processes.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from executor.device import is_device_error
from executor.early_start import EarlyStart
from executor.executor import OnProgress
from executor.failures import DEVICE_STAGE, dead_error, start_error, worker_error
from executor.model_runner import PendingStep
from executor.worker import Worker
from ipc.config import EngineConfig
from ipc.errors import EngineDeadError, EngineError
from ipc.messages import ModelRunnerOutput, SchedulerOutput, WorkerError, WorkerReady
from ipc.operations import AnyOperation
from ipc.tensors import Frames

MakeWorker = Callable[[EngineConfig, int], Worker]


class UniprocExecutor:
    """Owns one worker and the steps that were not collected yet."""

    def __init__(self, config: EngineConfig, make_worker: MakeWorker = Worker) -> None:
        self._config = config
        self._make_worker = make_worker
        self._worker: Worker | None = None
        self._steps: deque[PendingStep] = deque()
        self._dead: EngineDeadError | None = None

    @property
    def channels(self) -> list[Any]:
        """Nothing to wait for: ``receive`` blocks on the step itself."""
        return []

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Start the worker here.

        Raises:
            ConfigError: a value cannot work on this machine.
            EngineStartError: names the stage and the real cause.
        """
        worker = self._make_worker(self._config, 0)
        try:
            ready = worker.start(on_progress, early=EarlyStart(self._config, 0))
        except Exception as err:  # whatever a driver or a checkpoint makes of a start
            raise start_error(_describe(worker, err)) from err
        self._worker = worker
        return ready

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Execute one step.

        Raises:
            EngineDeadError: it failed, now or before.
        """
        worker = self._alive()
        try:
            self._steps.append(worker.execute(plan, frames))
        except Exception as err:  # the process loop of an in-process worker
            raise self._die(err) from err

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """The oldest step's answer; None when no step is under way.

        Raises:
            EngineDeadError: the step failed.
        """
        self._alive()
        if not self._steps:
            return None
        try:
            return self._steps.popleft().resolve()
        except Exception as err:  # an asynchronous failure shows here
            raise self._die(err) from err

    def call(self, operation: AnyOperation) -> list[Any]:
        """Run a control operation.

        Raises:
            RequestError: it cannot be done now.
            EngineDeadError: it failed in the middle.
        """
        worker = self._alive()
        try:
            return [worker.call(operation)]
        except EngineError:
            raise
        except Exception as err:  # half done: the worker cannot be trusted any more
            raise self._die(err) from err

    def check_health(self) -> None:
        """Raise ``EngineDeadError`` when the worker has failed."""
        self._alive()

    def shutdown(self) -> None:
        """Drop the worker and with it the device's memory."""
        self._steps.clear()
        self._worker = None
        if self._dead is None:
            self._dead = EngineDeadError("the executor was shut down")

    def _alive(self) -> Worker:
        if self._dead is not None:
            raise self._dead
        if self._worker is None:
            raise EngineDeadError("the executor was not started")
        return self._worker

    def _die(self, err: Exception) -> EngineDeadError:
        assert self._worker is not None
        self._dead = dead_error(_describe(self._worker, err))
        return self._dead


def _describe(worker: Worker, err: Exception) -> WorkerError:
    stage = DEVICE_STAGE if is_device_error(err) else worker.phases.stage
    return worker_error(0, stage, err)
