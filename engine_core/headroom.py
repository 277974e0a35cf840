"""Whether a waiting request may enter: room for it to grow, delay, adapters.

Admitting a request only to preempt somebody a few steps later costs more than letting it wait.
So there must be room for its prompt and for some steps of growth of everyone who runs; a request
that was preempted before needs twice as much each time, which bounds how often that can happen.
"""

from collections.abc import Iterable

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import Request
from ipc.config import SchedulerConfig

GROWTH_TOKENS = 16
_MAX_DOUBLINGS = 16


class AdapterLimit:
    """At most ``max_adapters`` different adapters run at a time; others wait, none fails."""

    def __init__(self, max_adapters: int) -> None:
        self._max_adapters = max_adapters

    def admits(self, request: Request, running: Iterable[Request]) -> bool:
        """Whether ``request``'s adapter fits beside those of ``running``."""
        adapter_id = request.group.adapter_id
        if adapter_id is None:
            return True
        active = {other.group.adapter_id for other in running} - {None}
        return adapter_id in active or len(active) < self._max_adapters


class Headroom:
    """Owns the latency of the latest prompt and the room promised in the current step."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCacheManager,
        adapter_limit: AdapterLimit | None = None,
        growth_tokens: int = GROWTH_TOKENS,
    ) -> None:
        self._delay_factor = config.delay_factor
        self._growth_tokens = growth_tokens
        self._kv_cache = kv_cache
        self._adapter_limit = adapter_limit
        self._prompt_latency_s = 0.0
        self._promised_blocks: int | None = None  # to ``running``; None: not counted in this step

    def begin_step(self) -> None:
        """Forget what was counted for an earlier step."""
        self._promised_blocks = None

    def note_prompt_latency(self, latency_s: float) -> None:
        """Remember how long the latest step with prompt tokens took."""
        self._prompt_latency_s = latency_s

    def is_too_early(
        self, waiting: Iterable[Request], running: list[Request], now_s: float
    ) -> bool:
        """Whether prompts should still gather: the delay factor times the latest latency.

        Nothing is delayed while nothing runs.
        """
        if self._delay_factor <= 0 or not running:
            return False
        first_arrival_s = min((request.group.arrival_s for request in waiting), default=now_s)
        return now_s - first_arrival_s <= self._delay_factor * self._prompt_latency_s

    def admits_adapter(self, request: Request, running: Iterable[Request]) -> bool:
        """Whether the request's adapter fits in beside those that run."""
        return self._adapter_limit is None or self._adapter_limit.admits(request, running)

    def has_room(self, request: Request, num_reused_blocks: int, running: list[Request]) -> bool:
        """Whether ``request`` can enter and grow beside ``running``.

        Args:
            num_reused_blocks: of its table, those that cost no free block.
        """
        if not running:
            return True  # alone it fits: that was checked when it was added
        target = self._target_tokens(request, request.num_preemptions)
        needed = self._kv_cache.num_blocks_for(target) - num_reused_blocks
        if request.num_preemptions:
            promised = self._count_promised(running, request.num_preemptions)
        else:
            if self._promised_blocks is None:
                self._promised_blocks = self._count_promised(running, 0)
            promised = self._promised_blocks
        return needed + promised <= self._kv_cache.gpu_pool.num_free

    def note_admitted(self, request: Request) -> None:
        """Count the growth of a request that just entered among the promised room."""
        if self._promised_blocks is not None:
            target = self._target_tokens(request, 0)
            self._promised_blocks += self._kv_cache.num_blocks_to_grow(request, target)

    def _count_promised(self, running: list[Request], num_doublings: int) -> int:
        grow = self._kv_cache.num_blocks_to_grow
        return sum(grow(other, self._target_tokens(other, num_doublings)) for other in running)

    def _target_tokens(self, request: Request, num_doublings: int) -> int:
        growth = self._growth_tokens << min(num_doublings, _MAX_DOUBLINGS)
        num_tokens = request.num_tokens + request.num_output_placeholders
        return min(num_tokens + growth, request.max_num_tokens)
