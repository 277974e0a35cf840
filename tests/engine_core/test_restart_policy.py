"""When a lost core is replaced: kills from outside at once, failures with growing waits."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from engine_core.memory_kills import count_memory_kills
from engine_core.restart_policy import MAX_FAILURES, MAX_WAIT_S, Death, RestartPolicy
from ipc.errors import ExitCode
from ipc.messages import EngineFailed


class Middle(random.Random):
    """No jitter."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def make_death(return_code: int = -signal.SIGSEGV, **fields: Any) -> Death:
    defaults: dict[str, Any] = {
        "failure": None, "has_served": True, "was_out_of_memory": False, "was_ours": False
    }  # fmt: skip
    return Death(return_code=return_code, **(defaults | fields))


def make_failure(exit_code: int = ExitCode.WORKER_DIED, killed_by: int = 0) -> EngineFailed:
    return EngineFailed(0, "worker 0 died", exit_code, killed_by)


@pytest.mark.parametrize(
    ("death", "is_outside"),
    [
        (make_death(-signal.SIGKILL), True),
        (make_death(-signal.SIGTERM), True),
        (make_death(0), True),
        (make_death(-signal.SIGKILL, was_out_of_memory=True), False),
        (make_death(-signal.SIGKILL, was_ours=True), False),
        (make_death(-signal.SIGSEGV), False),
        (make_death(-signal.SIGABRT), False),
        (make_death(4, failure=make_failure(ExitCode.CORE_DIED)), False),
        (make_death(5, failure=make_failure(killed_by=signal.SIGKILL)), True),
        (make_death(5, failure=make_failure(killed_by=signal.SIGSEGV)), False),
        (make_death(-signal.SIGKILL, failure=make_failure()), False),
    ],
)
def test_only_a_kill_by_somebody_else_is_from_outside(death: Death, is_outside: bool) -> None:
    assert death.is_outside is is_outside


def test_kills_from_outside_are_answered_at_once_however_many() -> None:
    policy = RestartPolicy(Middle())
    waits = [policy.next_wait_s(make_death(-signal.SIGKILL), float(i)) for i in range(50)]
    assert waits == [0.0] * 50


def test_the_wait_doubles_and_too_many_failures_in_a_minute_are_the_end() -> None:
    policy = RestartPolicy(Middle())
    waits = [policy.next_wait_s(make_death(), 2.0 * i) for i in range(MAX_FAILURES + 1)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, None]
    assert policy.exit_code == ExitCode.CORE_DIED


def test_failures_that_are_long_past_do_not_count() -> None:
    policy = RestartPolicy(Middle())
    for number in range(20):
        assert policy.next_wait_s(make_death(), 61.0 * number) == 0.5


def test_restarts_that_never_serve_are_the_end_even_when_each_takes_minutes() -> None:
    policy = RestartPolicy(Middle())
    failed = make_death(3, failure=make_failure(ExitCode.START_FAILED), has_served=False)
    assert policy.next_wait_s(make_death(5, failure=make_failure()), 0.0) == 0.5
    waits = [policy.next_wait_s(failed, 200.0 * (i + 1)) for i in range(MAX_FAILURES + 1)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, None]
    assert policy.exit_code == ExitCode.WORKER_DIED  # why it was restarted in the first place


def test_a_kill_during_the_restart_waits_a_little_and_never_gives_up() -> None:
    policy = RestartPolicy(Middle())
    killed = make_death(-signal.SIGKILL, has_served=False)
    waits = [policy.next_wait_s(killed, float(i)) for i in range(12)]
    assert waits[:3] == [0.5, 1.0, 2.0]
    assert waits[-1] == MAX_WAIT_S


def test_waits_are_jittered_within_a_fifth() -> None:
    waits = [RestartPolicy(random.Random(i)).next_wait_s(make_death(), 0.0) for i in range(50)]
    assert all(wait is not None and 0.4 <= wait <= 0.6 for wait in waits)
    assert len(set(waits)) > 40


@pytest.mark.parametrize(
    ("membership", "file", "text"),
    [
        ("0::/a/b\n", "a/b/memory.events", "low 0\noom 3\noom_kill 2\n"),
        ("0::/elsewhere\n", "memory.events", "oom_kill 2\n"),
        ("4:cpu:/x\n3:memory:/a\n", "memory/a/memory.oom_control", "under_oom 0\noom_kill 2\n"),
    ],
)
def test_memory_kills_are_read_where_the_kernel_counts_them(
    tmp_path: Path, membership: str, file: str, text: str
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    (tmp_path / "fs" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "fs" / file).write_text(text)

    assert count_memory_kills(tmp_path / "cgroup", tmp_path / "fs") == 2


def test_without_control_groups_there_are_no_memory_kills(tmp_path: Path) -> None:
    assert count_memory_kills(tmp_path / "none", tmp_path) == 0
    (tmp_path / "cgroup").write_text("0::/\n")
    assert count_memory_kills(tmp_path / "cgroup", tmp_path) == 0
