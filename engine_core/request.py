"""Requests as the core sees them: branches, the groups they form, and their legal moves.

A request of a client becomes one ``Request`` per branch (``n`` or ``best_of`` of them), tied
together by a ``RequestGroup``. Nothing here knows blocks' contents, workers or sockets.
"""

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum

from ipc.messages import FinishReason, Linger, RowParams, TokenLogprobs
from ipc.sampling_params import SamplingParams


class RequestStatus(IntEnum):
    """Where a branch stands."""

    WAITING = 0  # never ran; holds nothing
    RUNNING = 1  # holds a worker's row and blocks
    PREEMPTED = 2  # ran, gave everything back, computes again from its tokens
    SWAPPED = 3  # ran, its blocks lie in host memory
    FINISHED = 4  # ended; may hold its row and blocks until its last step is answered


_LEGAL_MOVES = {
    RequestStatus.WAITING: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.RUNNING: {
        RequestStatus.PREEMPTED,
        RequestStatus.SWAPPED,
        RequestStatus.FINISHED,
    },
    RequestStatus.PREEMPTED: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.SWAPPED: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.FINISHED: set(),
}


def branch_seed(seed: int, index: int) -> int:
    """The seed of a branch: the request's own for branch 0, else a hash of (seed, index).

    Signed 64 bits, like the seed itself; the same in every process and version of Python.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little", signed=True) + index.to_bytes(4, "little"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(slots=True, eq=False)
class RequestGroup:
    """What the branches of one client's request have in common. Owned by the core.

    ``branches`` is ordered by index. The leader computes the prompt; the others enter the
    waiting queue when it has, or when it ended.
    """

    client: bytes
    req_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int]
    arrival_s: float  # on the clock that the core passes to the scheduler
    root_hash: bytes  # parent of the first block's hash
    prompt_hashes: list[bytes] = field(default_factory=list)  # of the prompt's full blocks
    adapter_id: int | None = None
    priority: int = 0
    branches: list["Request"] = field(default_factory=list)
    held_back: list["Request"] = field(default_factory=list)  # branches waiting for the leader
    linger: Linger | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every branch has ended."""
        return all(branch.finish_reason is not None for branch in self.branches)

    def move_to_client(self, client: bytes, req_id: str) -> None:
        """Belong to another client, under its own name for the request."""
        self.client, self.req_id = client, req_id
        for branch in self.branches:
            branch.client, branch.req_id = client, req_id

    def prompt_holder(self, before_step_id: int) -> "Request | None":
        """A running branch whose prompt an earlier step computed: one to fork from."""
        for branch in self.branches:
            done = branch.prompt_done_step_id
            is_running = branch.status is RequestStatus.RUNNING
            if is_running and done is not None and done < before_step_id:
                return branch
        return None

    def is_computing_prompt(self, step_id: int) -> bool:
        """Whether a running branch will be one to fork from in a later step."""
        return any(
            branch.status is RequestStatus.RUNNING
            and (branch.prompt_done_step_id is None or branch.prompt_done_step_id >= step_id)
            for branch in self.branches
        )


@dataclass(slots=True, eq=False)
class UserLogits:
    """State of a branch whose logits visit the user's processors before each sampling."""

    position_sent: int = -1  # of the newest row of logits that went to the frontend
    answer: memoryview | bytes | None = None  # [V] float32, back from the processors


