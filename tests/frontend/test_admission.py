"""What a frontend refuses by itself."""

import pytest

from frontend.admission import FrontendAdmission
from frontend.stat_loggers import IterationStats
from ipc.errors import (
    DeadlineExceededError,
    EngineDrainingError,
    EngineGenerateError,
    EngineOverloadedError,
)
from ipc.messages import Limits, SchedulerStats

LIMITS = Limits(128, 4, 8, 40, 0, 60, 6, 128, max_waiting_tokens=1000)


def test_as_many_requests_as_may_run_and_wait_are_taken() -> None:
    admission = FrontendAdmission()
    admission.check(LIMITS, 9)
    admission.note_stats(SchedulerStats(retry_after_s=17.5))
    with pytest.raises(EngineOverloadedError, match="10 requests are in flight") as err:
        admission.check(LIMITS, 10)
    assert err.value.retry_after_s == 17.5


def test_tokens_count_as_the_core_told_and_as_sent_since() -> None:
    admission = FrontendAdmission()
    admission.note_stats(SchedulerStats(num_waiting_tokens=500))
    admission.note_sent(300)
    admission.check(LIMITS, 1, 200)
    with pytest.raises(EngineOverloadedError, match="800 prompt tokens wait, at most 1000"):
        admission.check(LIMITS, 1, 201)
    admission.note_stats(SchedulerStats(num_waiting_tokens=0))
    admission.check(LIMITS, 1, 1000)


def test_without_requests_of_its_own_it_asks_the_core() -> None:
    admission = FrontendAdmission()
    admission.note_stats(SchedulerStats(num_waiting_tokens=5000))
    admission.check(LIMITS, 0, 200)


def test_a_draining_core_gets_nothing_new() -> None:
    admission = FrontendAdmission()
    admission.note_draining("stopped")
    with pytest.raises(EngineDrainingError, match="stopped"):
        admission.check(LIMITS, 0)


def test_another_core_begins_with_an_empty_queue() -> None:
    admission = FrontendAdmission()
    admission.note_stats(SchedulerStats(num_waiting_tokens=5000, retry_after_s=30.0))
    admission.note_draining("stopped")
    admission.note_welcome()
    admission.check(LIMITS, 1, 200)
    assert admission.retry_after_s == 1.0


def test_refusals_get_advice_and_are_reported_once() -> None:
    admission = FrontendAdmission()
    admission.note_stats(SchedulerStats(retry_after_s=9.0))
    refusal = EngineOverloadedError("full")
    assert admission.note_failure(refusal) is refusal
    assert refusal.retry_after_s == 9.0
    admission.note_failure(DeadlineExceededError("late"))
    admission.note_failure(EngineGenerateError("NaN"))
    with pytest.raises(EngineOverloadedError):
        admission.check(LIMITS, 10)
    first, second = IterationStats(), IterationStats()
    admission.report(first)
    admission.report(second)
    assert (first.num_rejected, first.num_expired) == (2, 1)
    assert (second.num_rejected, second.num_expired) == (0, 0)
