"""What the answer to one step meant, for whoever tells the clients."""

from dataclasses import dataclass, field

from engine_core.request import Request
from ipc.messages import ModelRunnerOutput, RowLogprobs, TokenLogprobs
from ipc.records import TensorRef


@dataclass(slots=True)
class StepResult:
    """Who moved in a step. A request is in ``gained`` or in ``failed``, never in both."""

    step_id: int
    gained: list[Request] = field(default_factory=list)  # one token each, their newest
    finished: list[Request] = field(default_factory=list)  # those of ``gained`` that ended
    failed: list[Request] = field(default_factory=list)  # ended without a token
    logprobs: dict[Request, TokenLogprobs] = field(default_factory=dict)  # of the new tokens
    logits: list[tuple[Request, TensorRef]] = field(default_factory=list)  # for the frontend

    def collect(self, output: ModelRunnerOutput, by_row: dict[int, Request]) -> None:
        """Sort what an answer says about single rows; that of finished requests is dropped."""
        for row_logprobs in output.logprobs:
            request = by_row[row_logprobs.row]
            if request.finish_reason is None:
                self._note_logprobs(request, row_logprobs)
        for row, ref in output.logits_rows:
            request = by_row[row]
            user_logits = request.user_logits
            # After a preemption the same row is computed again: the user sees it once.
            if (
                request.finish_reason is None
                and user_logits is not None
                and request.num_tokens > user_logits.position_sent
            ):
                user_logits.position_sent = request.num_tokens
                self.logits.append((request, ref))

    def _note_logprobs(self, request: Request, row_logprobs: RowLogprobs) -> None:
        if row_logprobs.chosen is not None:
            self.logprobs[request] = row_logprobs.chosen
        if row_logprobs.prompt and request.prompt_logprobs is not None:
            request.prompt_logprobs.extend(row_logprobs.prompt)