@dataclass(slots=True, eq=False)
class Request:
    """One branch. The scheduler writes progress, the KV cache manager writes what it keeps there.

    ``num_computed_tokens`` counts tokens whose KV exists once every submitted step has run;
    ``num_output_placeholders`` counts samples of submitted steps that are not known yet. So a
    branch owes ``num_tokens + num_output_placeholders - num_computed_tokens`` tokens.
    """

    group: RequestGroup
    index: int
    row_params: RowParams
    max_output_tokens: int
    max_num_tokens: int = 0  # prompt included
    order: tuple[int, int, int] = (0, 0, 0)  # (priority, arrival, index): smaller goes first
    # -- copied from the group: read once per token --
    client: bytes = b""
    req_id: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    watched_token_ids: frozenset[int] = frozenset()  # both: worth a look by the stop checker
    # -- progress, written by the scheduler --
    output_token_ids: list[int] = field(default_factory=list)
    num_output_placeholders: int = 0
    num_computed_tokens: int = 0
    decode_until: int = 0  # below this many computed tokens a decode step needs no decision
    status: RequestStatus = RequestStatus.WAITING
    row: int | None = None
    num_released_told: int = 0  # ``num_released_blocks`` as its row's worker knows it
    last_step_id: int = -1  # newest step that computes or samples this branch
    prompt_done_step_id: int | None = None  # step that completed the prompt's blocks held now
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_preemptions: int = 0
    first_scheduled_s: float | None = None
    num_cached_tokens: int | None = None  # prompt tokens found in the cache when first scheduled
    user_logits: UserLogits | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # so far; None unless asked for
    needs_full_output: bool = True  # the next output carries more than a token
    has_reported: bool = False  # an output was made for it
    # -- written by the KV cache manager --
    block_ids: list[int] = field(default_factory=list)  # NULL_BLOCK_ID behind the window
    cpu_block_ids: list[int] = field(default_factory=list)  # while SWAPPED
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of known tokens
    num_remembered_blocks: int = 0  # leading blocks already offered for prefix reuse
    num_released_blocks: int = 0  # leading blocks that fell behind the sliding window
    is_tainted: bool = False  # NaN was seen: its blocks must not be found by others

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_tokens_owed(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_tokens + self.num_output_placeholders - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logits of prompt positions are still to be reported."""
        return (
            self.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
        )

    @property
    def awaits_user(self) -> bool:
        """Whether the next token hangs on logits that are at the frontend."""
        logits = self.user_logits
        return (
            logits is not None and logits.answer is None and logits.position_sent >= self.num_tokens
        )

    def token_slice(self, start: int, end: int) -> list[int]:
        """Known tokens ``start`` to ``end``; without copying the whole prompt."""
        num_prompt = self.num_prompt_tokens
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        output = self.output_token_ids[max(0, start - num_prompt) : end - num_prompt]
        return self.prompt_token_ids[start:] + output

    def move_to(self, status: RequestStatus) -> None:
        """Change status; an illegal move is a bug here, never a client's fault."""
        assert status in _LEGAL_MOVES[self.status], f"{self.status.name} -> {status.name}"
        self.status = status

    def finish(
        self, reason: FinishReason, stop_reason: int | None = None, error: str | None = None
    ) -> None:
        """End this branch: it will be planned no more."""
        self.move_to(RequestStatus.FINISHED)
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.error = error
        self.decode_until = 0
        self.needs_full_output = True


def make_branch(
    group: RequestGroup,
    index: int,
    row_params: RowParams,
    *,
    order: tuple[int, int, int],
    max_output_tokens: int,
) -> Request:
    """Build branch ``index`` of ``group`` and add it to the group."""
    params = group.params
    eos = frozenset() if params.ignore_eos else group.eos_token_ids
    stop = frozenset(params.stop_token_ids or ())
    branch = Request(
        group=group,
        index=index,
        row_params=row_params,
        max_output_tokens=max_output_tokens,
        max_num_tokens=len(group.prompt_token_ids) + max_output_tokens,
        order=order,
        client=group.client,
        req_id=group.req_id,
        prompt_token_ids=group.prompt_token_ids,
        num_prompt_tokens=len(group.prompt_token_ids),
        params=params,
        eos_token_ids=eos,
        stop_token_ids=stop,
        watched_token_ids=eos | stop,
    )
    if row_params.has_logits_processors:
        branch.user_logits = UserLogits()
    if row_params.num_prompt_logprobs is not None:
        branch.prompt_logprobs = []
    group.branches.append(branch)
    return branch
