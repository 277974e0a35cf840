"""Waiting for simulated steps: how late a wait comes back, and how often it looks."""

import ctypes
import threading
import time

import pytest

from executor.step_clock import StepClock, sharpen_timers


class Simulated:
    """Time passes while somebody sleeps; every sleep takes a little longer than asked for."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.num_sleeps = 0

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds < 1e-3
        self.num_sleeps += 1
        self.now_s += seconds + 6e-6


def run_steps(durations_s: list[float]) -> list[tuple[float, int]]:
    """Steps one after the other: how late each wait came back, and its number of sleeps."""
    time_ = Simulated()
    clock = StepClock(lambda: time_.now_s, time_.sleep)
    found = []
    for duration_s in durations_s:
        end_s = time_.now_s + duration_s
        before = time_.num_sleeps
        clock.wait(lambda end_s=end_s: time_.now_s >= end_s, time_.now_s)  # type: ignore[misc]
        found.append((time_.now_s - end_s, time_.num_sleeps - before))
    return found


@pytest.mark.parametrize("duration_s", [0.2e-3, 0.5e-3, 1e-3, 4e-3, 40e-3])
def test_a_steady_step_is_noticed_at_once_with_few_looks(duration_s: float) -> None:
    *_, (late_s, num_sleeps) = run_steps([duration_s] * 5)

    assert late_s < 20e-6
    assert num_sleeps < 12 + duration_s / 200e-6


@pytest.mark.parametrize(("first_s", "second_s"), [(40e-3, 0.5e-3), (0.5e-3, 40e-3)])
def test_another_kind_of_step_is_noticed_soon(first_s: float, second_s: float) -> None:
    *_, (late_s, num_sleeps) = run_steps([first_s, first_s, second_s])

    assert late_s < 260e-6
    assert num_sleeps < 250


def test_a_step_that_is_done_is_not_slept_for() -> None:
    clock = StepClock(sleep=lambda seconds: pytest.fail("slept"))

    clock.wait(lambda: True, time.perf_counter())


def test_timers_are_sharpened_for_one_thread_alone() -> None:
    found = []

    def run() -> None:
        sharpen_timers()
        found.append(timer_slack_ns())

    before = timer_slack_ns()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert found == [1000]
    assert timer_slack_ns() == before > 1000


def timer_slack_ns() -> int:
    """This thread's; see prctl(2)."""
    get_timer_slack = 30
    return int(ctypes.CDLL(None).prctl(get_timer_slack, 0, 0, 0, 0))
