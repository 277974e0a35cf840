"""One open request as its caller sees it: text, logprobs and times grow here, outputs are taken.

The engine's side (``update``) and the caller's side (``take``) are independent. A caller that is
slow takes less often and gets more at once: nothing queues up, so a stream's state is bounded by
its text. Neither side does work that grows with the length of the text per token, but for the
copy that a cumulative output is.

Knows nothing of sockets, event loops or tokenising.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from frontend.detokenizer import Detokenizer
from frontend.journal import JournalBranch, JournalEntry
from frontend.logprobs import LogprobDecoder
from frontend.lora_request import LoRARequest
from frontend.outputs import (
    CompletionOutput,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    SampleLogprobs,
)
from frontend.stop_strings import StopStringMatcher
from ipc.errors import EngineError
from ipc.messages import EngineOutput, FinishReason
from ipc.sampling_params import RequestOutputKind, SamplingParams

_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.TIMEOUT: "timeout",
}


@dataclass(slots=True)
class BranchState:
    """One sequence of a request: its text so far, and how much of it was taken."""

    record: JournalBranch  # owns the token ids
    token_ids: list[int]  # the record's
    detokenizer: Detokenizer | None  # None: no text wanted
    matcher: StopStringMatcher | None  # None: no stop strings
    logprobs: SampleLogprobs | None  # None: not wanted by the caller
    cumulative_logprob: float | None
    text: str = ""  # taken before, for cumulative outputs
    new_pieces: list[str] = field(default_factory=list)  # text since the last taking
    num_taken_tokens: int = 0
    is_news: bool = False  # something happened since the last taking
    # Detokenises tokens that bring text and nothing else, unless they end the branch; None: none.
    append_plain: Callable[[Sequence[int]], str] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    last_token_time_s: float = 0.0

    def plain_detokenizer(self) -> Callable[[Sequence[int]], str] | None:
        """The detokeniser, where text as it comes is all that further tokens lead to."""
        if self.detokenizer is None or self.finish_reason is not None:
            return None
        has_more = self.matcher is not None or self.cumulative_logprob is not None
        return None if has_more else self.detokenizer.append

    def append(self, ids: list[int], output: EngineOutput, params: SamplingParams) -> int:
        """Take in new tokens; return how many count, less than all after a stop string."""
        if self.detokenizer is not None:
            shown = ids
            if output.finish_reason is FinishReason.STOP and not params.include_stop_str_in_output:
                shown = ids[:-1]  # the stop token itself is no text
            if self.matcher is None:
                if text := self.detokenizer.append(shown):
                    self.new_pieces.append(text)
            elif (num_used := self._match(shown, params.min_tokens)) is not None:
                ids = ids[:num_used]
        self.token_ids += ids
        self.is_news = True
        return len(ids)

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End the branch: what was held back becomes text, unless a stop string ended it."""
        if self.detokenizer is not None and (self.matcher is None or self.matcher.matched is None):
            rest = self.detokenizer.finish()
            if self.matcher is not None:
                rest = self.matcher.append(rest)
                if self.matcher.matched is None:
                    rest += self.matcher.finish()
                elif reason not in (FinishReason.ABORT, FinishReason.TIMEOUT):
                    reason, stop_reason = FinishReason.STOP, self.matcher.matched
            self.new_pieces.append(rest)
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.record.is_finished = True
        self.is_news = True
        self.append_plain = None

    def _match(self, ids: list[int], min_tokens: int) -> int | None:
        """Detokenise one by one, so that the token that completes a stop string is known."""
        assert self.detokenizer is not None
        assert self.matcher is not None
        num_before = len(self.token_ids)
        for num_used, token_id in enumerate(ids, start=1):
            piece = self.detokenizer.append((token_id,))
            if not piece:
                continue
            may_stop = num_before + num_used >= min_tokens
            if shown := self.matcher.append(piece, may_stop=may_stop):
                self.new_pieces.append(shown)
            if self.matcher.matched is not None:
                return num_used
        return None


