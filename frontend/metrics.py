"""Metrics in Prometheus' form, under our own names and under vLLM's, from one set of numbers.

Numbers are kept in plain Python objects, since a step may bring hundreds of observations; they
become metric families only when somebody scrapes. Labels hold the model's name and finish reasons,
so their number is bounded.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from frontend.shared_metrics import MetricsExchange, Numbers, Observations, merge
from frontend.stat_loggers import (
    FinishedRequestStats,
    IterationStats,
    PrometheusStatLogger,
    StatLoggerGroup,
    counter_gain,
    cpu_cache_usage,
    gpu_cache_usage,
)
from ipc.config import EngineConfig
from ipc.messages import FinishReason, SchedulerStats

OUR_PREFIX, VLLM_PREFIX = "heliograph:", "vllm:"
THROUGHPUT_WINDOW_S = 5.0

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0),
)
_BRANCHES = (1.0, 2.0, 5.0, 10.0, 20.0)
_STEP_TOKENS = tuple(float(2**i) for i in range(15))


class Histogram:
    """Observations counted into buckets."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds  # upper ends, ascending; one more bucket takes the rest
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float | None, times: int = 1) -> None:
        """Count an observation; None is none."""
        if value is not None:
            self.counts[bisect_left(self.bounds, value)] += times
            self.sum += value * times

    def cumulative(self, counts: Sequence[int] | None = None) -> list[tuple[str, float]]:
        """(upper end, how many are at most that), as Prometheus wants them.

        Args:
            counts: of a histogram with these bounds, where not of this one.
        """
        ends = [*map(str, self.bounds), "+Inf"]
        counts = self.counts if counts is None else counts
        return list(zip(ends, map(float, accumulate(counts)), strict=True))


@dataclass(slots=True)
class Throughput:
    """Tokens per second over the last full window; zero when nothing happens."""

    clock: Callable[[], float]
    rate: float = 0.0
    _num_tokens: int = 0
    _started_s: float | None = None

    def add(self, num_tokens: int) -> None:
        """Count tokens that came now."""
        self.update()
        self._num_tokens += num_tokens

    def update(self) -> float:
        """Close the window when it is full; the current rate."""
        now_s = self.clock()
        if self._started_s is None:
            self._started_s = now_s
        elapsed_s = now_s - self._started_s
        if elapsed_s >= THROUGHPUT_WINDOW_S:
            self.rate = self._num_tokens / elapsed_s
            self._num_tokens, self._started_s = 0, now_s
        return self.rate


@dataclass(slots=True)
class Counters:
    """Totals since this frontend began to watch; they survive restarts of the core."""

    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    corrupted_requests: int = 0
    engine_steps: int = 0
    requests_rejected: int = 0
    requests_expired: int = 0
    request_success: dict[str, int] = field(
        default_factory=lambda: {reason.name.lower(): 0 for reason in FinishReason}
    )


