"""An executor that computes nothing but remembers what a real one would have in its cache.

Each slot of a KV block holds the digest of the tokens up to its position, which is what the KV of
a real model depends on. Before a row attends, every slot it can see is compared with the row's
own tokens; a wrong block table, a missed copy, a stale prefix or a block released too early
therefore fails in the very step that would have computed nonsense.

Sampled tokens are a function of (seed, position, digest of all tokens before), so a request's
output does not depend on how it was scheduled, and ``solo_run`` says what it must be.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine_core.request import branch_seed
from ipc.messages import (
    AddRequest,
    FinishReason,
    ModelRunnerOutput,
    NewRow,
    RowLogprobs,
    RowParams,
    SchedulerOutput,
    TokenLogprobs,
    WorkerReady,
)
from ipc.operations import AnyOperation
from ipc.records import TensorRef
from ipc.tensors import Frames, read

VOCAB_SIZE = 61

UserProcessor = Callable[[Sequence[float]], list[float]]

DECODE_S = 0.004  # what a step claims to take, and what each token of a prompt adds to it
PROMPT_TOKEN_S = 0.00002


def extend_digests(digests: list[int], token_ids: Sequence[int]) -> None:
    """Append the digest of each prefix that ends in one of ``token_ids``."""
    digest = digests[-1] if digests else 1
    for token_id in token_ids:
        digest = hash((digest, token_id))
        digests.append(digest)


def raw_logits(seed: int, position: int, digest: int) -> "array[float]":
    """The model's logits for the token at ``position``."""
    mixed = hash((seed, position, digest))
    return array("f", [(mixed >> (j % 40)) % (997 + j) for j in range(VOCAB_SIZE)])


def argmax(logits: Sequence[float]) -> int:
    return max(range(len(logits)), key=logits.__getitem__)


def sample(params: RowParams, position: int, digest: int, num_output: int) -> int:
    """The token at ``position``; stop tokens step aside while ``min_tokens`` are not output."""
    token_id = hash((params.seed, position, digest)) % VOCAB_SIZE
    while num_output < params.min_tokens and token_id in params.stop_token_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


@dataclass
class SoloRun:
    """What a branch must produce however it is scheduled."""

    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | None


def solo_run(
    request: AddRequest, index: int, max_model_len: int, process: UserProcessor | None = None
) -> SoloRun:
    """The output of one branch, computed without any engine."""
    params = request.params
    assert params.seed is not None
    seed = branch_seed(params.seed, index)
    eos = set() if params.ignore_eos else set(request.eos_token_ids)
    stops = set(params.stop_token_ids or ())
    row_params = RowParams(
        seed=seed,
        temperature=1.0,
        min_tokens=params.min_tokens,
        stop_token_ids=sorted(eos | stops),
    )
    digests: list[int] = []
    extend_digests(digests, request.prompt_token_ids)
    output: list[int] = []
    limit = max_model_len - len(request.prompt_token_ids)
    limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
    while True:
        position = len(request.prompt_token_ids) + len(output)
        if process is not None:
            token_id = argmax(process(raw_logits(seed, position, digests[-1])))
        else:
            token_id = sample(row_params, position, digests[-1], len(output))
        output.append(token_id)
        extend_digests(digests, [token_id])
        if len(output) > params.min_tokens and token_id in eos:
            return SoloRun(output, FinishReason.STOP, None)
        if len(output) > params.min_tokens and token_id in stops:
            return SoloRun(output, FinishReason.STOP, token_id)
        if len(output) >= limit:
            return SoloRun(output, FinishReason.LENGTH, None)


