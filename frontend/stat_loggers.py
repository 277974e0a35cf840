"""What a batch of outputs says about speed and load, and the loggers that are told.

The frontend makes one ``IterationStats`` per ``EngineOutputs`` it takes in; the core sends its
``SchedulerStats`` along. A logger never sees a request's text, and one that fails is left out
from then on: statistics must not stop the engine.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ipc.config import EngineConfig
from ipc.messages import FinishReason, SchedulerStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from frontend.shared_metrics import MetricsExchange

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0  # between two lines while the engine steps


@dataclass(slots=True)
class FinishedRequestStats:
    """One request, whose last branch has just ended. Times are None when it never got so far."""

    finish_reason: FinishReason  # of the first branch
    num_prompt_tokens: int
    num_generation_tokens: int  # summed over the branches
    e2e_latency_s: float  # arrival to end
    n: int = 1
    best_of: int = 1
    max_tokens: int | None = None  # as asked for; None: up to the model's limit
    max_branch_tokens: int = 0  # output tokens of the longest branch
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queue_time_s: float | None = None  # arrival to first scheduled
    prefill_time_s: float | None = None  # first scheduled to first token
    decode_time_s: float | None = None  # first token to last token

    @property
    def inference_time_s(self) -> float | None:
        """First scheduled to last token."""
        if self.prefill_time_s is None or self.decode_time_s is None:
            return None
        return self.prefill_time_s + self.decode_time_s

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean gap between the tokens of the longest branch; None for fewer than two tokens."""
        if self.decode_time_s is None or self.max_branch_tokens < 2:
            return None
        return self.decode_time_s / (self.max_branch_tokens - 1)


@dataclass(slots=True)
class IterationStats:
    """What one batch of outputs brought to this frontend."""

    num_prompt_tokens: int = 0  # prompts of the requests whose first token came
    num_generation_tokens: int = 0  # new output tokens, all branches
    time_to_first_token_s: list[float] = field(default_factory=list)  # one per such request
    inter_token_latency_s: list[float] = field(default_factory=list)  # one per later token
    finished: list[FinishedRequestStats] = field(default_factory=list)
    corrupted_requests: int = 0  # requests that met a logits row that is not finite
    num_rejected: int = 0  # requests that were too much and never began
    num_expired: int = 0  # requests whose deadline came before their first token

    def add_later_tokens(self, num_tokens: int, since_s: float) -> None:
        """Count tokens that came together, ``since_s`` after the ones before them."""
        self.num_generation_tokens += num_tokens
        since_s = since_s if since_s > 0.0 else 0.0  # a wall clock may jump back
        if num_tokens == 1:
            self.inter_token_latency_s.append(since_s)
        elif num_tokens:
            self.inter_token_latency_s.extend([since_s / num_tokens] * num_tokens)


class StatLogger(Protocol):
    """Gets every record. ``record`` runs on the event loop: it must be quick."""

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Take in one batch of outputs; ``stats`` is the core's state after it, if sent."""

    def log(self) -> None:
        """Say now what there is to say."""

    def close(self) -> None:
        """The engine ends: flush."""


StatLoggerFactory = Callable[[EngineConfig, int], StatLogger]  # (config, engine index)


