"""Starting a core: in order, and with nothing left running when a stage fails."""

from typing import Any

import pytest

from engine_core.core_process import with_own_loop, with_worker_processes
from engine_core.start import start_core
from executor.executor import OnProgress
from ipc.config import EngineConfig, decode_config
from ipc.errors import ConfigError, EngineStartError
from ipc.messages import LoadProgress, WorkerReady
from tests.engine_core.fake_core import make_config
from tests.engine_core.scripted_executor import ScriptedExecutor


class WatchedExecutor(ScriptedExecutor):
    """Notes whether it was shut down; fails on request."""

    error: Exception | None = None
    num_blocks = 1024

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.num_shutdowns = 0

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Be ready, or not."""
        if self.error is not None:
            raise self.error
        return super().start(on_progress)

    def shutdown(self) -> None:
        """Count."""
        self.num_shutdowns += 1


def test_a_started_core_welcomes_with_its_own_limits_and_epoch() -> None:
    progress: list[LoadProgress] = []
    started = start_core(
        make_config(), on_progress=progress.append, epoch=4, executor_class=WatchedExecutor
    )

    assert started.welcome.epoch == 4
    assert started.welcome.limits == started.core.limits
    assert decode_config(started.welcome.config) == make_config()
    assert [item.phase for item in progress] == ["loading weights"]


@pytest.mark.parametrize("error", [EngineStartError("rank 0"), ConfigError("--x"), ValueError()])
def test_a_failed_start_shuts_the_executor_down(error: Exception) -> None:
    made: list[WatchedExecutor] = []

    def make(config: EngineConfig) -> WatchedExecutor:
        made.append(WatchedExecutor(config))
        made[0].error = error
        return made[0]

    with pytest.raises(type(error)):
        start_core(make_config(), on_progress=lambda _: None, executor_class=make)
    assert made[0].num_shutdowns == 1


@pytest.mark.parametrize(
    ("given", "used"), [(None, "mp"), ("uniproc", "uniproc"), ("mp", "mp"), ("ray", "ray")]
)
def test_workers_have_processes_of_their_own_unless_the_user_says_otherwise(
    given: str | None, used: Any
) -> None:
    config = with_worker_processes(make_config(distributed_executor_backend=given))

    assert config.parallel_config.distributed_executor_backend == used


def test_an_executor_of_the_users_own_is_left_alone() -> None:
    config = make_config(executor_class="a:B")

    assert with_worker_processes(config) == config


def test_a_core_in_a_process_of_its_own_may_plan_late() -> None:
    assert not make_config().scheduler_config.plans_late
    assert with_own_loop(make_config()).scheduler_config.plans_late
