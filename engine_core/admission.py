"""Who of the waiting requests enters a step, and with what: cached prefix, fork, swapped blocks.

Requests enter in their order. Nobody overtakes a request that lacks room, or it might wait for
ever; one that waits for something of its own (its user, its sibling, an adapter) is passed over.
"""

from enum import Enum, auto

from engine_core.headroom import Headroom
from engine_core.kv_cache_manager import CachedPrefix, KVCacheManager
from engine_core.lifecycle import Lifecycle
from engine_core.request import Request, RequestStatus
from engine_core.step_builder import StepBuilder


class _Verdict(Enum):
    """What came of trying to admit a waiting request."""

    ENTERED = auto()
    PASSED_OVER = auto()  # it waits for something of its own: the next one may enter
    NO_ROOM = auto()  # nobody behind it may overtake


class Admission:
    """Moves requests from waiting to running, as far as rows, tokens and blocks reach."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        kv_cache: KVCacheManager,
        headroom: Headroom,
        *,
        is_chunking: bool,
    ) -> None:
        self._lifecycle = lifecycle
        self._kv_cache = kv_cache
        self._headroom = headroom
        self._is_chunking = is_chunking

    def admit_waiting(self, step: StepBuilder) -> None:
        """Add to ``step`` who can enter now."""
        lifecycle, headroom = self._lifecycle, self._headroom
        headroom.begin_step()
        lifecycle.room.advance(step.now_s)
        if headroom.is_too_early(lifecycle.waiting, lifecycle.running, step.now_s):
            return
        entered = []
        for request in tuple(lifecycle.waiting):  # a copy: entering may add branches
            if not lifecycle.rows.num_free or step.token_budget <= 0:
                break
            verdict = self._try_to_admit(request, step)
            if verdict is _Verdict.NO_ROOM:
                break
            if verdict is _Verdict.ENTERED:
                headroom.note_admitted(request)
                entered.append(request)
        for request in entered:
            lifecycle.waiting.remove(request)

    def _try_to_admit(self, request: Request, step: StepBuilder) -> _Verdict:
        if self._lifecycle.is_in_flight(request):
            return _Verdict.NO_ROOM  # preempted, and results of its are still to come
        running = self._lifecycle.running
        if request.awaits_user or not self._headroom.admits_adapter(request, running):
            return _Verdict.PASSED_OVER
        if request.status is RequestStatus.SWAPPED:
            return self._swap_in(request, step)
        prefix = self._kv_cache.find_cached_prefix(request)
        source = None
        if len(request.group.branches) > 1:
            source = request.group.prompt_holder(step.step_id)
            if source is None and request.group.is_computing_prompt(step.step_id):
                return _Verdict.PASSED_OVER  # it will fork in a later step
        num_forked = min(request.num_prompt_tokens, request.num_tokens - 1)
        if (
            source is not None
            and num_forked > prefix.num_tokens
            and self._kv_cache.can_fork(source, num_forked)
        ):
            return self._fork(request, source, num_forked, step)
        return self._start(request, prefix, step)

    def _start(self, request: Request, prefix: CachedPrefix, step: StepBuilder) -> _Verdict:
        """Admit a request that computes from its tokens, after what the cache has of them."""
        num_new_tokens = self._first_chunk(request.num_tokens - prefix.num_tokens, step)
        held = len(prefix.block_ids) - self._kv_cache.gpu_pool.num_free_among(prefix.block_ids)
        if not num_new_tokens or not self._has_room(request, held):
            return _Verdict.NO_ROOM
        if self._kv_cache.allocate_slots(request, num_new_tokens, prefix) is None:
            return _Verdict.NO_ROOM
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(prefix.num_tokens, request.num_prompt_tokens)
            self._lifecycle.counters.prefix_cache_queries += request.num_prompt_tokens
            self._lifecycle.counters.prefix_cache_hits += request.num_cached_tokens
        request.num_computed_tokens = prefix.num_tokens
        self._lifecycle.enter(request, num_new_tokens, step)
        return _Verdict.ENTERED

    def _fork(
        self, request: Request, source: Request, num_forked: int, step: StepBuilder
    ) -> _Verdict:
        """Admit a branch that takes the prompt over from a sibling."""
        num_new_tokens = self._first_chunk(request.num_tokens - num_forked, step)
        num_shared = num_forked // self._kv_cache.block_size
        if not num_new_tokens or not self._has_room(request, num_shared):
            return _Verdict.NO_ROOM
        self._kv_cache.fork(source, request, num_forked)
        request.num_computed_tokens = num_forked
        if self._kv_cache.allocate_slots(request, num_new_tokens) is None:
            self._kv_cache.free(request)
            request.num_computed_tokens = 0
            return _Verdict.NO_ROOM
        if request.num_cached_tokens is None:
            request.num_cached_tokens = source.num_cached_tokens
        self._lifecycle.enter(request, num_new_tokens, step)
        return _Verdict.ENTERED

    def _swap_in(self, request: Request, step: StepBuilder) -> _Verdict:
        """Bring a swapped request back; it owes at least the token that it waited for."""
        num_new_tokens = self._first_chunk(request.num_tokens_owed, step)
        num_nulls = len(request.cpu_block_ids) - self._kv_cache.num_swapped_blocks(request)
        if not num_new_tokens or not self._has_room(request, num_nulls):
            return _Verdict.NO_ROOM
        if not self._kv_cache.swap_in(request, num_new_tokens):
            return _Verdict.NO_ROOM
        self._lifecycle.enter(request, num_new_tokens, step)
        return _Verdict.ENTERED

    def _has_room(self, request: Request, num_reused_blocks: int) -> bool:
        return self._headroom.has_room(request, num_reused_blocks, self._lifecycle.running)

    def _first_chunk(self, num_owed: int, step: StepBuilder) -> int:
        """How many tokens an entering request may compute now; 0 when it has to wait."""
        if not self._is_chunking and num_owed > step.token_budget:
            return 0
        return min(num_owed, step.token_budget)
