"""From a config to a core that can serve: executor, model, core, in this order."""

from collections.abc import Callable
from dataclasses import dataclass

from engine_core.core import EngineCore
from engine_core.core_server import make_welcome
from engine_core.flight_record import FlightRecord
from engine_core.flight_recorder import make_core
from executor.executor import Executor, OnProgress, make_executor
from ipc.config import EngineConfig
from ipc.messages import Welcome

MakeExecutor = Callable[[EngineConfig], Executor]


@dataclass(frozen=True)
class StartedCore:
    """A core, the executor that it owns, and what frontends learn about it."""

    core: EngineCore
    executor: Executor
    welcome: Welcome


def start_core(
    config: EngineConfig,
    *,
    on_progress: OnProgress,
    epoch: int = 0,
    record: FlightRecord | None = None,
    executor_class: MakeExecutor | None = None,
) -> StartedCore:
    """Start the workers and put a core before them; on failure nothing is left running.

    Raises:
        ConfigError: a value cannot work on this machine.
        EngineStartError: a worker failed; names its rank, the stage and the real cause.
    """
    executor = make_executor(config) if executor_class is None else executor_class(config)
    try:
        ready = executor.start(on_progress)
        core = make_core(config, executor, ready, epoch=epoch, record=record)
    except BaseException:
        executor.shutdown()
        raise
    return StartedCore(core, executor, make_welcome(config, core.limits, ready.model_digest, epoch))
