"""When the next step is planned. The time is a number."""

from typing import Any

import pytest

from engine_core.pipeline import Pipeline
from engine_core.step_builder import StepInFlight
from engine_core.step_cost import StepCost
from ipc.config import SchedulerConfig
from tests.engine_core import simulated_executor
from tests.engine_core.builders import Rig, make_request

DECODE_S = 0.010


def make_step(
    num_prompt_tokens: int = 0, num_rows: int = 1, planned_s: float = 0.0
) -> StepInFlight:
    rows = list(range(num_rows))
    return StepInFlight(0, rows, [], [], [], num_rows, num_prompt_tokens, num_rows, planned_s)


def make_pipeline(decode_s: float = DECODE_S, **config: Any) -> Pipeline:
    """Steps take 10 ms, or 0.04 ms for each prompt token; a request came at 100 s."""
    cost = StepCost(0.0)
    for _ in range(20):
        cost.note(0, decode_s)
        cost.note(500, 0.020)
    pipeline = Pipeline(SchedulerConfig(**{"plans_late": True} | config), cost)
    pipeline.note_arrival(100.0)
    return pipeline


def test_the_first_step_is_planned_at_once_and_the_second_before_the_first_one_ends() -> None:
    pipeline = make_pipeline()
    assert pipeline.wants_step(100.0)
    pipeline.begin(make_step(), 100.0)
    assert not pipeline.wants_step(100.001)
    due_s = pipeline.plan_due_s
    assert due_s is not None
    assert 100.007 < due_s < 100.0 + DECODE_S - 0.001  # early enough to be launched by then
    assert pipeline.wants_step(due_s)
    pipeline.begin(make_step(), due_s)
    assert not pipeline.wants_step(101.0)


def test_a_step_behind_another_begins_when_that_one_was_answered() -> None:
    pipeline = make_pipeline()
    pipeline.begin(make_step(), 100.0)
    pipeline.begin(make_step(), 100.008)
    pipeline.end(100.010, 0.010)
    assert pipeline.plan_due_s == pytest.approx(100.010 + DECODE_S, abs=0.003)


def test_a_step_that_ended_early_is_followed_at_once() -> None:
    pipeline = make_pipeline()
    pipeline.begin(make_step(), 100.0)
    pipeline.end(100.002, 0.002)
    assert pipeline.wants_step(100.002)


def run_steps(pipeline: Pipeline, num_steps: int, idle_s: float) -> float:
    """Each step is planned when it is due, and the device waited for it; the lead at the end."""
    now_s = 100.0
    pipeline.begin(make_step(), now_s)
    for _ in range(num_steps):
        due_s = pipeline.plan_due_s
        assert due_s is not None
        pipeline.begin(make_step(planned_s=due_s), due_s)
        now_s += DECODE_S + idle_s
        pipeline.end(now_s, DECODE_S)
        pipeline.note_arrival(now_s)
    assert pipeline.plan_due_s is not None
    return now_s + DECODE_S - pipeline.plan_due_s


def test_plans_leave_earlier_where_the_device_had_to_wait_and_later_again() -> None:
    first = run_steps(make_pipeline(), 1, idle_s=0.0)
    pipeline = make_pipeline()
    late = run_steps(pipeline, 10, idle_s=0.001)
    assert first + 0.0005 < late
    assert run_steps(make_pipeline(), 500, idle_s=0.004) < DECODE_S  # there is a limit
    pipeline.steps.clear()
    assert 0.0005 < run_steps(pipeline, 1000, idle_s=0.0) < first


def test_prompts_and_many_rows_count() -> None:
    alone, prompt, many = (make_pipeline() for _ in range(3))
    alone.begin(make_step(), 100.0)
    prompt.begin(make_step(num_prompt_tokens=450), 100.0)
    many.begin(make_step(num_rows=256), 100.0)
    assert alone.plan_due_s is not None
    assert prompt.plan_due_s == pytest.approx(alone.plan_due_s + 0.008, abs=0.001)
    assert many.plan_due_s is not None
    assert many.plan_due_s < alone.plan_due_s - 0.001


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"plans_late": False}, id="nobody would wake up"),
        pytest.param({"max_steps_in_flight": 2}, id="the user wants two"),
        pytest.param({"decode_s": 0.0005}, id="steps are too short"),
    ],
)
def test_steps_are_planned_at_once_where_waiting_is_no_use(config: dict[str, Any]) -> None:
    pipeline = make_pipeline(**config)
    pipeline.begin(make_step(), 100.0)
    assert pipeline.plan_due_s is None
    assert pipeline.wants_step(100.0)


def test_steps_are_planned_at_once_while_nobody_arrives_or_nothing_is_known() -> None:
    pipeline = make_pipeline()
    pipeline.begin(make_step(), 105.0)
    assert pipeline.wants_step(105.0)
    unknown = Pipeline(SchedulerConfig(plans_late=True), StepCost(0.0))
    unknown.note_arrival(100.0)
    unknown.begin(make_step(), 100.0)
    assert unknown.wants_step(100.0)


@pytest.mark.parametrize(("plans_late", "expected"), [(True, 1), (False, 2)])
def test_who_arrives_waits_for_the_step_that_runs_and_for_no_other(
    plans_late: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_executor, "DECODE_S", 0.5)
    rig = Rig(max_steps_in_flight=None, plans_late=plans_late)
    rig.add(make_request("stream", max_tokens=40))
    for _ in range(4):
        rig.step()
    rig.core.submit_steps()
    assert rig.scheduler.num_steps_in_flight == expected
    rig.run()
