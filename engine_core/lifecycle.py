"""Every move of a request between waiting, running and finished, with what it holds.

This file alone changes ``Request.status``, rows, and the queue and list that requests are in.
What it must not know: budgets, and why a request moves.
"""

from bisect import insort
from operator import attrgetter

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import Request, RequestGroup, RequestStatus
from engine_core.request_queue import RequestQueue
from engine_core.row_pool import RowPool
from engine_core.stats import SchedulerCounters
from engine_core.step_builder import StepBuilder
from engine_core.waiting_room import WaitingRoom
from ipc.config import SchedulerConfig
from ipc.messages import FinishReason, NewRow

_order = attrgetter("order")


class Lifecycle:
    """Owns the waiting queue, the running list and the rows.

    Invariants, checked after every step in the tests:
      * a request that has not finished is running, waiting, or held back by its group's leader;
      * running requests are ordered like waiting ones, so the preemption victim is the last;
      * rows and blocks are held by running requests, and by finished ones whose last step has
        not been answered.
    """

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager) -> None:
        self._kv_cache = kv_cache
        self._preemption_mode = config.preemption_mode
        self.waiting = RequestQueue()
        self.room = WaitingRoom()
        self.running: list[Request] = []
        self.leaving: list[Request] = []  # finished, but a submitted step still uses their row
        self.rows = RowPool(config.max_num_seqs)
        self.counters = SchedulerCounters()
        self.num_swapped = 0  # of those that wait
        self.num_answered_steps = 0  # steps are answered in order: a later id is in flight

    def is_in_flight(self, request: Request) -> bool:
        """Whether a submitted step that uses ``request`` has not been answered yet."""
        return request.last_step_id >= self.num_answered_steps

    def add(self, group: RequestGroup) -> None:
        """Queue a group's first unfinished branch; the others follow once it has the prompt."""
        live = [b for b in group.branches if b.status is not RequestStatus.FINISHED]
        if live:
            group.held_back.extend(live[1:])
            self.waiting.join(live[0])
            self.room.enter(group)

    def enter(self, request: Request, num_new_tokens: int, step: StepBuilder) -> None:
        """Give a request that has its blocks a row, and begin."""
        self.num_swapped -= request.status is RequestStatus.SWAPPED
        request.move_to(RequestStatus.RUNNING)
        request.row = self.rows.take()
        request.num_released_told = request.num_released_blocks
        if request.first_scheduled_s is None:
            request.first_scheduled_s = step.now_s
            self.room.begin(request.group, request.order[0], step.now_s)
        insort(self.running, request, key=_order)
        step.new_rows.append(
            NewRow(
                request.row,
                request.token_slice(0, request.num_tokens),
                request.num_prompt_tokens,
                request.num_computed_tokens,
                list(request.block_ids),
                request.row_params,
                len(request.prompt_logprobs or ()),
            )
        )
        self.advance(request, num_new_tokens, request.num_tokens_owed, step)

    def advance(
        self, request: Request, num_new_tokens: int, num_owed: int, step: StepBuilder
    ) -> None:
        """Put ``num_new_tokens`` of those a request owes, and has slots for, into the step."""
        step.add(request, num_new_tokens, num_owed=num_owed)
        num_prompt, num_before = request.num_prompt_tokens, request.num_computed_tokens
        if num_before < num_prompt:
            step.num_prompt_tokens += min(num_prompt - num_before, num_new_tokens)
        request.num_computed_tokens += num_new_tokens
        request.last_step_id = step.step_id
        self._kv_cache.remember(request)
        if num_new_tokens == num_owed and request.user_logits is None:
            request.num_output_placeholders += 1
            request.decode_until = min(
                self._kv_cache.last_decode_position(request), request.max_num_tokens - 1
            )
        if request.prompt_done_step_id is None and request.num_computed_tokens >= num_prompt:
            request.prompt_done_step_id = step.step_id
            self._release_held_back(request.group)

    def preempt_last(self) -> Request:
        """Take everything from the last running request; it waits in its old place."""
        victim = self.running.pop()
        if self._wants_swap(victim) and self._kv_cache.swap_out(victim):
            victim.move_to(RequestStatus.SWAPPED)
            self.num_swapped += 1
        else:
            self._kv_cache.free(victim)
            victim.num_computed_tokens = 0
            victim.move_to(RequestStatus.PREEMPTED)
        self._give_row_back(victim)
        victim.decode_until = 0
        victim.prompt_done_step_id = None
        victim.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting.add(victim)
        return victim

    def _wants_swap(self, victim: Request) -> bool:
        """Whether to move blocks to host memory, by mode or because siblings share them.

        A row whose logits visit the user always computes again: sampling it needs what its own
        forward left in the worker's row.
        """
        if victim.user_logits is not None:
            return False
        mode = self._preemption_mode
        return mode == "swap" or (mode is None and len(victim.group.branches) > 1)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop_reason: int | None = None,
        error: str | None = None,
    ) -> None:
        """End a branch. The caller takes it out of ``running``."""
        group = request.group
        if request in group.held_back:
            group.held_back.remove(request)
        else:
            if request.status is not RequestStatus.RUNNING:
                self.waiting.remove(request)
            self._release_held_back(group)
        self.num_swapped -= request.status is RequestStatus.SWAPPED
        request.finish(reason, stop_reason, error)
        if group.num_waiting_tokens is not None and group.is_finished:
            self.room.leave(group)
        if request.row is not None and self.is_in_flight(request):
            self.leaving.append(request)
        else:
            self._release(request)

    def _release_held_back(self, group: RequestGroup) -> None:
        """Let a group's other branches queue: the prompt is computed, or its leader ended."""
        if group.held_back:
            for branch in group.held_back:
                self.waiting.add(branch)
            group.held_back = []

    def drop_finished(self) -> None:
        """Take finished requests out of ``running``."""
        self.running = [r for r in self.running if r.status is RequestStatus.RUNNING]

    def release_leaving(self) -> None:
        """Free finished requests that no outstanding step uses any more."""
        if not self.leaving:
            return
        leaving, self.leaving = self.leaving, []
        for request in leaving:
            if self.is_in_flight(request):
                self.leaving.append(request)
            else:
                self._release(request)

    def check_invariants(self, branches: list[Request]) -> None:
        """Raise AssertionError unless queues, rows and blocks agree with ``branches``."""
        holders = [*self.running, *self.leaving]
        for branch in branches:
            places = (
                branch in self.running,
                branch in self.waiting or self.waiting.has_set_aside(branch),
                branch in branch.group.held_back,
                branch.status is RequestStatus.FINISHED,
            )
            assert sum(places) == 1, f"{branch.req_id}/{branch.index} is in {places}"
            assert (branch.status is RequestStatus.RUNNING) == places[0]
            if branch.row is None:
                assert not branch.block_ids, f"{branch.req_id} holds blocks without a row"
        assert all(r.row is not None for r in holders), "a holder without a row"
        rows = [request.row for request in holders]
        assert len(set(rows)) == len(rows), f"rows {rows} are held twice"
        assert self.running == sorted(self.running, key=_order), "running is out of order"
        swapped = [r for r in self.waiting if r.status is RequestStatus.SWAPPED]
        assert len(swapped) == self.num_swapped, "count of swapped requests is off"
        self._kv_cache.gpu_pool.check_invariants([r.block_ids for r in holders])
        self._kv_cache.cpu_pool.check_invariants([r.cpu_block_ids for r in swapped])
        assert self.rows.num_free + len(rows) == self.rows.num_rows, "rows do not add up"
        groups = {id(branch.group): branch.group for branch in branches}.values()
        counts = [g.num_waiting_tokens for g in groups if g.num_waiting_tokens is not None]
        assert self.room.num_requests == len(counts), "count of those who wait to begin is off"
        assert self.room.num_tokens == sum(counts), "tokens that wait to begin do not add up"

    def _release(self, request: Request) -> None:
        self._kv_cache.free(request)
        self._give_row_back(request)

    def _give_row_back(self, request: Request) -> None:
        if request.row is not None:
            self.rows.give_back(request.row)
            request.row = None
