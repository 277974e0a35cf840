"""The in-process executor: the same interface, no process. CPU only, the fake model."""

import pytest

from executor.uniproc import UniprocExecutor
from ipc.config import EngineConfig
from ipc.errors import ConfigError, EngineDeadError, EngineStartError, RequestError
from ipc.operations import CheckWorkers, IsPaused, Sleep, StopProfile, WakeUp
from tests.executor.builders import make_new_row, make_plan
from tests.executor.configs import make_config
from tests.executor.fake_model import next_token
from tests.executor.fake_worker import FAILING_TOKEN, make_worker


def make_started(config: EngineConfig | None = None) -> UniprocExecutor:
    executor = UniprocExecutor(config or make_config(), make_worker)
    executor.start(lambda _: None)
    return executor


def test_steps_are_answered_in_order_even_with_two_in_flight() -> None:
    executor = make_started()
    assert executor.receive(None) is None, "nothing is under way"

    executor.submit(make_plan([0], [2], new_rows=[make_new_row(0, [1, 2])]))
    executor.submit(make_plan([0]))

    answers = [executor.receive(None) for _ in range(2)]
    first = next_token([1, 2])
    sampled = [answer[0].sampled_token_ids for answer in answers if answer is not None]
    assert sampled == [[first], [next_token([1, 2, first])]]
    assert executor.receive(None) is None


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        pytest.param("corrupt", EngineStartError, "'loading weights': .* cut short", id="file"),
        pytest.param("misconfigured", ConfigError, "^--dtype float13", id="value"),
    ],
)
def test_a_failed_start_names_stage_and_cause(model: str, error: type, text: str) -> None:
    executor = UniprocExecutor(make_config(model), make_worker)

    with pytest.raises(error, match=text):
        executor.start(lambda _: None)
    with pytest.raises(EngineDeadError, match="not started"):
        executor.check_health()


def test_a_failing_step_ends_the_executor_with_its_cause() -> None:
    executor = make_started()

    with pytest.raises(EngineDeadError, match="told to fail"):
        executor.submit(make_plan([0], [1], new_rows=[make_new_row(0, [FAILING_TOKEN])]))

    for use in (lambda: executor.receive(0), executor.check_health):
        with pytest.raises(EngineDeadError, match="told to fail"):
            use()
    executor.shutdown()


def test_control_operations() -> None:
    executor = make_started()

    (life,) = executor.call(CheckWorkers())
    assert (life.rank, life.device) == (0, "cpu")
    assert life.memory_used_bytes > 0
    with pytest.raises(RequestError, match="no profile is running"):
        executor.call(StopProfile())
    with pytest.raises(RequestError, match="IsPaused is no operation of a worker"):
        executor.call(IsPaused())
    executor.check_health()


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_sleeps_and_wakes(level: int) -> None:
    executor = make_started()
    executor.call(Sleep(level=level))

    executor.call(WakeUp())
    executor.call(WakeUp())  # once is enough, twice is no error

    executor.submit(make_plan([0], [2], new_rows=[make_new_row(0, [1, 2])]))
    answer = executor.receive(None)
    assert answer is not None
    assert answer[0].sampled_token_ids == [next_token([1, 2])]


def test_a_step_planned_for_a_sleeper_is_an_error() -> None:
    executor = make_started()
    executor.call(Sleep())

    with pytest.raises(EngineDeadError, match="worker that is asleep"):
        executor.submit(make_plan([], freed_rows=[]))


def test_after_shutdown_nothing_works() -> None:
    executor = make_started()
    executor.shutdown()
    executor.shutdown()

    with pytest.raises(EngineDeadError, match="shut down"):
        executor.receive(0)