class LoggingStatLogger:
    """One line of throughput and load, at most every few seconds while the engine steps."""

    def __init__(
        self,
        config: EngineConfig,
        engine_index: int = 0,
        *,
        interval_s: float = LOG_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = f"Engine {engine_index:03d}"
        self._interval_s = interval_s
        self._clock = clock
        self._last_log_s = clock()
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._stats = SchedulerStats(
            num_gpu_blocks=config.cache_config.num_gpu_blocks_override or 0
        )
        self._logged_stats = self._stats  # as of the last line
        self._was_idle = True

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Count; write the line when it is due."""
        self._num_prompt_tokens += iteration.num_prompt_tokens
        self._num_generation_tokens += iteration.num_generation_tokens
        if stats is not None:
            self._stats = stats
        if self._clock() - self._last_log_s >= self._interval_s:
            self.log()

    def log(self) -> None:
        """Write the line. A second idle one in a row goes to DEBUG."""
        now_s = self._clock()
        elapsed_s = max(now_s - self._last_log_s, 1e-9)
        stats = self._stats
        is_idle = not (
            self._num_prompt_tokens
            or self._num_generation_tokens
            or stats.num_running
            or stats.num_waiting
            or stats.num_swapped
        )
        logger.log(
            logging.DEBUG if is_idle and self._was_idle else logging.INFO,
            "%s: %.1f prompt tokens/s, %.1f generated tokens/s; requests: %d running, "
            "%d swapped, %d pending; KV cache in use: GPU %.1f%%, CPU %.1f%%; "
            "prefix cache hits: %.1f%%",
            self._name,
            self._num_prompt_tokens / elapsed_s,
            self._num_generation_tokens / elapsed_s,
            stats.num_running,
            stats.num_swapped,
            stats.num_waiting,
            100 * gpu_cache_usage(stats),
            100 * cpu_cache_usage(stats),
            100 * self._recent_hit_rate(),
        )
        self._was_idle = is_idle
        self._last_log_s = now_s
        self._logged_stats = stats
        self._num_prompt_tokens = self._num_generation_tokens = 0

    def close(self) -> None:
        """Write what no line has covered yet."""
        if self._num_prompt_tokens or self._num_generation_tokens:
            self.log()

    def _recent_hit_rate(self) -> float:
        queries = counter_gain(
            self._logged_stats.prefix_cache_queries, self._stats.prefix_cache_queries
        )
        hits = counter_gain(self._logged_stats.prefix_cache_hits, self._stats.prefix_cache_hits)
        return hits / queries if queries else 0.0


class PrometheusStatLogger:
    """Keeps numbers for Prometheus, in a registry of its own: engines in one process never clash.

    ``frontend.metrics.render_metrics`` writes them out.
    """

    def __init__(
        self,
        config: EngineConfig,
        engine_index: int = 0,
        *,
        vllm_names: bool = True,
        registry: "CollectorRegistry | None" = None,
        exchange: "MetricsExchange | None" = None,
    ) -> None:
        """Register the metrics, so that even the first scrape shows them all.

        Args:
            vllm_names: export every metric a second time, under vLLM's name.
            registry: where to; None makes a new one.
            exchange: the way to the numbers of the server's other API processes.
        """
        from prometheus_client import CollectorRegistry

        from frontend.metrics import EngineMetrics

        self.engine_index = engine_index
        self.registry = CollectorRegistry() if registry is None else registry
        self._metrics = EngineMetrics(config, vllm_names=vllm_names, exchange=exchange)
        self.registry.register(self._metrics)

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Count."""
        self._metrics.record(stats, iteration)

    def log(self) -> None:
        """Nothing to do: Prometheus asks."""

    def close(self) -> None:
        """Leave the last numbers where others read them; here they stay readable anyway."""
        self._metrics.close()


class StatLoggerGroup:
    """All loggers of one engine. A logger that raises is reported once and left out."""

    def __init__(
        self,
        config: EngineConfig,
        factories: Sequence[StatLoggerFactory],
        engine_index: int = 0,
    ) -> None:
        """Build the loggers; a factory that raises is the caller's bug and is not caught."""
        self.loggers = [factory(config, engine_index) for factory in factories]

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        """Tell every logger."""
        self._each("record", stats, iteration)

    def log(self) -> None:
        """Let every logger say what it has."""
        self._each("log")

    def close(self) -> None:
        """Flush and forget the loggers. A second call does nothing."""
        self._each("close")
        self.loggers = []

    def _each(self, method_name: str, *args: object) -> None:
        for stat_logger in tuple(self.loggers):
            method = getattr(stat_logger, method_name, None)
            if method is None:  # loggers written for other engines may lack close()
                continue
            try:
                method(*args)
            except Exception:  # a user's logger may raise anything; the engine goes on
                logger.exception("%s failed in %s; it is left out now", stat_logger, method_name)
                self.loggers.remove(stat_logger)


def counter_gain(before: int, after: int) -> int:
    """How much a counter grew; a restarted core begins again at zero."""
    return after - before if after >= before else after


def gpu_cache_usage(stats: SchedulerStats) -> float:
    """Share of the GPU's KV blocks in use, 0 to 1."""
    return _share_in_use(stats.num_gpu_blocks, stats.num_free_gpu_blocks)


def cpu_cache_usage(stats: SchedulerStats) -> float:
    """Share of the blocks for swapping in use, 0 to 1."""
    return _share_in_use(stats.num_cpu_blocks, stats.num_free_cpu_blocks)


def _share_in_use(num_blocks: int, num_free: int) -> float:
    num_usable = num_blocks - 1  # block 0 is the null block: never free, never in use
    return max(0.0, 1.0 - num_free / num_usable) if num_usable > 0 else 0.0
