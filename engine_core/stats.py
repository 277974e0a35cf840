"""Counters of one core, from its start on, and the snapshot that clients get."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipc.messages import SchedulerStats

if TYPE_CHECKING:
    from engine_core.scheduler import Scheduler


@dataclass(slots=True)
class SchedulerCounters:
    """What the scheduler did so far; it alone writes here."""

    num_preemptions: int = 0
    prompt_tokens: int = 0  # computed, so cached ones excluded
    generation_tokens: int = 0
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # of those, found
    num_steps: int = 0  # answered ones
    step_num_tokens: int = 0  # of the latest answered step


def scheduler_stats(
    scheduler: "Scheduler", *, is_idle: bool, num_restarts: int = 0
) -> SchedulerStats:
    """A snapshot.

    Args:
        is_idle: no request is open and no step in flight, so every block held is a leak.
        num_restarts: cores that were lost before this one.
    """
    lifecycle, counters = scheduler.lifecycle, scheduler.lifecycle.counters
    gpu_pool, cpu_pool = scheduler.kv_cache.gpu_pool, scheduler.kv_cache.cpu_pool
    return SchedulerStats(
        num_running=len(lifecycle.running),
        num_waiting=len(lifecycle.waiting) + lifecycle.waiting.num_held - lifecycle.num_swapped,
        num_swapped=lifecycle.num_swapped,
        num_gpu_blocks=gpu_pool.num_usable,
        num_free_gpu_blocks=gpu_pool.num_free,
        num_cpu_blocks=cpu_pool.num_usable,
        num_free_cpu_blocks=cpu_pool.num_free,
        num_cached_blocks=gpu_pool.num_free_cached,
        num_preemptions=counters.num_preemptions,
        prompt_tokens=counters.prompt_tokens,
        generation_tokens=counters.generation_tokens,
        prefix_cache_queries=counters.prefix_cache_queries,
        prefix_cache_hits=counters.prefix_cache_hits,
        num_steps=counters.num_steps,
        num_leaked_blocks=gpu_pool.num_held + cpu_pool.num_held if is_idle else 0,
        step_num_tokens=counters.step_num_tokens,
        num_restarts=num_restarts,
    )
