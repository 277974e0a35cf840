"""One step while it is planned, and what is kept of it until its answer arrives."""

from dataclasses import dataclass, field

from engine_core.kv_cache_manager import Transfers
from engine_core.request import Request
from ipc.messages import NewRow, SampleRow, SchedulerOutput
from ipc.records import TensorRef
from ipc.tensors import Frames


@dataclass(slots=True)
class StepInFlight:
    """A submitted step: what its answer's positions mean."""

    step_id: int
    rows: list[int]
    requests: list[Request]  # parallel to ``rows``
    sample_rows: list[int]
    sampling: list[Request]  # who gains a token, in the order of the answer
    num_tokens: int
    num_prompt_tokens: int
    num_decodes: int  # rows that compute one token behind their prompt
    planned_s: float

    def requests_by_row(self) -> dict[int, Request]:
        """Who sits in which row during this step."""
        by_row = dict(zip(self.rows, self.requests, strict=True))
        num_sampled = len(self.sample_rows)
        if num_sampled:
            by_row.update(zip(self.sample_rows, self.sampling[-num_sampled:], strict=True))
        return by_row


@dataclass(slots=True)
class StepBuilder:
    """Collects a plan. Rows that owe one token come first; the scheduler's loop fills those.

    ``rows`` and ``requests`` are parallel. Lists are handed to the plan, never used again.
    """

    step_id: int
    max_tokens: int
    now_s: float
    rows: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    prefill_rows: list[int] = field(default_factory=list)
    prefill_requests: list[Request] = field(default_factory=list)
    prefill_num_tokens: list[int] = field(default_factory=list)
    is_sampling: list[bool] = field(default_factory=list)  # parallel to the prefill lists
    new_rows: list[NewRow] = field(default_factory=list)
    new_block_ids: list[tuple[int, list[int]]] = field(default_factory=list)
    released: list[tuple[int, int]] = field(default_factory=list)
    sample_rows: list[SampleRow] = field(default_factory=list)
    sample_requests: list[Request] = field(default_factory=list)
    frames: list[bytes | memoryview] = field(default_factory=list)
    num_prefill_tokens: int = 0
    num_prompt_tokens: int = 0
    has_preempted: bool = False
    has_user_logits: bool = False

    @property
    def num_scheduled(self) -> int:
        """Rows that compute something."""
        return len(self.rows) + len(self.prefill_rows)

    @property
    def token_budget(self) -> int:
        """Tokens that may still be added."""
        return self.max_tokens - len(self.rows) - self.num_prefill_tokens

    @property
    def is_empty(self) -> bool:
        """Whether a worker would have nothing to compute and nothing to sample."""
        return not (self.rows or self.prefill_rows or self.sample_rows)

    def add(self, request: Request, num_new_tokens: int, *, num_owed: int) -> None:
        """Schedule a row for ``num_new_tokens`` of the tokens it owes."""
        assert request.row is not None
        self.has_user_logits |= request.user_logits is not None
        if num_owed == 1:
            self.rows.append(request.row)
            self.requests.append(request)
            return
        self.prefill_rows.append(request.row)
        self.prefill_requests.append(request)
        self.prefill_num_tokens.append(num_new_tokens)
        self.is_sampling.append(num_new_tokens == num_owed)
        self.num_prefill_tokens += num_new_tokens

    def add_sample(self, request: Request, logits: memoryview | bytes, vocab_size: int) -> None:
        """Sample a row from logits that came back from the user."""
        assert request.row is not None
        ref = TensorRef(len(self.frames), "float32", [vocab_size])
        self.sample_rows.append(SampleRow(request.row, ref))
        self.sample_requests.append(request)
        self.frames.append(logits)

    def build(
        self, freed_rows: list[int], transfers: Transfers
    ) -> tuple[SchedulerOutput, Frames, StepInFlight]:
        """The plan, its frames, and the record to keep."""
        sampling = self._sampling()
        num_new_tokens: list[int] = []
        if self.prefill_rows:
            if self.num_prefill_tokens > len(self.prefill_rows):
                num_new_tokens = [1] * len(self.rows) + self.prefill_num_tokens
            self.rows += self.prefill_rows
            self.requests += self.prefill_requests
        num_tokens = len(self.rows) - len(self.prefill_rows) + self.num_prefill_tokens
        plan = SchedulerOutput(
            self.step_id,
            self.rows,
            num_new_tokens,
            self.new_rows,
            self.new_block_ids,
            freed_rows,
            transfers.swap_out,
            transfers.swap_in,
            transfers.copies,
            self.sample_rows,
            self.released,
        )
        in_flight = StepInFlight(
            self.step_id,
            self.rows,
            self.requests,
            [sample.row for sample in self.sample_rows],
            sampling,
            num_tokens,
            self.num_prompt_tokens,
            len(self.rows) - len(self.prefill_rows),
            self.now_s,
        )
        return plan, self.frames, in_flight

    def _sampling(self) -> list[Request]:
        """Who gains a token: rows that compute their last known one, then the sampled rows."""
        if not (self.prefill_rows or self.sample_rows or self.has_user_logits):
            return self.requests
        finishing = [
            request
            for request, samples in zip(self.prefill_requests, self.is_sampling, strict=True)
            if samples
        ]
        sampling = [*self.requests, *finishing]
        if self.has_user_logits:
            sampling = [request for request in sampling if request.user_logits is None]
        return sampling + self.sample_requests