class EngineMetrics:
    """All numbers of one engine; a collector that a registry asks at each scrape.

    Args:
        exchange: the way to the numbers of other API processes, where a scrape shows all of them.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        vllm_names: bool = True,
        clock: Callable[[], float] = time.monotonic,
        exchange: MetricsExchange | None = None,
    ) -> None:
        self._clock = clock
        self._exchange = exchange
        self._stats_s = clock()
        self._prefixes = (OUR_PREFIX, VLLM_PREFIX) if vllm_names else (OUR_PREFIX,)
        self._model_name = config.model_config.served_names[0]
        self._cache_config = config.cache_config
        self._stats = SchedulerStats()
        self._counters = Counters()
        self._prompt_rate = Throughput(clock)
        self._generation_rate = Throughput(clock)
        self._histograms = _make_histograms(config.model_config.resolved_max_model_len)

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Take in one batch of outputs."""
        if stats is not None:
            self._record_stats(stats)
        counters, histograms = self._counters, self._histograms
        counters.prompt_tokens += iteration.num_prompt_tokens
        counters.generation_tokens += iteration.num_generation_tokens
        counters.corrupted_requests += iteration.corrupted_requests
        counters.requests_rejected += iteration.num_rejected
        counters.requests_expired += iteration.num_expired
        self._prompt_rate.add(iteration.num_prompt_tokens)
        self._generation_rate.add(iteration.num_generation_tokens)
        observe_first = histograms["time_to_first_token_seconds"].observe
        for seconds in iteration.time_to_first_token_s:
            observe_first(seconds)
        observe_gap = histograms["inter_token_latency_seconds"].observe
        for seconds, times in Counter(iteration.inter_token_latency_s).items():
            observe_gap(seconds, times)  # streams of one step mostly have the same gap
        for request in iteration.finished:
            self._record_finished(request)
        if self._exchange is not None:
            self._exchange.publish_soon(self.numbers)

    def close(self) -> None:
        """Leave the last numbers for those who go on."""
        if self._exchange is not None:
            self._exchange.publish(self.numbers())

    def numbers(self) -> Numbers:
        """What this process knows, now."""
        counters = asdict(self._counters)
        return Numbers(
            written_s=self._clock(),
            stats=self._stats,
            stats_s=self._stats_s,
            finished=counters.pop("request_success"),
            counters=counters,
            rates={
                "prompt": self._prompt_rate.update(),
                "generation": self._generation_rate.update(),
            },
            histograms={name: (h.counts, h.sum) for name, h in self._histograms.items()},
        )

    def collect(self) -> Iterator[Metric]:
        """Every metric family, under each prefix."""
        numbers = self.numbers()
        if self._exchange is not None:
            numbers = merge([numbers, *self._exchange.read_others()])
        for prefix in self._prefixes:
            yield from self._gauges(prefix, numbers)
            yield from self._counter_families(prefix, numbers)
            for name, observations in numbers.histograms.items():
                for alias in _HISTOGRAM_ALIASES.get(name, (name,)):
                    yield self._histogram_family(prefix + alias, name, observations)
            yield self._cache_info(prefix, numbers.stats)

    def _record_stats(self, stats: SchedulerStats) -> None:
        counters, before = self._counters, self._stats
        counters.num_preemptions += counter_gain(before.num_preemptions, stats.num_preemptions)
        counters.prefix_cache_queries += counter_gain(
            before.prefix_cache_queries, stats.prefix_cache_queries
        )
        counters.prefix_cache_hits += counter_gain(
            before.prefix_cache_hits, stats.prefix_cache_hits
        )
        num_steps = counter_gain(before.num_steps, stats.num_steps)
        counters.engine_steps += num_steps
        if num_steps:
            self._histograms["iteration_tokens_total"].observe(stats.step_num_tokens)
        self._stats = stats
        self._stats_s = self._clock()

    def _record_finished(self, request: FinishedRequestStats) -> None:
        histograms = self._histograms
        self._counters.request_success[request.finish_reason.name.lower()] += 1
        num_computed = request.num_prompt_tokens - request.num_cached_tokens
        for name, value in (
            ("e2e_request_latency_seconds", request.e2e_latency_s),
            ("request_queue_time_seconds", request.queue_time_s),
            ("request_prefill_time_seconds", request.prefill_time_s),
            ("request_decode_time_seconds", request.decode_time_s),
            ("request_inference_time_seconds", request.inference_time_s),
            ("request_time_per_output_token_seconds", request.time_per_output_token_s),
            ("request_prompt_tokens", request.num_prompt_tokens),
            ("request_generation_tokens", request.num_generation_tokens),
            ("request_max_num_generation_tokens", request.max_branch_tokens),
            ("request_prefill_kv_computed_tokens", num_computed),
            ("request_params_n", request.n),
            ("request_params_best_of", request.best_of),
            ("request_params_max_tokens", request.max_tokens),
        ):
            histograms[name].observe(value)

    def _gauges(self, prefix: str, numbers: Numbers) -> Iterator[Metric]:
        stats = numbers.stats
        gpu_usage = gpu_cache_usage(stats)
        values = {
            "num_requests_running": ("Requests in the running batch", stats.num_running),
            "num_requests_waiting": ("Requests that wait to run", stats.num_waiting),
            "num_requests_swapped": ("Requests swapped to host memory", stats.num_swapped),
            "gpu_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1", gpu_usage),
            "kv_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1", gpu_usage),
            "cpu_cache_usage_perc": (
                "Share of the host's KV blocks in use, 0 to 1",
                cpu_cache_usage(stats),
            ),
            "avg_prompt_throughput_toks_per_s": (
                "Prompt tokens per second, lately",
                numbers.rates["prompt"],
            ),
            "avg_generation_throughput_toks_per_s": (
                "Generated tokens per second, lately",
                numbers.rates["generation"],
            ),
        }
        if prefix == OUR_PREFIX:
            values["num_cached_blocks"] = (
                "Free KV blocks that remember a prefix",
                stats.num_cached_blocks,
            )
            values["num_waiting_tokens"] = (
                "Prompt tokens of requests that wait to begin",
                stats.num_waiting_tokens,
            )
            values["retry_after_seconds"] = (
                "When a refused request is advised to come back",
                stats.retry_after_s,
            )
            values["num_leaked_blocks"] = (
                "KV blocks that an idle core cannot account for; always 0",
                stats.num_leaked_blocks,
            )
        for name, (words, value) in values.items():
            family = GaugeMetricFamily(prefix + name, words, labels=("model_name",))
            family.add_metric((self._model_name,), value)
            yield family

    def _counter_families(self, prefix: str, numbers: Numbers) -> Iterator[Metric]:
        names = _COUNTERS | (_OUR_COUNTERS if prefix == OUR_PREFIX else {})
        for name, words in names.items():
            family = CounterMetricFamily(prefix + name, words, labels=("model_name",))
            family.add_metric((self._model_name,), numbers.counters[name])
            yield family
        if prefix == OUR_PREFIX:
            words = "Engine cores that were lost and replaced"
            family = CounterMetricFamily(
                prefix + "num_engine_restarts", words, labels=("model_name",)
            )
            family.add_metric((self._model_name,), numbers.stats.num_restarts)
            yield family
        family = CounterMetricFamily(
            prefix + "request_success",
            "Requests that ended, by reason",
            labels=("model_name", "finished_reason"),
        )
        for reason, count in numbers.finished.items():
            family.add_metric((self._model_name, reason), count)
        yield family

    def _histogram_family(self, full_name: str, name: str, observations: Observations) -> Metric:
        counts, total = observations
        buckets = self._histograms[name].cumulative(counts)
        family = HistogramMetricFamily(full_name, _HISTOGRAMS[name], labels=("model_name",))
        family.add_metric((self._model_name,), buckets, total)
        return family

    def _cache_info(self, prefix: str, stats: SchedulerStats) -> Metric:
        values = asdict(self._cache_config)
        values["num_gpu_blocks"] = stats.num_gpu_blocks or None
        values["num_cpu_blocks"] = stats.num_cpu_blocks or None
        family = InfoMetricFamily(
            prefix + "cache_config", "The KV cache's configuration", labels=("model_name",)
        )
        family.add_metric((self._model_name,), {name: str(value) for name, value in values.items()})
        return family