@dataclass(slots=True, eq=False)
class RequestState:
    """A request from admission to its end. ``entry`` is its journal entry."""

    req_id: str  # the name of the request on the wire
    request_id: str  # the caller's name for it
    prompt: str | None
    params: SamplingParams  # the caller's, not the wire's
    kind: RequestOutputKind
    entry: JournalEntry
    branches: list[BranchState]
    metrics: RequestMetrics
    logprob_decoder: LogprobDecoder
    lora_request: LoRARequest | None = None
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int | None = None
    num_unfinished: int = 0
    failure: EngineError | None = None  # why the request failed, as its caller is to be told
    is_news: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.num_unfinished == 0

    def update(self, output: EngineOutput, now_s: float) -> int | None:
        """Take in what one branch gained; return how many tokens, or None when nothing is new.

        Raises:
            EngineGenerateError: tokens were lost on the way.
        """
        branch = self.branches[output.index]
        ids = output.new_token_ids
        if output.first_index != len(branch.token_ids) or branch.finish_reason is not None:
            known = self.entry.new_tokens(output)
            if known is None:
                return None
            ids = known
        if self.num_cached_tokens is None:
            self._note_start(output)
        if output.prompt_logprobs is not None:
            self._note_prompt_logprobs(output)
        num_new = branch.append(ids, output, self.params)
        if num_new:
            branch.last_token_time_s = now_s
            if self.metrics.first_token_time is None:
                self.metrics.first_token_time = now_s
        if output.logprobs is not None and branch.cumulative_logprob is not None:
            skipped = len(output.logprobs) - len(ids)
            self._note_logprobs(branch, output, skipped, skipped + num_new)
        if branch.matcher is not None and (matched := branch.matcher.matched) is not None:
            self._finish_branch(branch, FinishReason.STOP, matched, now_s)
        elif output.finish_reason is not None:
            self._finish_branch(branch, output.finish_reason, output.stop_reason, now_s)
        self.is_news = True
        branch.append_plain = branch.plain_detokenizer()
        return num_new

    def append_plain(self, output: EngineOutput, now_s: float) -> float | None:
        """Take in the tokens of a running plain branch, as most outputs bring them.

        Returns:
            When the branch's tokens before these came; None when the output is anything else:
            nothing was taken in, and it is for ``update``.
        """
        branch = self.branches[output.index]
        append_text, token_ids = branch.append_plain, branch.token_ids
        if (
            append_text is None
            or output.finish_reason is not None
            or output.first_index != len(token_ids)
        ):
            return None
        new_ids = output.new_token_ids
        if text := append_text(new_ids):
            branch.new_pieces.append(text)
        token_ids += new_ids
        branch.is_news = self.is_news = True
        before_s, branch.last_token_time_s = branch.last_token_time_s, now_s
        return before_s

    def end(self, reason: FinishReason, now_s: float, failure: EngineError | None = None) -> None:
        """End every branch that still runs."""
        self.failure = failure
        for branch in self.branches:
            if branch.finish_reason is None:
                self._finish_branch(branch, reason, None, now_s)
        self.is_news = True

    def take(self) -> RequestOutput | None:
        """What happened since the last taking, or None when there is nothing to show."""
        if not self.is_news or (self.kind is RequestOutputKind.FINAL_ONLY and self.num_unfinished):
            return None
        self.is_news = False
        self._count_tokens()
        prompt_logprobs = self.prompt_logprobs
        if self.kind is RequestOutputKind.DELTA:
            self.prompt_logprobs = None
            branches = [branch for branch in self.branches if branch.is_news]
            outputs = [self._take_branch(branch, branch.record.index) for branch in branches]
        elif len(self.branches) == self.params.n:
            outputs = [self._take_branch(branch, branch.record.index) for branch in self.branches]
        else:
            best = sorted(self.branches, key=_by_likelihood)[: self.params.n]
            outputs = [self._take_branch(branch, rank) for rank, branch in enumerate(best)]
        return RequestOutput(  # by position what can be: it is built for every token
            self.request_id,
            self.prompt,
            self.entry.request.prompt_token_ids,
            prompt_logprobs,
            outputs,
            self.num_unfinished == 0,
            self.metrics,
            self.lora_request,
            num_cached_tokens=self.num_cached_tokens,
            error=None if self.failure is None else str(self.failure),
        )

    def skip(self, index: int, num_tokens: int) -> None:
        """Count a branch's first tokens and their text as taken before."""
        branch = self.branches[index]
        branch.new_pieces.clear()
        branch.num_taken_tokens = num_tokens

    def take_text(self, index: int) -> str:
        """A branch's new text, where that is all a stream shows; "" when there is none.

        Its tokens stay untaken: they are in the next output.
        """
        branch = self.branches[index]
        branch.is_news = False
        pieces = branch.new_pieces
        if len(pieces) == 1:
            return pieces.pop()
        text = "".join(pieces)
        pieces.clear()
        return text

    def _take_branch(self, branch: BranchState, index: int) -> CompletionOutput:
        pieces = branch.new_pieces
        text = pieces.pop() if len(pieces) == 1 else "".join(pieces)  # one is the common case
        pieces.clear()
        token_ids, logprobs = branch.token_ids, branch.logprobs
        if self.kind is RequestOutputKind.DELTA:
            token_ids = token_ids[branch.num_taken_tokens :]
            branch.num_taken_tokens = len(branch.token_ids)
            if logprobs is not None:
                branch.logprobs = []
        else:
            text = branch.text = branch.text + text if branch.text else text
            token_ids = token_ids.copy()
            logprobs = None if logprobs is None else logprobs.copy()
        branch.is_news = False
        reason = branch.finish_reason
        return CompletionOutput(
            index,
            text,
            token_ids,
            branch.cumulative_logprob,
            logprobs,
            None if reason is None else _FINISH_REASONS[reason],
            branch.stop_reason,
            self.lora_request,
        )

    def _note_start(self, output: EngineOutput) -> None:
        self.num_cached_tokens = output.num_cached_tokens
        scheduled_s = output.first_scheduled_time_s
        if scheduled_s is not None:
            self.metrics.first_scheduled_time = scheduled_s
            self.metrics.time_in_queue = scheduled_s - self.metrics.arrival_time

    def _note_prompt_logprobs(self, output: EngineOutput) -> None:
        new = self.entry.new_prompt_logprobs(output)
        if new:
            if self.prompt_logprobs is None:
                is_beginning = self.entry.num_prompt_logprobs == len(new)
                self.prompt_logprobs = [None] if is_beginning else []
            self.prompt_logprobs.extend(map(self.logprob_decoder.decode, new))

    def _count_tokens(self) -> None:
        """Bring the metrics up to date: nobody looks at them at every token."""
        metrics, first = self.metrics, self.branches[0]
        num_tokens, last_s = len(first.token_ids), first.last_token_time_s
        for branch in self.branches[1:]:
            num_tokens += len(branch.token_ids)
            last_s = max(last_s, branch.last_token_time_s)
        metrics.num_generation_tokens = num_tokens
        metrics.last_token_time = last_s or metrics.last_token_time

    def _note_logprobs(
        self, branch: BranchState, output: EngineOutput, start: int, end: int
    ) -> None:
        assert output.logprobs is not None
        assert branch.cumulative_logprob is not None
        for position in output.logprobs[start:end]:
            branch.cumulative_logprob += position.logprobs[0]
            if branch.logprobs is not None:
                branch.logprobs.append(self.logprob_decoder.decode(position))

    def _finish_branch(
        self, branch: BranchState, reason: FinishReason, stop: int | str | None, now_s: float
    ) -> None:
        branch.finish(reason, stop)
        self.num_unfinished -= 1
        if self.num_unfinished == 0:
            self.metrics.finished_time = now_s
            self._count_tokens()


def _by_likelihood(branch: BranchState) -> tuple[float, int]:
    """Sorting key: most likely first, then by index."""
    return -(branch.cumulative_logprob or 0.0), branch.record.index
