"""Stuck workers are found by their silence; slow ones are not taken for stuck."""

from dataclasses import dataclass

from executor.step_watch import StepWatch
from ipc.messages import ModelRunnerOutput

LIMIT_S = 60.0


@dataclass
class FakeWorker:
    """A worker whose state a test sets."""

    rank: int = 0
    is_stopped: bool = False
    processor_s: float = 0.0

    @property
    def pid(self) -> int:
        return 100 + self.rank

    def activity(self) -> tuple[bool, float]:
        return self.is_stopped, self.processor_s


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_watch(
    limit_s: float = LIMIT_S, *, counts_processor_time: bool = False
) -> tuple[StepWatch, Clock]:
    clock = Clock()
    watch = StepWatch(limit_s, counts_processor_time=counts_processor_time, clock=clock)
    return watch, clock


def pass_time(
    watch: StepWatch, clock: Clock, worker: FakeWorker, seconds: int, *, processor_s: float = 0.0
) -> str | None:
    """Look once a second, while the worker uses some processor time; the first complaint."""
    for _ in range(seconds):
        clock.now_s += 1.0
        worker.processor_s += processor_s
        if (cause := watch.describe_stuck([worker])) is not None:
            return cause
    return None


def test_answers_are_kept_in_their_order() -> None:
    watch, _ = make_watch()
    answers = [(ModelRunnerOutput(step_id, []), [b""]) for step_id in range(2)]
    for answer in answers:
        watch.expect()
        watch.keep(*answer)
    assert [watch.take(), watch.take(), watch.take()] == [*answers, None]


def test_nothing_is_overdue_while_nothing_is_due() -> None:
    watch, clock = make_watch()
    assert pass_time(watch, clock, FakeWorker(), 1000) is None


def test_a_silent_worker_is_named_after_the_limit() -> None:
    watch, clock = make_watch()
    watch.expect()
    assert pass_time(watch, clock, FakeWorker(rank=3), 59) is None
    cause = pass_time(watch, clock, FakeWorker(rank=3), 1)
    assert cause is not None
    assert "worker 3 (process 103) seems stuck" in cause
    assert "for 60 s" in cause


def test_the_stopped_one_of_several_is_named() -> None:
    watch, clock = make_watch()
    watch.expect()
    clock.now_s += LIMIT_S
    cause = watch.describe_stuck([FakeWorker(0), FakeWorker(1, is_stopped=True)])
    assert cause is not None
    assert cause.startswith("worker 1 (process 101) seems stopped")


def test_every_answer_starts_the_time_anew() -> None:
    watch, clock = make_watch()
    watch.expect()
    watch.expect()
    assert pass_time(watch, clock, FakeWorker(), 50) is None
    watch.keep(ModelRunnerOutput(0, []), [])
    assert pass_time(watch, clock, FakeWorker(), 50) is None
    assert pass_time(watch, clock, FakeWorker(), 10) is not None


def test_on_the_cpu_a_worker_that_computes_is_slow_and_not_stuck() -> None:
    watch, clock = make_watch(counts_processor_time=True)
    watch.expect()
    worker = FakeWorker()
    assert pass_time(watch, clock, worker, 1000, processor_s=0.9) is None
    assert pass_time(watch, clock, worker, 59) is None
    assert pass_time(watch, clock, worker, 1) is not None


def test_on_the_cpu_one_look_is_not_enough() -> None:
    watch, clock = make_watch(counts_processor_time=True)
    watch.expect()
    clock.now_s += 2 * LIMIT_S
    assert watch.describe_stuck([FakeWorker()]) is None
    assert watch.describe_stuck([FakeWorker()]) is not None


def test_a_limit_of_zero_waits_for_ever() -> None:
    watch, clock = make_watch(0.0)
    watch.expect()
    assert pass_time(watch, clock, FakeWorker(), 10_000) is None


def test_looks_keep_apart() -> None:
    watch, clock = make_watch()
    assert watch.is_look_due()
    assert not watch.is_look_due()
    clock.now_s += 0.03
    assert watch.is_look_due()
