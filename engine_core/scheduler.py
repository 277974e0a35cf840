"""What every request computes next. Pure state: no sockets, no clock, no tensors.

There is no prefill phase and no decode phase. Each request owes ``num_tokens_owed`` tokens, and a
step pays as many as the token budget and the free blocks allow, running requests before waiting
ones. Decode is the case of one token owed; chunked prefill is the case of a budget that runs out.

Steps are planned ahead of their results. A token that was sampled by a step not answered yet is
a placeholder: it is owed like any other, and the worker knows its id. What is decided on results
(a stop, an abort, a failure) reaches a request that may be in a later step already: its row is
one too many there, and it keeps row and blocks until that step was answered.

Source: the token-budget formulation of the vLLM V1 scheduler.
"""

from engine_core.admission import Admission
from engine_core.headroom import GROWTH_TOKENS, AdapterLimit, Headroom
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.lifecycle import Lifecycle
from engine_core.pipeline import Pipeline
from engine_core.request import Request, RequestGroup, RequestStatus
from engine_core.step_builder import StepBuilder, StepInFlight
from engine_core.step_cost import StepCost
from engine_core.step_result import StepResult
from engine_core.stop_checker import check_stop
from ipc.config import SchedulerConfig
from ipc.errors import ProtocolError
from ipc.messages import FinishReason, ModelRunnerOutput, SchedulerOutput
from ipc.tensors import Frames

_MANY_WAITING = 64  # from here on throughput counts, and nobody adds up their tokens
_LATEST = 8  # of those that run, so many may still have a part of their prompt to compute


