"""Several API processes, one set of numbers: what is added up, and what is the engine's."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from frontend.metrics import EngineMetrics, render_metrics
from frontend.shared_metrics import PUBLISH_DELAY_S, RATE_LIMIT_S, MetricsExchange, merge
from frontend.stat_loggers import IterationStats, PrometheusStatLogger
from ipc.config import EngineConfig, ModelConfig
from ipc.messages import SchedulerStats

CONFIG = EngineConfig(model_config=ModelConfig("m", max_model_len=1000))


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_metrics(clock: Clock, *, num_tokens: int, num_steps: int, **stats: Any) -> EngineMetrics:
    """The metrics of a process that saw one message."""
    metrics = EngineMetrics(CONFIG, clock=clock)
    iteration = IterationStats(num_generation_tokens=num_tokens)
    iteration.inter_token_latency_s = [0.01] * num_tokens
    metrics.record(SchedulerStats(num_steps=num_steps, step_num_tokens=1, **stats), iteration)
    return metrics


def test_own_numbers_are_added_up_and_the_engines_counted_once() -> None:
    clock = Clock()
    older = make_metrics(clock, num_tokens=5, num_steps=90, num_running=7, num_preemptions=2)
    clock.now_s += 1
    newer = make_metrics(clock, num_tokens=3, num_steps=100, num_running=4, num_preemptions=3)
    for order in ([older, newer], [newer, older]):
        merged = merge([metrics.numbers() for metrics in order])
        assert merged.counters["generation_tokens"] == 8
        assert merged.counters["engine_steps"] == 100
        assert merged.counters["num_preemptions"] == 3
        assert merged.stats.num_running == 4
        counts, total = merged.histograms["inter_token_latency_seconds"]
        assert sum(counts) == 8
        assert total == pytest.approx(0.08)
        assert sum(merged.histograms["iteration_tokens_total"][0]) == 1


def test_rates_of_a_process_that_says_nothing_any_more_do_not_count() -> None:
    clock = Clock()
    metrics = make_metrics(clock, num_tokens=50, num_steps=1)
    clock.now_s += 5.0
    gone = metrics.numbers()
    assert gone.rates["generation"] == 10.0
    assert merge([gone, gone]).rates["generation"] == 20.0
    clock.now_s += RATE_LIMIT_S + 1.0
    now = EngineMetrics(CONFIG, clock=clock).numbers()
    assert merge([now, gone]).rates["generation"] == 0.0


def test_a_scrape_shows_what_others_wrote_even_when_they_are_gone(tmp_path: Path) -> None:
    gone = make_metrics(Clock(), num_tokens=5, num_steps=1)
    MetricsExchange(tmp_path).publish(gone.numbers())
    (tmp_path / f"{os.getpid()}.metrics").rename(tmp_path / "1.metrics")

    logger = PrometheusStatLogger(CONFIG, exchange=MetricsExchange(tmp_path))

    async def record_and_wait() -> None:
        logger.record(None, IterationStats(num_generation_tokens=2))
        logger.record(None, IterationStats(num_generation_tokens=1))
        limit = time.monotonic() + 10 * PUBLISH_DELAY_S
        while len(list(tmp_path.glob("*.metrics"))) < 2:
            assert time.monotonic() < limit
            await asyncio.sleep(0.05)

    asyncio.run(record_and_wait())
    assert b'heliograph:generation_tokens_total{model_name="m"} 8.0' in render_metrics(logger)[0]
    logger.close()
    (own,) = [path for path in tmp_path.iterdir() if path.name != "1.metrics"]
    own.rename(tmp_path / "2.metrics")
    written = [numbers.counters for numbers in MetricsExchange(tmp_path).read_others()]
    assert sorted(counters["generation_tokens"] for counters in written) == [3, 5]