def render_metrics(
    source: PrometheusStatLogger | StatLoggerGroup | CollectorRegistry,
) -> tuple[bytes, str]:
    """The body of ``GET /metrics`` and its content type."""
    if isinstance(source, StatLoggerGroup):
        loggers: Iterable[Any] = source.loggers
        found = [each for each in loggers if isinstance(each, PrometheusStatLogger)]
        registry = found[0].registry if found else CollectorRegistry()
    elif isinstance(source, PrometheusStatLogger):
        registry = source.registry
    else:
        registry = source
    return generate_latest(registry), CONTENT_TYPE_LATEST


_COUNTERS = {
    "num_preemptions": "Times that a running request gave up its KV blocks",
    "prompt_tokens": "Prompt tokens of the requests that began to answer",
    "generation_tokens": "Tokens generated",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache",
    "corrupted_requests": "Requests whose logits were not finite",
}
_OUR_COUNTERS = {
    "engine_steps": "Steps that the engine core completed",
    "requests_rejected": "Requests that were refused because too much was in flight",
    "requests_expired": "Requests whose deadline came before their first token",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "Arrival to first token",
    "inter_token_latency_seconds": "Time between two tokens of a request",
    "e2e_request_latency_seconds": "Arrival to end of a request",
    "request_queue_time_seconds": "Arrival to first scheduled",
    "request_prefill_time_seconds": "First scheduled to first token",
    "request_decode_time_seconds": "First token to last token",
    "request_inference_time_seconds": "First scheduled to last token",
    "request_time_per_output_token_seconds": "Mean time per output token of a request",
    "request_prompt_tokens": "Prompt tokens of a request",
    "request_generation_tokens": "Tokens generated for a request",
    "request_max_num_generation_tokens": "Tokens of a request's longest branch",
    "request_prefill_kv_computed_tokens": "Prompt tokens of a request that no cache had",
    "request_params_n": "n of a request",
    "request_params_best_of": "best_of of a request",
    "request_params_max_tokens": "max_tokens of a request",
    "iteration_tokens_total": "Tokens computed in a step",
}
_HISTOGRAM_ALIASES = {  # one set of numbers under the names of two years
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
}


def _make_histograms(max_model_len: int) -> dict[str, Histogram]:
    lengths = _one_two_five(max_model_len)
    special = {
        "time_to_first_token_seconds": _FIRST_TOKEN_S,
        "inter_token_latency_seconds": _TOKEN_S,
        "request_time_per_output_token_seconds": _TOKEN_S,
        "request_params_n": _BRANCHES,
        "request_params_best_of": _BRANCHES,
        "iteration_tokens_total": _STEP_TOKENS,
    }
    return {
        name: Histogram(special.get(name, _REQUEST_S if name.endswith("_seconds") else lengths))
        for name in _HISTOGRAMS
    }


def _one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to ``limit``."""
    bounds = (float(digit * 10**power) for power in range(12) for digit in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= max(limit, 1))
