"""Failpoints act when they are due, are refused unless admitted, and leave no trace when off."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from ipc.config import DebugConfig
from ipc.errors import ConfigError
from ipc.failpoints import (
    FailpointError,
    arm_core,
    arm_worker,
    make_debug_config,
    parse,
)


class Core:
    """Has the core's moments."""

    def __init__(self) -> None:
        self.num_steps = 0

    def submit_steps(self) -> bool:
        self.num_steps += 1
        return True

    def _publish(self, results: object) -> None:
        pass


@dataclass
class Row:
    """What enters."""

    token_ids: list[int]


@dataclass
class Plan:
    """A step with what enters."""

    new_rows: list[Row] = field(default_factory=list)


class Worker:
    """Has the worker's moments."""

    _runner = None

    def start(self) -> None:
        pass

    def _load_weights(self) -> None:
        pass

    def execute(self, plan: Plan) -> Plan:
        return plan


def test_nothing_is_armed_without_a_spec() -> None:
    core, worker = Core(), Worker()

    arm_core(DebugConfig(), core, core)
    arm_worker(DebugConfig(), worker)

    assert vars(core) == {"num_steps": 0}
    assert vars(worker) == {}


@pytest.mark.parametrize(("moment", "num_steps"), [("before", 1), ("after", 2)])
def test_an_action_comes_at_its_count_and_moment(moment: str, num_steps: int) -> None:
    core = Core()
    arm_core(DebugConfig((f"core.{moment}_schedule=raise@2",)), core, core)

    assert core.submit_steps()
    with pytest.raises(FailpointError):
        core.submit_steps()
    assert core.num_steps == num_steps
    assert core.submit_steps()


def test_a_token_triggers_only_where_it_enters() -> None:
    worker = Worker()
    arm_worker(DebugConfig(("worker.before_forward=raise%7",)), worker)

    worker.execute(Plan())
    worker.execute(Plan([Row([5, 6])]))
    for _ in range(2):  # each time, without a count
        with pytest.raises(FailpointError):
            worker.execute(Plan([Row([5]), Row([7, 8])]))


@pytest.mark.parametrize(("action", "status"), [("kill", -9), ("abort", -6), ("segv", -11)])
def test_a_process_ends_by_the_signal_of_its_action(action: str, status: int) -> None:
    code = f"from ipc.failpoints import parse; parse('core.before_schedule={action}').hit()"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status


@pytest.mark.parametrize(
    "spec",
    ["", "core.before_schedule", "core.never=kill", "core.before_schedule=explode",
     "core.before_schedule=kill:3", "core.before_schedule=sleep", "core.before_schedule=kill@0",
     "core.before_schedule=sleep:1.2.3", "core.before_schedule=kill%4"],
)  # fmt: skip
def test_a_spec_that_means_nothing_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="--failpoints"):
        make_debug_config([spec], is_debug=True)


def test_a_failpoint_needs_a_flag_of_its_own() -> None:
    spec = "worker.in_forward=sleep:0.5@3"

    with pytest.raises(ConfigError, match="--debug-faults"):
        make_debug_config(spec, is_debug=False)
    assert make_debug_config(spec, is_debug=True) == DebugConfig((spec,))
    assert (parse(spec).argument, parse(spec).count) == (0.5, 3)
