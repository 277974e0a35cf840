"""The core's only door to the workers: what an executor does, and the choice of one.

An executor starts the workers of one replica, carries plans to them and answers back, and ends
them. It runs in the engine core's process, so this module imports no torch; the in-process
executor, which does, is imported only when it was chosen.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ipc.config import EngineConfig
from ipc.errors import ConfigError
from ipc.messages import LoadProgress, ModelRunnerOutput, SchedulerOutput, WorkerReady
from ipc.operations import AnyOperation

Frames = Sequence[bytes | memoryview]
OnProgress = Callable[[LoadProgress], None]


class Executor(Protocol):
    """All workers of one replica behind one interface. Used by one thread.

    Plans are answered exactly once each, in the order they were submitted. Once a worker is gone
    every method but ``shutdown`` raises ``EngineDeadError``.
    """

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Start the workers and wait until each is ready; the readiness with fewest blocks.

        Raises:
            EngineStartError: a worker failed; names its rank, the stage and the real cause.
            ConfigError: a value cannot work on this machine.
        """
        ...

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Hand one step to the workers without waiting for it."""
        ...

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """The next answer, in step order; None when the time is over. None waits for ever.

        Raises:
            EngineDeadError: a worker is gone; carries the cause.
        """
        ...

    def call(self, operation: AnyOperation) -> list[Any]:
        """Run a control operation on every rank, behind the steps submitted so far.

        One result per rank: None for Sleep, WakeUp and StartProfile, a list of file names for
        StopProfile, WorkerInfo for CheckWorkers. Steps answered meanwhile are kept.

        Raises:
            RequestError: the operation failed on a rank, and the rank lives on.
        """
        ...

    @property
    def channels(self) -> list[Any]:
        """What ``ipc.channel.wait`` must watch for answers and deaths; empty in-process."""
        ...

    def check_health(self) -> None:
        """Raise ``EngineDeadError`` when a worker is gone."""
        ...

    def shutdown(self) -> None:
        """End the workers and free what they held. May be called more than once."""
        ...


def make_executor(config: EngineConfig) -> Executor:
    """The executor that the config asks for; nothing is started yet.

    Raises:
        ConfigError: the choice does not exist or does not fit the number of workers.
    """
    parallel = config.parallel_config
    if parallel.executor_class is not None:
        return _injected(parallel.executor_class)(config)
    backend = parallel.distributed_executor_backend
    if backend is None:
        backend = "uniproc" if parallel.world_size == 1 else "mp"
    if backend == "uniproc":
        if parallel.world_size > 1:
            raise ConfigError(
                f"--distributed-executor-backend uniproc runs one worker, "
                f"but {parallel.world_size} are asked for; use mp"
            )
        from executor.uniproc import UniprocExecutor

        return UniprocExecutor(config)
    if backend == "mp":
        from executor.multiproc import MultiprocExecutor

        return MultiprocExecutor(config)
    if backend == "ray":
        raise ConfigError("--distributed-executor-backend ray is not supported yet; use mp")
    raise ConfigError(f"--distributed-executor-backend must be uniproc, mp or ray, got {backend!r}")


def _injected(path: str) -> Callable[[EngineConfig], Executor]:
    """The class named "package.module:Class"."""
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as err:
        raise ConfigError(
            f"executor_class must be 'package.module:Class' and importable, got {path!r}: {err}"
        ) from err
    if not callable(found):
        raise ConfigError(f"executor_class must name a class, {path!r} is {type(found).__name__}")
    chosen: Callable[[EngineConfig], Executor] = found
    return chosen
