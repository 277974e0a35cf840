"""Statistics: the line that is logged, derived times, and loggers that fail."""

import logging
from typing import Any

import pytest

from frontend.stat_loggers import (
    FinishedRequestStats,
    IterationStats,
    LoggingStatLogger,
    PrometheusStatLogger,
    StatLoggerGroup,
    counter_gain,
    cpu_cache_usage,
    gpu_cache_usage,
)
from ipc.config import EngineConfig, ModelConfig
from ipc.messages import FinishReason, SchedulerStats

CONFIG = EngineConfig(model_config=ModelConfig("m", max_model_len=100))


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_logger(clock: Clock) -> LoggingStatLogger:
    """A logger on a clock of ours, due every five seconds."""
    return LoggingStatLogger(CONFIG, clock=clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages at INFO or above."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]


def test_a_line_comes_at_most_every_five_seconds_with_true_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    stat_logger = make_logger(clock)
    stats = SchedulerStats(
        num_running=3,
        num_waiting=2,
        num_swapped=1,
        num_gpu_blocks=101,
        num_free_gpu_blocks=75,
        num_cpu_blocks=11,
        num_free_cpu_blocks=5,
        prefix_cache_queries=200,
        prefix_cache_hits=50,
    )
    for _ in range(10):
        clock.now_s += 1.0
        stat_logger.record(stats, IterationStats(num_prompt_tokens=20, num_generation_tokens=5))
    assert len(lines(caplog)) == 2
    line = lines(caplog)[0]
    for words in (
        "20.0 prompt tokens/s, 5.0 generated tokens/s",
        "3 running, 1 swapped, 2 pending",
        "GPU 25.0%, CPU 50.0%",
        "prefix cache hits: 25.0%",
    ):
        assert words in line
    assert "prefix cache hits: 0.0%" in lines(caplog)[1]  # none since the last line


def test_an_idle_engine_says_so_once_when_asked_again_and_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    stat_logger = make_logger(clock)
    stat_logger.record(None, IterationStats(num_generation_tokens=1))
    for _ in range(4):
        clock.now_s += 10.0
        stat_logger.log()
    assert len(lines(caplog)) == 2


def test_closing_writes_what_no_line_has_covered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    stat_logger = make_logger(clock)
    stat_logger.close()
    assert lines(caplog) == []
    clock.now_s += 2.0
    stat_logger.record(None, IterationStats(num_generation_tokens=8))
    stat_logger.close()
    assert "4.0 generated tokens/s" in lines(caplog)[0]


def test_derived_times_need_their_parts() -> None:
    request = FinishedRequestStats(FinishReason.STOP, 10, 5, 3.0, max_branch_tokens=5)
    assert request.inference_time_s is None
    assert request.time_per_output_token_s is None
    request.prefill_time_s, request.decode_time_s = 1.0, 2.0
    assert request.inference_time_s == 3.0
    assert request.time_per_output_token_s == 0.5
    request.max_branch_tokens = 1
    assert request.time_per_output_token_s is None


def test_block_zero_counts_neither_as_free_nor_as_used() -> None:
    idle = SchedulerStats(num_gpu_blocks=11, num_free_gpu_blocks=10)
    assert gpu_cache_usage(idle) == 0.0
    assert cpu_cache_usage(idle) == 0.0
    assert gpu_cache_usage(SchedulerStats(num_gpu_blocks=11)) == 1.0


def test_a_counter_that_fell_was_restarted() -> None:
    assert counter_gain(5, 8) == 3
    assert counter_gain(5, 2) == 2


class Recorder:
    """Keeps what it is told; raises on demand."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.num_tokens = 0
        self._failing = failing

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self._failing:
            raise RuntimeError("as told")

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        self.num_tokens += iteration.num_generation_tokens
        self._note("record")

    def log(self) -> None:
        self._note("log")

    def close(self) -> None:
        self._note("close")


def make_group(*loggers: Any) -> StatLoggerGroup:
    """A group of ready loggers."""
    return StatLoggerGroup(CONFIG, [lambda config, index, each=each: each for each in loggers])


@pytest.mark.parametrize("failing", ["record", "log", "close"])
def test_a_logger_that_raises_is_left_out_and_the_others_go_on(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = Recorder(), Recorder(failing)
    group = make_group(bad, good)
    for _ in range(3):
        group.record(None, IterationStats(num_generation_tokens=2))
    group.log()
    group.close()
    group.close()
    assert good.calls == ["record"] * 3 + ["log", "close"]
    assert good.num_tokens == 6
    assert bad.calls[-1] == failing
    assert bad.calls.count(failing) == 1
    assert "is left out now" in caplog.text


def test_factories_get_the_config_and_the_engines_index() -> None:
    seen: list[tuple[EngineConfig, int]] = []

    def factory(config: EngineConfig, index: int) -> Recorder:
        seen.append((config, index))
        return Recorder()

    StatLoggerGroup(CONFIG, [factory], engine_index=3)
    assert seen == [(CONFIG, 3)]


def test_a_logger_without_close_is_accepted() -> None:
    class Old:
        def record(self, stats: object, iteration: object) -> None: ...

        def log(self) -> None: ...

    group = make_group(Old())
    group.record(None, IterationStats())
    group.close()


def test_the_logging_and_the_prometheus_logger_are_factories_themselves() -> None:
    group = StatLoggerGroup(CONFIG, [LoggingStatLogger, PrometheusStatLogger])
    group.record(SchedulerStats(), IterationStats())
    group.log()
    group.close()
