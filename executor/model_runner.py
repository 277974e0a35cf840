"""One step on the device: the plan's difference, inputs, forward, sampling, and the answer.

Everything is queued on the device without waiting for it. ``execute`` returns a ``PendingStep``;
resolving it waits for that step alone, so the next step can be launched while the ids of this one
travel. On a CPU a step is done when ``execute`` returns. Where there are recorded steps, a step
that fits one is a single launch; what some rows want beyond a plain draw follows eagerly.
Shapes: T packed tokens, S rows that sample, H hidden size, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from executor.cuda_graphs import (
    DecodeGraph,
    DrawGraph,
    GraphSizes,
    Parts,
    Recorder,
    StepGraphs,
    take_away,
)
from executor.input_batch import (
    PackedRows,
    SamplePlaces,
    build_input_batch,
    locate_samples,
    pack_rows,
    place_samples,
)
from executor.kv_cache import KVCache
from executor.logprobs import PendingLogprobs, compute_logprobs, prompt_logprobs
from executor.models.interface import CausalLM
from executor.request_states import RequestStates
from executor.sampler import sample_rows
from executor.sampling_states import MORE_THAN_DRAWN, Wish
from executor.step_buffers import Staging, StagingPool
from executor.transfer import Array, download, upload
from ipc.messages import ModelRunnerOutput, RowLogprobs, SampleRow, SchedulerOutput, TokenLogprobs
from ipc.tensors import Frames, FrameWriter, read


@dataclass(frozen=True, slots=True)
class Drawn:
    """Sampled ids on the device, and log-probabilities on their way to the host."""

    result: Tensor  # [2, S] int64: the ids, and whether each row is bad
    logprobs_rows: Array  # those that ask, in order
    logprobs: PendingLogprobs | None


@dataclass(frozen=True, slots=True)
class PendingSample:
    """Sampled ids on their way to the host."""

    rows: Array  # [S]
    result: Tensor  # [2, >= S]: the ids, and whether each row is bad
    columns: Array | None = None  # [S] of the result; None: the first ones
    logprobs_rows: Array | None = None
    logprobs: PendingLogprobs | None = None

    def read(self) -> tuple[list[int], list[int]]:
        """The ids, and the rows among them that are bad."""
        result = self.result.numpy()
        result = result[:, : self.rows.size] if self.columns is None else result[:, self.columns]
        ids, is_bad = result
        return ids.tolist(), self.rows[is_bad != 0].tolist()


@dataclass(slots=True)
class PendingStep:
    """A launched step. ``resolve`` it once, in launch order, from any thread."""

    step_id: int
    staging: Staging
    bad_rows: set[int]  # the runner's; resolving adds to it
    stagings: StagingPool  # likewise
    launched_s: float  # by time.perf_counter
    samples: list[PendingSample] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, list[PendingLogprobs]]] = field(default_factory=list)
    logits_rows: list[tuple[Array, Tensor]] = field(default_factory=list)  # [P], [P, V]
    device_time_s: float = 0.0

    def resolve(self) -> tuple[ModelRunnerOutput, Frames]:
        """Wait until the device has done the step, and read its answer."""
        waited_s = self.stagings.wait(self.staging, self.launched_s)
        if waited_s is not None:
            self.device_time_s = waited_s
        token_ids: list[int] = []
        nan_rows: list[int] = []
        chosen: dict[int, TokenLogprobs] = {}
        for sample in self.samples:
            ids, bad_rows = sample.read()
            token_ids += ids
            nan_rows += bad_rows
            if sample.logprobs is not None and sample.logprobs_rows is not None:
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
        self.stagings.give_back(self.staging)
        self.bad_rows.update(nan_rows)
        output = ModelRunnerOutput(
            step_id=self.step_id,
            sampled_token_ids=token_ids,
            logprobs=self._row_logprobs(chosen) if chosen or self.prompt_logprobs else [],
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
        self.graphs: StepGraphs | None = None  # None: every step runs eagerly
        self._model = model
        self._kv_cache = kv_cache
        self._states = states
        self._stagings = StagingPool(states.padding_row, states.device)
        self._bad_rows: set[int] = set()  # their blocks may hold NaN
        # Raw logits of rows that are with the user's processors and want log-probabilities.
        self._raw_logits: dict[int, Tensor] = {}

    def use_graphs(self, recorder: Recorder, sizes: GraphSizes) -> StepGraphs:
        """From now on steps may be recorded ones, once they are."""
        parts = Parts(self._model, self._kv_cache, self._states)
        self.graphs = StepGraphs(parts, recorder, sizes)
        self._stagings = StagingPool(sizes.max_requests, self._states.device)
        return self.graphs

    def close(self) -> None:
        """Give recorded steps back; nothing can be executed afterwards."""
        if self.graphs is not None:
            self.graphs.close()
            self.graphs = None

    @torch.inference_mode()
    def draw_blank(self, rows: list[int]) -> None:
        """Sample rows as if a forward pass had made all tokens equal, to compile what that takes.

        Each row gains the token, as in a step.
        """
        states = self._states
        logits = torch.zeros(len(rows), states.sampling.vocab_size, device=states.device)
        self._draw(logits, place_samples(np.array(rows), states))

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput, frames: Frames = ()) -> PendingStep:
        """Launch one step.

        Args:
            plan: the step; its rows must hold at least the blocks that the step needs.
            frames: the arrays that ``plan.sample_rows`` name.
        """
        staging = self._stagings.take()
        step = PendingStep(
            plan.step_id, staging, self._bad_rows, self._stagings, time.perf_counter()
        )
        if staging.started is not None:
            staging.started.record()
        self._apply(plan)
        if plan.rows:
            self._forward(plan, step)
        if plan.sample_rows:
            self._sample_returned(plan.sample_rows, frames, step)
        if staging.finished is not None:
            staging.finished.record()
        else:
            step.device_time_s = time.perf_counter() - step.launched_s
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
        states, graphs = self._states, self.graphs
        packed = pack_rows(plan, states)
        graph = None if graphs is None else graphs.choose(packed)
        if isinstance(graph, DecodeGraph):
            states.sampling.flush()
            logits = graph.launch(packed, step.staging)
            states.advance(packed.rows, 1)
            self._take_drawn(graph, packed, logits, step)
            return
        draws = None
        if graphs is not None and packed.num_samples:
            draws = graphs.choose_draws(packed.num_samples)
        if graph is None:
            batch = build_input_batch(packed, states)
            hidden = self._model.forward(
                batch.token_ids, batch.positions, self._kv_cache.layers, batch.meta
            )
        else:
            hidden = graph.launch(packed, step.staging)
        if packed.wishes & Wish.PROMPT_LOGPROBS:
            step.prompt_logprobs = prompt_logprobs(
                packed, states, hidden, self._model.compute_logits
            )
        states.advance(packed.rows, packed.num_new_tokens)
        if draws is None:
            self._sample_eagerly(packed, hidden, step)
        else:
            states.sampling.flush()
            logits = draws.launch(packed, step.staging, hidden)
            self._take_drawn(draws, packed, logits, step)

    def _take_drawn(
        self, graph: DecodeGraph | DrawGraph, packed: PackedRows, logits: Tensor, step: PendingStep
    ) -> None:
        """Queue the way of recorded draws to the host; draw again what wants more than a draw.

        Args:
            logits: [>= S, V], raw, until the next launch.
        """
        states = self._states
        rows, _, _ = packed.samples()
        asking = rows[:0]
        if packed.wishes & MORE_THAN_DRAWN:
            asking = states.sampling.rows_with(rows, MORE_THAN_DRAWN)
        if not asking.size:
            states.num_tokens[rows] += 1
            step.samples.append(PendingSample(rows, take_away(graph, step.staging)))
            return
        states.num_tokens[np.delete(rows, asking)] += 1
        logits = logits.index_select(0, upload(asking, states.device))
        staying = self._send_out(logits, rows[asking], step)
        drawn = Drawn(logits, rows[:0], None)
        if staying.size:
            again = asking[staying]
            places = place_samples(rows[again], states)
            drawn = self._draw(self._rows_of(logits, staying), places)
            on_device = upload(again, states.device)
            graph.views.result.index_copy_(1, on_device, drawn.result.to(torch.int32))
        columns = np.delete(np.arange(rows.size), np.delete(asking, staying))
        result = take_away(graph, step.staging)
        step.samples.append(
            PendingSample(rows[columns], result, columns, drawn.logprobs_rows, drawn.logprobs)
        )

    def _sample_eagerly(self, packed: PackedRows, hidden: Tensor, step: PendingStep) -> None:
        """Sample the rows that computed their last token, but for those whose logits must leave.

        Args:
            hidden: [T, H].
        """
        places = locate_samples(packed, self._states)
        if places is None:
            return
        if places.logit_indices is not None:
            hidden = hidden.index_select(0, places.logit_indices)
        logits = self._model.compute_logits(hidden)
        if places.wishes & Wish.PROCESSORS:
            staying = self._send_out(logits, places.rows, step)
            if not staying.size:
                return
            logits = self._rows_of(logits, staying)
            places = place_samples(places.rows[staying], self._states)
        self._answer(self._draw(logits, places), places.rows, step)

    def _send_out(self, logits: Tensor, rows: Array, step: PendingStep) -> Array:
        """Rows with processors leave as raw logits; returns the places of the others."""
        leaving = self._states.sampling.rows_with(rows, Wish.PROCESSORS)
        if leaving.size:
            raw_logits = self._rows_of(logits, leaving)
            step.logits_rows.append((rows[leaving], download(raw_logits)))
            for i in self._states.sampling.rows_with(rows[leaving], Wish.LOGPROBS).tolist():
                self._raw_logits[int(rows[leaving[i]])] = raw_logits[i]
        return np.delete(np.arange(rows.size), leaving)

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
        raw_logits = None
        if asking.size:
            raw_logits = torch.stack([self._raw_logits.pop(int(rows[i])) for i in asking.tolist()])
        self._answer(self._draw(logits, place_samples(rows, self._states), raw_logits), rows, step)

    def _draw(
        self, logits: Tensor, places: SamplePlaces, raw_logits: Tensor | None = None
    ) -> Drawn:
        """Draw, and write the ids where the next step reads them.

        Args:
            logits: [S, V], changed in place.
            raw_logits: as the model made them, of the rows that ask for log-probabilities; None:
                they are still in ``logits``.
        """
        sampling = self._states.sampling
        asking = places.rows[:0]
        if places.wishes & Wish.LOGPROBS:
            asking = sampling.rows_with(places.rows, Wish.LOGPROBS)
            on_device = upload(asking, self._states.device)
            if raw_logits is None:
                raw_logits = logits.index_select(0, on_device)  # before they change
        sampled = sample_rows(logits, places, self._states)
        self._states.append(places.rows, places.places, sampled.token_ids)
        logprobs = None
        if asking.size:
            assert raw_logits is not None, "they were asked for above"
            wanted = [sampling.of(row).params.num_logprobs or 0 for row in places.rows[asking]]
            token_ids = sampled.token_ids.index_select(0, on_device)
            logprobs = compute_logprobs(raw_logits, token_ids, wanted)
        result = torch.stack((sampled.token_ids, sampled.is_bad.to(torch.int64)))
        return Drawn(result, places.rows[asking], logprobs)

    def _answer(self, drawn: Drawn, rows: Array, step: PendingStep) -> None:
        """Send drawn ids to the host, next in the order of the step."""
        step.samples.append(
            PendingSample(
                rows,
                download(drawn.result),
                logprobs_rows=drawn.logprobs_rows,
                logprobs=drawn.logprobs,
            )
        )

    def _rows_of(self, logits: Tensor, places: Array) -> Tensor:
        """A copy of some rows; of all of them, the same tensor."""
        if places.size == logits.shape[0]:
            return logits
        return logits.index_select(0, upload(places, self._states.device))