@dataclass
class SimulatedRow:
    """A worker's row."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[int]
    params: RowParams
    num_prompt_logprobs_sent: int
    digests: list[int] = field(default_factory=list)
    has_logits: bool = False  # computed here, on their way to the user


class SimulatedExecutor:
    """Executes plans at once, in order, and answers them in order.

    Order of work: freed rows, swap out, swap in, copies, new rows, new blocks, released blocks,
    then all rows store their KV, then all rows attend and sample, then the sample rows.
    """

    def __init__(
        self,
        *,
        block_size: int,
        num_gpu_blocks: int,
        num_cpu_blocks: int = 0,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        sliding_window: int | None = None,
        is_nan: Callable[[RowParams, int], bool] = lambda params, position: False,
    ) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.sliding_window = sliding_window
        self.is_nan = is_nan
        self.gpu: list[list[int | None]] = [[None] * block_size for _ in range(num_gpu_blocks)]
        self.cpu: list[list[int | None]] = [[None] * block_size for _ in range(num_cpu_blocks)]
        self.rows: dict[int, SimulatedRow] = {}
        self.plans: list[SchedulerOutput] = []
        self.operations: list[AnyOperation] = []
        self._answers: deque[tuple[ModelRunnerOutput, Frames]] = deque()

    @property
    def ready(self) -> WorkerReady:
        return WorkerReady(
            rank=0,
            pid=0,
            model_digest="simulated",
            num_gpu_blocks=len(self.gpu),
            num_cpu_blocks=len(self.cpu),
            vocab_size=VOCAB_SIZE,
            weights_bytes=0,
            kv_cache_bytes=0,
            phases_s={},
        )

    # ------------------------------------------------------------ the executor's interface

    def start(self, on_progress: Callable[[Any], None]) -> WorkerReady:
        return self.ready

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        self.plans.append(plan)
        self._move_blocks(plan)
        self._update_rows(plan)
        self._answers.append(self._run(plan, frames))

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        return self._answers.popleft() if self._answers else None

    def call(self, operation: AnyOperation) -> list[Any]:
        self.operations.append(operation)
        return [["trace.json"]] if type(operation).__name__ == "StopProfile" else [None]

    @property
    def channels(self) -> list[Any]:
        return []

    def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        self.rows.clear()

    # ------------------------------------------------------------ one step

    def _move_blocks(self, plan: SchedulerOutput) -> None:
        for row in plan.freed_rows:
            del self.rows[row]  # KeyError: a row was freed twice
        for gpu_id, cpu_id in plan.swap_out:
            assert 0 not in (gpu_id, cpu_id), "the null block is never swapped"
            self.cpu[cpu_id] = list(self.gpu[gpu_id])
        for cpu_id, gpu_id in plan.swap_in:
            assert 0 not in (gpu_id, cpu_id), "the null block is never swapped"
            self.gpu[gpu_id] = list(self.cpu[cpu_id])
        destinations = [destination for _, destination in plan.block_copies]
        assert len(set(destinations)) == len(destinations)
        for source, destination in plan.block_copies:
            assert 0 not in (source, destination), "the null block is never copied"
            self.gpu[destination] = list(self.gpu[source])

    def _update_rows(self, plan: SchedulerOutput) -> None:
        for new in plan.new_rows:
            self._open_row(new)
        for row, block_ids in plan.new_block_ids:
            assert block_ids
            assert 0 not in block_ids
            self.rows[row].block_ids.extend(block_ids)
        for row, num_released in plan.released_block_ids:
            self.rows[row].block_ids[:num_released] = [0] * num_released

    def _open_row(self, new: NewRow) -> None:
        assert 0 <= new.row < self.max_num_seqs
        assert new.row not in self.rows, f"row {new.row} is taken"
        assert all(0 <= block_id < len(self.gpu) for block_id in new.block_ids)
        assert 0 < new.num_prompt_tokens <= len(new.token_ids)
        assert new.num_computed_tokens <= len(new.token_ids)
        row = SimulatedRow(
            list(new.token_ids),
            new.num_prompt_tokens,
            new.num_computed_tokens,
            list(new.block_ids),
            new.params,
            new.num_prompt_logprobs_sent,
        )
        extend_digests(row.digests, row.token_ids)
        self.rows[new.row] = row

    def _run(self, plan: SchedulerOutput, frames: Frames) -> tuple[ModelRunnerOutput, Frames]:
        counts = plan.num_new_tokens or [1] * len(plan.rows)
        self._check_batch(plan, counts)
        for row_id, count in zip(plan.rows, counts, strict=True):
            self._store(self.rows[row_id], count)
        answer = _Answer()
        for row_id, count in zip(plan.rows, counts, strict=True):
            row = self.rows[row_id]
            self._check_attention(row, count)
            prompt = self._prompt_logprobs(row, count)
            row.num_computed_tokens += count
            chosen = None
            if row.num_computed_tokens == len(row.token_ids):
                chosen = self._finish_row(row_id, row, answer)
            if prompt or chosen:
                answer.logprobs.append(RowLogprobs(row_id, chosen, prompt or None))
        for sample_row in plan.sample_rows:
            row = self.rows[sample_row.row]
            assert row.num_computed_tokens == len(row.token_ids), "no logits were computed"
            assert row.has_logits, "logits of an earlier life of this request, not of this row"
            row.has_logits = False
            logits = read(sample_row.logits, frames).cast("f").tolist()
            self._append(row, argmax(logits), answer)
        num_prompt_tokens = sum(count for count in counts if count > 1)
        device_time_s = DECODE_S + num_prompt_tokens * PROMPT_TOKEN_S
        return answer.message(plan.step_id, device_time_s), answer.frames

    def _check_batch(self, plan: SchedulerOutput, counts: Sequence[int]) -> None:
        assert plan.rows or plan.sample_rows, "an empty plan"
        assert len(set(plan.rows)) == len(plan.rows)
        assert sum(counts) <= self.max_num_batched_tokens
        owed = [len(self.rows[r].token_ids) - self.rows[r].num_computed_tokens for r in plan.rows]
        assert all(1 <= n <= o for n, o in zip(counts, owed, strict=True)), (counts, owed)
        is_prefill = [o > 1 for o in owed]
        assert is_prefill == sorted(is_prefill), "rows that owe one token come first"
        written: Counter[int] = Counter()
        for row_id, count in zip(plan.rows, counts, strict=True):
            row = self.rows[row_id]
            first, end = row.num_computed_tokens, row.num_computed_tokens + count
            size = self.block_size
            written.update(row.block_ids[i] for i in range(first // size, -(-end // size)))
        assert all(n == 1 for n in written.values()), "two rows write into one block"

    def _store(self, row: SimulatedRow, count: int) -> None:
        size = self.block_size
        for position in range(row.num_computed_tokens, row.num_computed_tokens + count):
            block_id = row.block_ids[position // size]
            assert block_id, "KV is written into the null block"
            self.gpu[block_id][position % size] = row.digests[position]

    def _check_attention(self, row: SimulatedRow, count: int) -> None:
        """Every slot that the step's queries see holds this very row's token."""
        size, start = self.block_size, 0
        end = row.num_computed_tokens + count
        if self.sliding_window is not None:
            start = max(0, row.num_computed_tokens - self.sliding_window + 1)
        for i in range(start // size, -(-end // size)):
            low, high = max(start, i * size), min(end, (i + 1) * size)
            seen = self.gpu[row.block_ids[i]][low - i * size : high - i * size]
            assert seen == row.digests[low:high], (
                f"positions {low}..{high} in block {row.block_ids[i]} are not this row's"
            )

    def _prompt_logprobs(self, row: SimulatedRow, count: int) -> list[TokenLogprobs]:
        if row.params.num_prompt_logprobs is None:
            return []
        first = max(row.num_computed_tokens, row.num_prompt_logprobs_sent)
        last = min(row.num_computed_tokens + count, row.num_prompt_tokens - 1)
        return [
            TokenLogprobs([row.token_ids[p + 1]], [float(p + 1)], 1) for p in range(first, last)
        ]

    def _finish_row(
        self, row_id: int, row: SimulatedRow, answer: "_Answer"
    ) -> TokenLogprobs | None:
        position = len(row.token_ids)
        if self.is_nan(row.params, position):
            answer.nan_rows.append(row_id)
            if not row.params.has_logits_processors:
                self._append(row, 0, answer)
            return None
        if row.params.has_logits_processors:
            row.has_logits = True
            logits = raw_logits(row.params.seed, position, row.digests[-1])
            ref = TensorRef(len(answer.frames), "float32", [VOCAB_SIZE])
            answer.frames.append(memoryview(logits).cast("B"))
            answer.logits_rows.append((row_id, ref))
            return None
        num_output = position - row.num_prompt_tokens
        token_id = sample(row.params, position, row.digests[-1], num_output)
        self._append(row, token_id, answer)
        if row.params.num_logprobs is None:
            return None
        return TokenLogprobs([token_id], [float(position)], 1)

    def _append(self, row: SimulatedRow, token_id: int, answer: "_Answer") -> None:
        row.token_ids.append(token_id)
        extend_digests(row.digests, [token_id])
        answer.sampled_token_ids.append(token_id)


@dataclass
class _Answer:
    """An answer in the making."""

    sampled_token_ids: list[int] = field(default_factory=list)
    logprobs: list[RowLogprobs] = field(default_factory=list)
    nan_rows: list[int] = field(default_factory=list)
    logits_rows: list[tuple[int, TensorRef]] = field(default_factory=list)
    frames: list[bytes | memoryview] = field(default_factory=list)

    def message(self, step_id: int, device_time_s: float) -> ModelRunnerOutput:
        return ModelRunnerOutput(
            step_id,
            self.sampled_token_ids,
            self.logprobs,
            self.nan_rows,
            self.logits_rows,
            device_time_s=device_time_s,
        )
