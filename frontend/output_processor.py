"""EngineOutputs into the states of open requests: one call per step, for all streams at once.

Owns the registry of open requests and their journal. Every request that was opened ends exactly
once: by its last branch, by an abort, or by an error; from then on outputs under its name find
nobody and are dropped, as are outputs of another epoch.

Knows nothing of sockets and event loops: it is told the time, and it says what to send.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from frontend.detokenizer import Detokenizer
from frontend.inputs import AdmittedRequest
from frontend.journal import Journal, JournalBranch
from frontend.logits_processors import LogitsProcessor, RowWork
from frontend.logprobs import LogprobDecoder
from frontend.outputs import RequestMetrics
from frontend.request_state import BranchState, RequestState
from frontend.stat_loggers import FinishedRequestStats, IterationStats
from frontend.stop_strings import StopStringMatcher
from frontend.tokenizer import Tokenizer
from ipc import errors
from ipc.errors import EngineError, EngineGenerateError
from ipc.messages import EngineOutput, EngineOutputs, FinishReason, LogitsRow
from ipc.sampling_params import RequestOutputKind
from ipc.tensors import Frames

AnyError = TypeVar("AnyError", bound=EngineError)


@dataclass(slots=True)
class StepResult:
    """What one message brought, and what the core must be told because of it."""

    moved: list[RequestState] = field(default_factory=list)  # each once, in order of arrival
    stopped_branches: list[tuple[str, int]] = field(default_factory=list)  # for AbortBranches
    failed_req_ids: list[str] = field(default_factory=list)  # for AbortRequests
    row_work: list[RowWork] = field(default_factory=list)  # for the logits processors
    iteration: IterationStats | None = None


class OutputProcessor:
    """Owns the state of every open request of one engine."""

    def __init__(self, tokenizer: Tokenizer | None, *, log_stats: bool) -> None:
        self._tokenizer = tokenizer
        self._log_stats = log_stats
        self._logprob_decoder = LogprobDecoder(tokenizer)
        self._states: dict[str, RequestState] = {}  # by req_id
        self._req_ids: dict[str, str] = {}  # the caller's name -> req_id
        self._processors: dict[str, list[LogitsProcessor]] = {}  # by req_id, where there are some
        self._finished: list[FinishedRequestStats] = []  # not yet in an IterationStats
        self.journal = Journal()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._states)

    @property
    def open_request_ids(self) -> list[str]:
        """The callers' names of open requests, oldest first."""
        return list(self._req_ids)

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Detokenise requests opened from now on with another tokenizer."""
        self._tokenizer = tokenizer
        self._logprob_decoder = LogprobDecoder(tokenizer)

    def check_is_free(self, request_id: str) -> None:
        """Raise KeyError when a request of that name is open."""
        if request_id in self._req_ids:
            raise KeyError(f"request id {request_id!r} is in use by a request in flight")

    def open(self, admitted: AdmittedRequest, epoch: int) -> RequestState:
        """Begin a request's state and journal entry.

        Raises:
            KeyError: a request of that name is open; it is not disturbed.
        """
        self.check_is_free(admitted.request_id)
        message, params = admitted.message, admitted.params
        entry = self.journal.open(message, epoch)
        kind = params.output_kind
        if kind is RequestOutputKind.DELTA and params.num_branches > params.n:
            kind = RequestOutputKind.FINAL_ONLY  # which branches count is known at the end
        arrival_s = message.arrival_time_s
        state = RequestState(
            req_id=message.req_id,
            request_id=admitted.request_id,
            prompt=admitted.prompt,
            params=params,
            kind=kind,
            entry=entry,
            branches=[self._open_branch(admitted, record) for record in entry.branches],
            metrics=RequestMetrics(arrival_time=arrival_s, last_token_time=arrival_s),
            logprob_decoder=self._logprob_decoder,
            lora_request=admitted.lora_request,
            num_unfinished=params.num_branches,
        )
        if params.prompt_logprobs is not None and len(message.prompt_token_ids) == 1:
            state.prompt_logprobs = [None]  # the engine has nothing to say about one token
        self._states[message.req_id] = state
        self._req_ids[admitted.request_id] = message.req_id
        if admitted.processors:
            self._processors[message.req_id] = admitted.processors
        return state

    def process(self, message: EngineOutputs, frames: Frames, now_s: float) -> StepResult:
        """Take in one step's outputs.

        Args:
            message, frames: as they came.
            now_s: time.time().
        """
        result = StepResult(iteration=IterationStats() if self._log_stats else None)
        moved: dict[str, RequestState] = {}
        states, epoch, iteration = self._states, message.epoch, result.iteration
        for output in message.outputs:
            state = states.get(output.req_id)
            if state is None or state.entry.epoch != epoch:
                continue
            before_s = state.append_plain(output, now_s)
            if before_s is not None:
                moved[output.req_id] = state
                if iteration is not None:
                    iteration.add_later_tokens(len(output.new_token_ids), now_s - before_s)
            elif self._take_in(state, output, now_s, result):
                moved[output.req_id] = state
        for row in message.logits_rows:
            state = states.get(row.req_id)
            if state is not None and state.entry.epoch == epoch:
                self._take_in_row(state, row, frames, now_s, result)
                if state.is_finished:
                    moved[row.req_id] = state
        result.moved = list(moved.values())
        if result.iteration is not None:
            result.iteration.finished, self._finished = self._finished, []
        return result

    def abort(self, request_ids: Iterable[str], now_s: float) -> list[RequestState]:
        """End requests by their callers' names; unknown names are passed over."""
        ended = []
        for request_id in request_ids:
            req_id = self._req_ids.get(request_id)
            if req_id is not None:
                ended.append(self._end(req_id, FinishReason.ABORT, now_s))
        return ended

    def close(self, state: RequestState, now_s: float) -> bool:
        """End a request whose caller has left; False when it had ended before."""
        if self._states.get(state.req_id) is not state:
            return False
        self._end(state.req_id, FinishReason.ABORT, now_s)
        return True

    def fail_all(self, error: EngineError, now_s: float) -> list[RequestState]:
        """The engine died or changed: end every open request; return them, oldest first.

        Each gets an error object of its own, as each will be raised in another task.
        """
        return [
            self._end(req_id, FinishReason.ERROR, now_s, copy_error(error))
            for req_id in tuple(self._states)
        ]

    def _open_branch(self, admitted: AdmittedRequest, record: JournalBranch) -> BranchState:
        params = admitted.params
        is_ranked = params.num_branches > params.n
        detokenizer = matcher = None
        if params.detokenize and self._tokenizer is not None:
            detokenizer = Detokenizer(
                self._tokenizer,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
                admitted.message.prompt_token_ids,
            )
            if params.stop_strings:
                matcher = StopStringMatcher(
                    params.stop_strings, include_in_output=params.include_stop_str_in_output
                )
        return BranchState(
            record=record,
            token_ids=record.token_ids,
            detokenizer=detokenizer,
            matcher=matcher,
            logprobs=None if params.logprobs is None else [],
            cumulative_logprob=0.0 if is_ranked or params.logprobs is not None else None,
        )

    def _take_in(
        self, state: RequestState, output: EngineOutput, now_s: float, result: StepResult
    ) -> bool:
        """One branch's gain; False when it says nothing new."""
        if output.finish_reason is FinishReason.ERROR:
            self._fail(state, failure_of(output), now_s, result)
            return True
        branch = state.branches[output.index]
        last_token_s = branch.last_token_time_s
        is_first = state.metrics.first_token_time is None
        try:
            num_new = state.update(output, now_s)
        except EngineGenerateError as err:
            self._fail(state, err, now_s, result)
            return True
        if num_new is None:
            return False
        if result.iteration is not None and num_new:
            _count_tokens(result.iteration, state, num_new, is_first, now_s, last_token_s)
        if branch.finish_reason is not None:
            if output.finish_reason is None:  # a stop string: the core does not know yet
                result.stopped_branches.append((output.req_id, output.index))
            if state.is_finished:
                self._forget(state)
        return True

    def _take_in_row(
        self,
        state: RequestState,
        row: LogitsRow,
        frames: Frames,
        now_s: float,
        result: StepResult,
    ) -> None:
        prompt_ids = state.entry.request.prompt_token_ids
        branch = state.branches[row.index]
        num_output = row.position - len(prompt_ids)
        if branch.finish_reason is not None or num_output < 0:
            return
        if num_output > len(branch.token_ids):
            error = f"output tokens before position {row.position} were lost on the way"
            self._fail(state, EngineGenerateError(error), now_s, result)
            return
        output_ids = branch.token_ids[:num_output]
        processors = self._processors.get(row.req_id, [])
        result.row_work.append(RowWork(row, frames, processors, prompt_ids, output_ids))

    def _fail(
        self, state: RequestState, failure: EngineError, now_s: float, result: StepResult
    ) -> None:
        """End a request with an error; the core forgets what it may still have of it."""
        state.end(FinishReason.ERROR, now_s, failure)
        result.failed_req_ids.append(state.req_id)
        self._forget(state)

    def _end(
        self, req_id: str, reason: FinishReason, now_s: float, failure: EngineError | None = None
    ) -> RequestState:
        state = self._states[req_id]
        state.end(reason, now_s, failure)
        self._forget(state)
        return state

    def _forget(self, state: RequestState) -> None:
        del self._states[state.req_id]
        del self._req_ids[state.request_id]
        self._processors.pop(state.req_id, None)
        self.journal.close(state.req_id)
        if self._log_stats:
            self._finished.append(summarise(state))


