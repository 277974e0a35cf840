"""One step on the device: the plan's difference, inputs, forward, sampling, and the answer.

Everything is queued on the device without waiting for it. ``execute`` returns a ``PendingStep``;
resolving it waits for that step alone, so the next step can be launched while the ids of this one
travel. On a CPU a step is done when ``execute`` returns.
Shapes: T packed tokens, S rows that sample, H hidden size, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from executor.input_batch import SamplePlaces, build_input_batch, place_samples
from executor.kv_cache import KVCache
from executor.logprobs import PendingLogprobs, compute_logprobs, prompt_logprobs
from executor.models.interface import CausalLM
from executor.request_states import RequestStates
from executor.sampler import sample_rows
from executor.sampling_states import Wish
from executor.transfer import Array, download, upload
from ipc.messages import ModelRunnerOutput, RowLogprobs, SampleRow, SchedulerOutput, TokenLogprobs
from ipc.tensors import Frames, FrameWriter, read


@dataclass(frozen=True, slots=True)
class PendingSample:
    """Sampled ids on their way to the host."""

    rows: Array  # [S]
    result: Tensor  # [2, S] int64: the ids, and whether each row is bad
    logprobs_rows: Array  # those that ask, in order
    logprobs: PendingLogprobs | None


@dataclass(slots=True)
class PendingStep:
    """A launched step. ``resolve`` it in launch order, from any thread."""

    step_id: int
    bad_rows: set[int]  # the runner's; resolving adds to it
    samples: list[PendingSample] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, list[PendingLogprobs]]] = field(default_factory=list)
    logits_rows: list[tuple[Array, Tensor]] = field(default_factory=list)  # [P], [P, V]
    started: "torch.cuda.Event | None" = None  # None on a CPU
    finished: "torch.cuda.Event | None" = None
    device_time_s: float = 0.0

    def resolve(self) -> tuple[ModelRunnerOutput, Frames]:
        """Wait until the device has done the step, and read its answer."""
        if self.started is not None and self.finished is not None:
            self.finished.synchronize()
            self.device_time_s = self.started.elapsed_time(self.finished) / 1000
        token_ids: list[int] = []
        nan_rows: list[int] = []
        chosen: dict[int, TokenLogprobs] = {}
        for sample in self.samples:
            ids, is_bad = sample.result.tolist()
            token_ids += ids
            nan_rows += [row for row, bad in zip(sample.rows.tolist(), is_bad, strict=True) if bad]
            if sample.logprobs is not None:
                parts = sample.logprobs.unpack()
                chosen.update(zip(sample.logprobs_rows.tolist(), parts, strict=True))
        writer = FrameWriter()
        logits_refs = []
        for rows, logits in self.logits_rows:
            for row, one in zip(rows.tolist(), logits, strict=True):
                if one.isnan().any():
                    nan_rows.append(row)
                else:
                    logits_refs.append((row, writer.add(one.numpy(), "float32", list(one.shape))))
        self.bad_rows.update(nan_rows)
        output = ModelRunnerOutput(
            step_id=self.step_id,
            sampled_token_ids=token_ids,
            logprobs=self._row_logprobs(chosen),
            nan_rows=nan_rows,
            logits_rows=logits_refs,
            device_time_s=self.device_time_s,
        )
        return output, writer.frames

    def _row_logprobs(self, chosen: dict[int, TokenLogprobs]) -> list[RowLogprobs]:
        prompts = {
            row: [part for pending in slices for part in pending.unpack()]
            for row, slices in self.prompt_logprobs
        }
        rows = dict.fromkeys([*prompts, *chosen])
        return [RowLogprobs(row, chosen.get(row), prompts.get(row)) for row in rows]


class ModelRunner:
    """Owns the launch of steps. The rows, the cache and the model are handed to it."""

    def __init__(self, model: CausalLM, kv_cache: KVCache, states: RequestStates) -> None:
        self.num_steps = 0
        self._model = model
        self._kv_cache = kv_cache
        self._states = states
        self._is_cuda = states.device.type == "cuda"
        self._bad_rows: set[int] = set()  # their blocks may hold NaN
        # Raw logits of rows that are with the user's processors and want log-probabilities.
        self._raw_logits: dict[int, Tensor] = {}

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput, frames: Frames = ()) -> PendingStep:
        """Launch one step.

        Args:
            plan: the step; its rows must hold at least the blocks that the step needs.
            frames: the arrays that ``plan.sample_rows`` name.
        """
        step = PendingStep(plan.step_id, self._bad_rows)
        start_s = time.perf_counter()
        if self._is_cuda:
            step.started = _record_event()
        self._apply(plan)
        if plan.rows:
            self._forward(plan, step)
        if plan.sample_rows:
            self._sample_returned(plan.sample_rows, frames, step)
        if self._is_cuda:
            step.finished = _record_event()
        else:
            step.device_time_s = time.perf_counter() - start_s
        self.num_steps += 1
        return step

    def _apply(self, plan: SchedulerOutput) -> None:
        """Bring rows and cache to where the plan starts from."""
        for row in plan.freed_rows:
            self._raw_logits.pop(row, None)
            if row in self._bad_rows:
                self._bad_rows.discard(row)
                self._kv_cache.scrub(self._states.block_ids(row))
        if plan.swap_out:
            self._kv_cache.swap_out(plan.swap_out)
        if plan.swap_in:
            self._kv_cache.swap_in(plan.swap_in)
        if plan.block_copies:
            self._kv_cache.copy_blocks(plan.block_copies)
        self._states.apply(plan)

    def _forward(self, plan: SchedulerOutput, step: PendingStep) -> None:
        batch = build_input_batch(plan, self._states)
        hidden = self._model.forward(
            batch.token_ids, batch.positions, self._kv_cache.layers, batch.meta
        )
        if batch.wishes & Wish.PROMPT_LOGPROBS:
            step.prompt_logprobs = prompt_logprobs(
                batch, self._states, hidden, self._model.compute_logits
            )
        self._states.advance(batch.rows, batch.num_new_tokens)
        if batch.samples is None:
            return
        if batch.logit_indices is not None:
            hidden = hidden.index_select(0, batch.logit_indices)
        logits = self._model.compute_logits(hidden)
        if batch.wishes & Wish.PROCESSORS:
            self._send_out(logits, batch.samples.rows, step)
        else:
            self._sample(logits, batch.samples, step, raw_logits=logits)

    def _send_out(self, logits: Tensor, rows: Array, step: PendingStep) -> None:
        """Rows with processors leave as raw logits; the others are sampled now."""
        leaving = self._states.sampling.rows_with(rows, Wish.PROCESSORS)
        leaving_rows = rows[leaving]
        raw_logits = logits.index_select(0, upload(leaving, self._states.device))
        step.logits_rows.append((leaving_rows, download(raw_logits)))
        for i in self._states.sampling.rows_with(leaving_rows, Wish.LOGPROBS).tolist():
            self._raw_logits[int(leaving_rows[i])] = raw_logits[i]
        staying = np.setdiff1d(np.arange(rows.size), leaving)
        if staying.size:
            logits = logits.index_select(0, upload(staying, self._states.device))
            places = place_samples(rows[staying], self._states)
            self._sample(logits, places, step, raw_logits=logits)

    def _sample_returned(
        self, sample_rows: Sequence[SampleRow], frames: Frames, step: PendingStep
    ) -> None:
        """Sample rows whose logits come back from the user's processors."""
        rows = np.array([sample_row.row for sample_row in sample_rows], dtype=np.int64)
        returned = [
            np.frombuffer(read(sample_row.logits, frames), dtype=np.float32)
            for sample_row in sample_rows
        ]
        logits = upload(np.stack(returned), self._states.device)
        asking = self._states.sampling.rows_with(rows, Wish.LOGPROBS)
        raw_logits = logits
        if asking.size:
            raw_logits = logits.clone()
            for i in asking.tolist():
                raw_logits[i] = self._raw_logits.pop(int(rows[i]))
        self._sample(logits, place_samples(rows, self._states), step, raw_logits=raw_logits)

    def _sample(
        self, logits: Tensor, places: SamplePlaces, step: PendingStep, *, raw_logits: Tensor
    ) -> None:
        """Draw, write the ids where the next step reads them, and send them to the host.

        Args:
            logits: [S, V], changed in place.
            raw_logits: [S, V] as the model made them; may be ``logits`` itself.
        """
        sampling = self._states.sampling
        asking = places.rows[:0]
        if places.wishes & Wish.LOGPROBS:
            asking = sampling.rows_with(places.rows, Wish.LOGPROBS)
            on_device = upload(asking, self._states.device)
            raw_logits = raw_logits.index_select(0, on_device)  # before they change
        sampled = sample_rows(logits, places, self._states)
        self._states.append(places.rows, places.places, sampled.token_ids)
        logprobs = None
        if asking.size:
            wanted = [sampling.of(row).params.num_logprobs or 0 for row in places.rows[asking]]
            token_ids = sampled.token_ids.index_select(0, on_device)
            logprobs = compute_logprobs(raw_logits, token_ids, wanted)
        result = torch.stack((sampled.token_ids, sampled.is_bad.to(torch.int64)))
        step.samples.append(
            PendingSample(places.rows, download(result), places.rows[asking], logprobs)
        )


def _record_event() -> "torch.cuda.Event":
    """An event behind everything queued so far; waiting for it sleeps instead of spinning."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