class Scheduler:
    """Owns what every step holds; who runs and who waits is in ``lifecycle``.

    A running request has not been scheduled in the current step when it is preempted: requests
    are scheduled first to last, and preempted last to first.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCacheManager,
        *,
        vocab_size: int,
        adapter_limit: AdapterLimit | None = None,
        growth_tokens: int = GROWTH_TOKENS,
    ) -> None:
        self._max_step_tokens = config.max_num_batched_tokens
        self._vocab_size = vocab_size
        self.kv_cache = kv_cache
        self.lifecycle = Lifecycle(config, kv_cache)
        self._headroom = Headroom(config, kv_cache, adapter_limit, growth_tokens)
        self._admission = Admission(
            self.lifecycle, kv_cache, self._headroom, is_chunking=config.enable_chunked_prefill
        )
        self._cost = StepCost(config.max_prefill_slowdown if config.enable_chunked_prefill else 0.0)
        self._has_streams = False  # whether the latest step let somebody decode
        self.pipeline = Pipeline(config, self._cost)
        self._num_planned = 0  # the next step's id
        self._answered: list[Request] = []  # the user's processors gave their logits back

    @property
    def num_steps_in_flight(self) -> int:
        """Submitted steps whose answer is outstanding."""
        return len(self.pipeline.steps)

    @property
    def num_planned_steps(self) -> int:
        """Steps planned so far; the next one's id."""
        return self._num_planned

    @property
    def has_requests(self) -> bool:
        """Whether a request runs, waits its turn, or leaves; those set aside do not count."""
        lifecycle = self.lifecycle
        return bool(lifecycle.running or len(lifecycle.waiting) or lifecycle.leaving)

    @property
    def is_stuck(self) -> bool:
        """Whether nothing will ever move again, though requests are open: always a bug.

        Meant to be asked when nothing could be planned. While a user's processors hold a row of
        logits, everything may rightly wait for it.
        """
        if self.pipeline.steps or not self.has_requests:
            return False
        lifecycle = self.lifecycle
        return not any(r.awaits_user for r in (*lifecycle.running, *lifecycle.waiting))

    # ------------------------------------------------------------ requests come and go

    def add(self, group: RequestGroup) -> None:
        """Queue a group that has just arrived."""
        self.pipeline.note_arrival(group.arrival_s)
        self.lifecycle.add(group)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> bool:
        """End a branch whatever its state; False when it had ended already."""
        if request.status is RequestStatus.FINISHED:
            return False
        if request.status is RequestStatus.RUNNING:
            self.lifecycle.running.remove(request)
        self.lifecycle.finish(request, reason, error=error)
        return True

    def add_processed_logits(
        self, request: Request, position: int, logits: memoryview | bytes
    ) -> None:
        """Take a row of logits back from the user's processors; a stale one is ignored."""
        user_logits = request.user_logits
        if user_logits is None or request.status is RequestStatus.FINISHED:
            return
        is_expected = position == request.num_tokens == user_logits.position_sent
        if is_expected and user_logits.answer is None and not request.num_output_placeholders:
            user_logits.answer = logits
            self._answered.append(request)

    # ------------------------------------------------------------ planning a step

    def schedule(self, now_s: float) -> tuple[SchedulerOutput, Frames] | None:
        """Plan one step; None when there is nothing to compute.

        Args:
            now_s: the caller's clock, for the delay factor and for when requests began.
        """
        step = StepBuilder(self._num_planned, self._budget(), now_s)
        self._schedule_running(step)
        if len(self.lifecycle.waiting) and not step.has_preempted:  # else blocks are short
            self._admission.admit_waiting(step)
        if self._answered:
            self._sample_answered(step)
        if step.is_empty:
            return None
        self._num_planned += 1
        transfers = self.kv_cache.take_transfers()
        plan, frames, in_flight = step.build(self.lifecycle.rows.take_freed(), transfers)
        self.pipeline.begin(in_flight, now_s)
        self._has_streams = in_flight.num_decodes > 0
        return plan, frames

    def _budget(self) -> int:
        """Tokens of the next step: all that are allowed, or fewer so that streams stay even."""
        waiting, running = self.lifecycle.waiting, self.lifecycle.running
        if not self._has_streams or len(waiting) > _MANY_WAITING:
            return self._max_step_tokens
        num_waiting = sum(request.num_tokens for request in waiting)
        num_waiting += sum(max(0, request.num_tokens_owed - 1) for request in running[-_LATEST:])
        if num_waiting <= 0:
            return self._max_step_tokens
        num_prompt_tokens = self._cost.max_prompt_tokens(num_waiting)
        if num_prompt_tokens is None:
            return self._max_step_tokens
        return min(self._max_step_tokens, len(running) + num_prompt_tokens)

    def _schedule_running(self, step: StepBuilder) -> None:
        step_id, add_row, add_request = step.step_id, step.rows.append, step.requests.append
        for request in self.lifecycle.running:  # preemption only ever takes from the list's end
            num_computed = request.num_computed_tokens
            if num_computed < request.decode_until:  # a decode: the hot path, all in line
                request.num_computed_tokens = num_computed + 1
                request.num_output_placeholders += 1
                request.last_step_id = step_id
                add_row(request.row)  # type: ignore[arg-type]
                add_request(request)
            else:
                self._schedule_one(request, step)

    def _schedule_one(self, request: Request, step: StepBuilder) -> None:
        """Schedule a running request that needs blocks, owes a prompt, or may owe nothing."""
        num_owed = request.num_tokens_owed
        if num_owed <= 0 or num_owed + request.num_computed_tokens >= request.max_num_tokens:
            return  # its next move hangs on results
        # Whoever is behind keeps a token of the budget: a prompt starves nobody.
        num_behind = len(self.lifecycle.running) - step.num_scheduled - 1
        num_new_tokens = min(num_owed, step.token_budget - num_behind)
        new_block_ids = self._allocate_or_preempt(request, num_new_tokens, step)
        if new_block_ids is None:
            return
        assert request.row is not None
        if new_block_ids:
            step.new_block_ids.append((request.row, new_block_ids))
        if request.num_released_blocks > request.num_released_told:
            request.num_released_told = request.num_released_blocks
            step.released.append((request.row, request.num_released_blocks))
        self.lifecycle.advance(request, num_new_tokens, num_owed, step)

    def _allocate_or_preempt(
        self, request: Request, num_new_tokens: int, step: StepBuilder
    ) -> list[int] | None:
        """Make room by preempting the newest requests; None when ``request`` has to wait.

        While finished requests are about to give blocks back, nobody is preempted.
        """
        allocate = self.kv_cache.allocate_slots
        while (block_ids := allocate(request, num_new_tokens)) is None:
            if self.lifecycle.leaving:
                return None
            step.has_preempted = True
            if self.lifecycle.preempt_last() is request:
                return None
        return block_ids

    def _sample_answered(self, step: StepBuilder) -> None:
        """Sample rows whose logits came back; those that lost their row meanwhile wait on."""
        waiting = []
        for request in self._answered:
            user_logits = request.user_logits
            assert user_logits is not None
            if request.status is RequestStatus.FINISHED or user_logits.answer is None:
                continue
            is_ready = request.status is RequestStatus.RUNNING and request.num_tokens_owed == 0
            if is_ready and request.last_step_id != step.step_id:
                step.add_sample(request, user_logits.answer, self._vocab_size)
                user_logits.answer = None
                request.num_output_placeholders += 1
                request.last_step_id = step.step_id
            else:
                waiting.append(request)
        self._answered = waiting

    # ------------------------------------------------------------ taking answers in

    def update_from_output(self, output: ModelRunnerOutput, now_s: float) -> StepResult:
        """Take in the answer to the oldest step in flight.

        Raises:
            ProtocolError: the answer is to another step, or of another size.
        """
        step = self.pipeline.end(now_s, output.device_time_s)
        sampled = output.sampled_token_ids
        if output.step_id != step.step_id or len(sampled) != len(step.sampling):
            raise ProtocolError(
                f"step {step.step_id} samples {len(step.sampling)} rows, "
                f"the answer is to step {output.step_id} with {len(sampled)}"
            )
        self.lifecycle.num_answered_steps = step.step_id + 1
        result = StepResult(step.step_id)
        if output.nan_rows or output.logprobs or output.logits_rows:
            by_row = step.requests_by_row()
            for row in output.nan_rows:
                self._fail_nan_row(by_row[row], result)
            result.collect(output, by_row)
        gained, finished = result.gained, result.finished
        for request, token_id in zip(step.sampling, sampled, strict=True):
            if request.finish_reason is not None:
                continue  # found finished after this step was planned: one row too many
            request.num_output_placeholders -= 1
            output_token_ids = request.output_token_ids
            output_token_ids.append(token_id)
            gained.append(request)
            if (
                token_id in request.watched_token_ids
                or len(output_token_ids) >= request.max_output_tokens
            ) and (stop := check_stop(request)) is not None:
                finished.append(request)
                self.lifecycle.finish(request, stop[0], stop_reason=stop[1])
        if finished or result.failed:
            self.lifecycle.drop_finished()
        self.lifecycle.release_leaving()
        self._cost.note(step.num_prompt_tokens, output.device_time_s)
        self._count(step, len(gained), now_s)
        return result

    def _fail_nan_row(self, request: Request, result: StepResult) -> None:
        """Fail a whole request alone, and let nobody find what it computed."""
        for branch in request.group.branches:
            self.kv_cache.forget(branch)
        if request.status is RequestStatus.FINISHED:
            return
        error = "the model's logits for this request were not numbers (NaN)"
        for branch in request.group.branches:
            if branch.status is not RequestStatus.FINISHED:
                self.lifecycle.finish(branch, FinishReason.ERROR, error=error)
                result.failed.append(branch)

    def _count(self, step: StepInFlight, num_gained: int, now_s: float) -> None:
        counters = self.lifecycle.counters
        counters.num_steps += 1
        counters.step_num_tokens = step.num_tokens
        counters.generation_tokens += num_gained
        counters.prompt_tokens += step.num_prompt_tokens
        if step.num_prompt_tokens:
            self._headroom.note_prompt_latency(now_s - step.planned_s)