def copy_error(error: AnyError) -> AnyError:
    """The same error once more, as nobody has raised it yet."""
    return copy.copy(error).with_traceback(None)


def failure_of(output: EngineOutput) -> EngineError:
    """The error that an output of reason ERROR stands for."""
    kind = getattr(errors, output.error_kind, None)
    if not (isinstance(kind, type) and issubclass(kind, EngineError)):
        kind = EngineGenerateError
    return kind(output.error or "the engine gave no reason")


def summarise(state: RequestState) -> FinishedRequestStats:
    """A finished request as statistics see it."""
    metrics, params = state.metrics, state.params
    reason = state.branches[0].finish_reason
    finished_s = metrics.finished_time or metrics.last_token_time
    scheduled_s, first_s = metrics.first_scheduled_time, metrics.first_token_time
    return FinishedRequestStats(
        finish_reason=FinishReason.ABORT if reason is None else reason,
        num_prompt_tokens=len(state.entry.request.prompt_token_ids),
        num_generation_tokens=metrics.num_generation_tokens,
        e2e_latency_s=max(0.0, finished_s - metrics.arrival_time),
        n=params.n,
        best_of=params.num_branches,
        max_tokens=params.max_tokens,
        max_branch_tokens=max(len(branch.token_ids) for branch in state.branches),
        num_cached_tokens=state.num_cached_tokens or 0,
        queue_time_s=_gap(metrics.arrival_time, scheduled_s),
        prefill_time_s=_gap(scheduled_s, first_s),
        decode_time_s=_gap(first_s, None if first_s is None else metrics.last_token_time),
    )


def _count_tokens(
    iteration: IterationStats,
    state: RequestState,
    num_new: int,
    is_first: bool,
    now_s: float,
    last_token_s: float,
) -> None:
    if is_first:
        iteration.num_generation_tokens += 1
        iteration.num_prompt_tokens += len(state.entry.request.prompt_token_ids)
        iteration.time_to_first_token_s.append(max(0.0, now_s - state.metrics.arrival_time))
        num_new -= 1
    if num_new and last_token_s:
        iteration.add_later_tokens(num_new, now_s - last_token_s)
    else:
        iteration.num_generation_tokens += num_new


def _gap(start_s: float | None, end_s: float | None) -> float | None:
    """Seconds between two wall-clock times, None when one is missing; a clock may jump back."""
    return None if start_s is None or end_s is None else max(0.0, end_s - start_s)
