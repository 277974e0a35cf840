"""An executor without a model: its tokens are a function of (seed, position), at once, no torch.

For tests and measurements of everything that is not the model: name it in
``parallel_config.executor_class`` as "tests.engine_core.scripted_executor:ScriptedExecutor".
"""

import os
from array import array
from collections import deque
from dataclasses import dataclass
from typing import Any

from executor.executor import OnProgress
from ipc.config import EngineConfig
from ipc.messages import (
    LoadProgress,
    ModelRunnerOutput,
    RowLogprobs,
    RowParams,
    SchedulerOutput,
    TokenLogprobs,
    WorkerInfo,
    WorkerReady,
)
from ipc.operations import AnyOperation, CheckWorkers, IsSleeping
from ipc.records import TensorRef
from ipc.tensors import Frames, FrameWriter, read

VOCAB_SIZE = 8192
NUM_GPU_BLOCKS = 65536


def scripted_token(seed: int, position: int, vocab_size: int = VOCAB_SIZE) -> int:
    """The token that a row samples at ``position`` (prompt included)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 29)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed >> 32) % vocab_size


@dataclass(slots=True)
class Row:
    """What the worker knows of one row."""

    params: RowParams
    num_tokens: int
    num_computed_tokens: int
    num_prompt_tokens: int


class ScriptedExecutor:
    """Executes plans in the core's process, in no time. Keeps rows exactly as a worker does."""

    def __init__(self, config: EngineConfig) -> None:
        self._block_count = config.cache_config.num_gpu_blocks_override or NUM_GPU_BLOCKS
        self._rows: dict[int, Row] = {}
        self._answers: deque[tuple[ModelRunnerOutput, Frames]] = deque()
        self._num_steps = 0

    @property
    def channels(self) -> list[Any]:
        """Nothing to wait for: answers are there when ``submit`` returns."""
        return []

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Be ready."""
        on_progress(LoadProgress(0, "loading weights", 1, 1, 0.0))
        return WorkerReady(
            rank=0,
            pid=os.getpid(),
            model_digest="scripted",
            num_gpu_blocks=self._block_count,
            num_cpu_blocks=0,
            vocab_size=VOCAB_SIZE,
            weights_bytes=0,
            kv_cache_bytes=0,
            phases_s={},
        )

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Apply the plan's differences, compute its rows, sample those that are complete."""
        for row in plan.freed_rows:
            del self._rows[row]
        for new in plan.new_rows:
            assert new.row not in self._rows, f"row {new.row} is taken"
            self._rows[new.row] = Row(
                new.params, len(new.token_ids), new.num_computed_tokens, new.num_prompt_tokens
            )
        writer, sampled, logprobs, logits_rows = FrameWriter(), [], [], []
        counts = plan.num_new_tokens or [1] * len(plan.rows)
        for index, num_new_tokens in zip(plan.rows, counts, strict=True):
            row = self._rows[index]
            row.num_computed_tokens += num_new_tokens
            assert row.num_computed_tokens <= row.num_tokens, f"row {index} owes no token"
            if row.num_computed_tokens < row.num_tokens:
                continue
            if row.params.has_logits_processors:
                logits_rows.append((index, _write_logits(writer, row)))
                continue
            token_id = scripted_token(row.params.seed, row.num_tokens)
            sampled.append(token_id)
            row.num_tokens += 1
            if row.params.num_logprobs is not None:
                logprobs.append(RowLogprobs(index, _logprobs(token_id, row.params.num_logprobs)))
        for sample in plan.sample_rows:
            logits = read(sample.logits, frames).cast("f")
            sampled.append(max(range(len(logits)), key=logits.__getitem__))
            self._rows[sample.row].num_tokens += 1
        self._num_steps += 1
        output = ModelRunnerOutput(
            plan.step_id, sampled, logprobs=logprobs, logits_rows=logits_rows
        )
        self._answers.append((output, writer.frames))

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """The next answer, if a step was submitted."""
        return self._answers.popleft() if self._answers else None

    def call(self, operation: AnyOperation) -> list[Any]:
        """Answer what has an answer without a model."""
        match operation:
            case CheckWorkers():
                return [WorkerInfo(0, os.getpid(), "scripted", self._num_steps, 0)]
            case IsSleeping():
                return [False]
            case _:
                return [None]

    def check_health(self) -> None:
        """Always healthy."""

    def shutdown(self) -> None:
        """Nothing is held."""


def _write_logits(writer: FrameWriter, row: Row) -> TensorRef:
    logits = array("f", bytes(4 * VOCAB_SIZE))
    logits[scripted_token(row.params.seed, row.num_tokens)] = 1.0
    return writer.add(logits, "float32", [VOCAB_SIZE])


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    tops = [(token_id + offset) % VOCAB_SIZE for offset in range(max(num_top, 0))]
    values = [-0.5 * (place + 1) for place in range(len(tops))]
    return TokenLogprobs([token_id, *tops], [-0.5, *values], 1)
