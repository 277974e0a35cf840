"""Steps recorded as CUDA graphs: one launch in place of hundreds.

A decode step, in which every row owes one token and samples the next, is recorded whole, from rows
to drawn ids, for some batch sizes. Any other small step is recorded in two parts: up to its hidden
states for some numbers of tokens, and from there to the ids for some numbers of draws; the second
part serves larger steps too. A step takes the smallest size that holds it; the places that are left
belong to nobody. Larger steps, and contexts beyond what was asked to be captured, run eagerly.

Every size is rehearsed before it is recorded, which loads all that it launches. At the start that
is done for the smallest decode sizes; for the others in idle moments, or when needed: for decode
sizes at once, as the next step will be of the same size, for mixed ones the second time. Where
kernels were not compiled beforehand all sizes are rehearsed at the start: nobody shall wait for it.

What must not move, because recordings hold its address: weights, cache, rows, ``StepBuffers``.
Temporaries of all recordings share one piece of memory, so what a replay leaves there (logits,
hidden states) lasts until the next replay: read it on the same stream, before that.
Shapes: T packed tokens, B requests, H hidden size, V vocabulary.
"""

import functools
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from executor.attention_metadata import AttentionMetadata
from executor.input_batch import PackedRows
from executor.kv_cache import KVCache
from executor.models.interface import CausalLM
from executor.models.transformers_fallback import TransformersForCausalLM
from executor.request_states import RequestStates
from executor.sampler import draw
from executor.step_buffers import Staging, StepBuffers, StepViews
from kernels.prepare_inputs import prepare_inputs
from kernels.store_samples import store_samples

# (up to, apart): close where a step is short, since padding is computed like the rest.
_DECODE_SPACING = ((64, 8), (128, 16), (256, 32), (512, 64))
_MIXED_SPACING = ((128, 32), (512, 64), (1024, 128), (2048, 256))
# Mixed sizes end where the products of a step take as long as their launches, some milliseconds:
# so many weights times tokens, but not below so many tokens.
_MAX_WEIGHT_TOKENS, _MIN_MAX_MIXED = 2.5e12, 512
_BYTES_PER_GRAPH = 2 * 2**20  # the driver's: 1.1 MiB were measured for 28 layers
_WORKSPACE_BYTES = 32 * 2**20  # cuBLAS's, of the recorder's stream, on a Hopper GPU
_NUM_AT_START = 4  # decode sizes recorded before the first request
_PATIENCE = 1  # steps that run eagerly before a mixed size is recorded while others wait

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Which steps are recorded; each list ascends."""

    decode: Sequence[int]  # requests
    mixed: Sequence[int]  # tokens
    max_seq_len: int  # contexts of more tokens run eagerly

    @property
    def max_requests(self) -> int:
        """The most that any recorded step can hold."""
        return self.decode[-1]

    @property
    def max_tokens(self) -> int:
        """The most that any recorded step can hold."""
        return max(self.decode[-1], self.mixed[-1])


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What is recorded, and the memory that it takes."""

    sizes: GraphSizes
    temporaries_bytes: int

    @property
    def num_bytes(self) -> int:
        """Temporaries, a workspace, and what the driver keeps for each graph."""
        num_graphs = 2 * len(self.sizes.decode) + len(self.sizes.mixed)
        return self.temporaries_bytes + _WORKSPACE_BYTES + num_graphs * _BYTES_PER_GRAPH


def is_recordable(model: CausalLM) -> bool:
    """Whether a model's forward pass only launches: it neither waits for nor asks the device.

    Models of this package do; transformers' own code makes no such promise.
    """
    return not isinstance(model, TransformersForCausalLM)


def graph_sizes(
    *, max_num_seqs: int, max_num_batched_tokens: int, max_seq_len: int, num_weights: int
) -> GraphSizes:
    """The sizes for an engine of these limits; the largest may be beyond them, and is padded.

    Args:
        num_weights: the model's, on one rank.
    """
    max_mixed = max(_MIN_MAX_MIXED, int(_MAX_WEIGHT_TOKENS / max(1, num_weights)))
    return GraphSizes(
        decode=_sizes((1, 2, 4), _DECODE_SPACING, max_num_seqs),
        mixed=_sizes((16,), _MIXED_SPACING, min(max_mixed, max_num_batched_tokens)),
        max_seq_len=max_seq_len,
    )


def _sizes(first: Sequence[int], spacing: Sequence[tuple[int, int]], limit: int) -> list[int]:
    sizes = list(first)
    for end, step in spacing:
        sizes += range(sizes[-1] // step * step + step, end + 1, step)
    return sizes[: bisect_left(sizes, limit) + 1]


class Recording(NamedTuple):
    """What was recorded: ``replay`` queues it again, and ``out`` then holds its result."""

    out: Tensor
    replay: Callable[[], None]


class Recorder(Protocol):
    """How a function's launches are kept; ``CudaRecorder`` outside tests."""

    def rehearse(self, run: Callable[[], Tensor]) -> Tensor:
        """Run it once as it will be recorded; returns its result, for a moment."""

    def record(self, run: Callable[[], Tensor]) -> Recording:
        """Keep what it launches, without running it."""


class CudaRecorder:
    """Records on a stream of its own. Drop the recordings before the recorder."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """``num_bytes`` are set aside for temporaries; what does not fit is added to them."""
        self._device = device
        self._stream = _recording_stream(device)
        self._pool = torch.cuda.MemPool()
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool, device):
            torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def rehearse(self, run: Callable[[], Tensor]) -> Tensor:
        """Run it on the recorder's stream, with temporaries where they will be."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool, self._device):
            out = run()
        current.wait_stream(self._stream)
        return out

    def record(self, run: Callable[[], Tensor]) -> Recording:
        """Capture a graph. Other threads may go on using the device."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            pool: Any = self._pool.id
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return Recording(_without_owning(out), graph.replay)


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the life of the process: torch keeps a workspace for each stream that multiplies."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            square = torch.zeros(16, 16, dtype=dtype, device=device)
            torch.mm(square, square)  # now, or it would come out of a recorder's memory
    return stream


class _Place:
    """A tensor's address, for torch to make another tensor of it that keeps nothing alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": f"<i{tensor.element_size()}",
            "shape": tuple(tensor.shape),
            "strides": None,
            "data": (tensor.data_ptr(), False),
        }


def _without_owning(tensor: Tensor) -> Tensor:
    """The same memory, which may meanwhile be lent to other recordings' temporaries."""
    place = _Place(tensor.contiguous())
    return torch.as_tensor(place, device=tensor.device).view(tensor.dtype)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step is made of."""

    model: CausalLM
    kv_cache: KVCache
    states: RequestStates


class DecodeGraph:
    """A recorded decode step of up to ``size`` requests."""

    def __init__(self, size: int, parts: Parts, buffers: StepBuffers, max_seq_len: int) -> None:
        self.size = size
        self.views = buffers.decode_views(size)
        self.recording: Recording | None = None
        self.is_rehearsed = False
        self._parts = parts
        self._buffers = buffers
        self._max_seq_len = max_seq_len

    def launch(self, packed: PackedRows, staging: Staging) -> Tensor:
        """Queue the step; returns where the raw logits [size, V] will be until the next launch."""
        self.bring(packed, staging)
        return _replay(self.recording)

    def bring(self, packed: PackedRows, staging: Staging) -> None:
        """Queue the copy of the step's inputs."""
        self._buffers.fill_decode(self.size, packed, staging.up_array)
        _copy_staged(self.views, staging)

    def run(self) -> Tensor:
        """The step itself."""
        _prepare(self._parts, self.views, has_draws=True)
        hidden = _forward(self._parts, self.views, 1, self._max_seq_len)
        return _draw(self._parts, self.views, hidden)


class MixedGraph:
    """A recorded forward pass of up to ``size`` tokens, dealt out in any way."""

    def __init__(self, size: int, parts: Parts, buffers: StepBuffers, sizes: GraphSizes) -> None:
        self.size = size
        self.views = buffers.mixed_views(sizes.max_requests, size)
        self.recording: Recording | None = None
        self.is_rehearsed = False
        self.num_missed = 0  # steps that would have taken it
        self._parts = parts
        self._buffers = buffers
        self._sizes = sizes

    def launch(self, packed: PackedRows, staging: Staging) -> Tensor:
        """Queue the pass; returns where the hidden states [size, H] will be until the next."""
        self.bring(packed, staging)
        return _replay(self.recording)

    def bring(self, packed: PackedRows, staging: Staging) -> None:
        """Queue the copy of the step's inputs."""
        self._buffers.fill_mixed(self._sizes.max_requests, packed, staging.up_array)
        _copy_staged(self.views, staging)

    def run(self) -> Tensor:
        """The pass itself."""
        _prepare(self._parts, self.views, has_draws=False)
        return _forward(self._parts, self.views, self.size, self._sizes.max_seq_len)


class DrawGraph:
    """Recorded draws of up to ``size`` rows from their hidden states."""

    def __init__(self, size: int, parts: Parts, buffers: StepBuffers, hidden: Tensor) -> None:
        """``hidden`` [>= size, H] is a buffer, filled before each replay."""
        self.size = size
        self.views, self._indices = buffers.draw_views(size)
        self.recording: Recording | None = None
        self.is_rehearsed = False
        self._parts = parts
        self._buffers = buffers
        self._hidden = hidden[:size]

    def launch(self, packed: PackedRows, staging: Staging, hidden: Tensor) -> Tensor:
        """Queue the draws; returns where the raw logits [size, V] will be until the next launch.

        Args:
            hidden: [T, H], of all the tokens of the step.
        """
        self.bring(packed, staging)
        torch.index_select(hidden, 0, self._indices, out=self._hidden)
        return _replay(self.recording)

    def bring(self, packed: PackedRows, staging: Staging) -> None:
        """Queue the copy of the draws' inputs."""
        self._buffers.fill_draws(self.size, packed, staging.up_array)
        _copy_staged(self.views, staging)

    def run(self) -> Tensor:
        """The draws themselves."""
        _prepare(self._parts, self.views, has_draws=True)
        return _draw(self._parts, self.views, self._hidden)


AnyGraph = DecodeGraph | MixedGraph | DrawGraph
Ready = TypeVar("Ready", DecodeGraph, DrawGraph)


def take_away(graph: DecodeGraph | DrawGraph, staging: Staging) -> Tensor:
    """Queue the copy of what was drawn; returns the [2, size] int32 on the host."""
    return staging.down_part(graph.size).copy_(graph.views.result, non_blocking=True)


def _copy_staged(views: StepViews, staging: Staging) -> None:
    part = staging.up_part(views.staged_at, views.staged_to)
    views.staged.copy_(part, non_blocking=True)


def _replay(recording: Recording | None) -> Tensor:
    assert recording is not None, "a step was launched that was not recorded"
    recording.replay()
    return recording.out


def _prepare(parts: Parts, views: StepViews, *, has_draws: bool) -> None:
    states = parts.states
    prepare_inputs(
        views.requests,
        states.tokens.tensor,
        states.blocks.tensor,
        views.inputs,
        block_size=states.block_size,
        tables=states.sampling.tables if has_draws else None,
        draws=views.draws if has_draws else None,
    )


def _draw(parts: Parts, views: StepViews, hidden: Tensor) -> Tensor:
    """Draw from [B, H], put the ids where they belong, return the raw logits [B, V]."""
    logits = parts.model.compute_logits(hidden)
    sampled = draw(logits, views.draws)
    rows, seq_lens, _ = views.requests
    tokens = parts.states.tokens.tensor
    store_samples(sampled.token_ids, sampled.is_bad, rows, seq_lens, tokens, views.result)
    return logits


def _forward(parts: Parts, views: StepViews, max_query_len: int, max_seq_len: int) -> Tensor:
    """[T, H]; what attention is told depends on the recorded size alone."""
    inputs, requests = views.inputs, views.requests
    meta = AttentionMetadata(
        slot_mapping=inputs.slot_mapping,
        block_table=inputs.block_table,
        query_start_loc=requests.query_start_loc,
        seq_lens=requests.seq_lens,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )
    layers = parts.kv_cache.layers
    return parts.model.forward(inputs.token_ids, inputs.positions, layers, meta)


class StepGraphs:
    """Owns the recorded steps of one runner."""

    def __init__(self, parts: Parts, recorder: Recorder, sizes: GraphSizes) -> None:
        self.sizes = sizes
        self._recorder: Recorder | None = recorder
        self._parts = parts
        self._staging = Staging(sizes.max_requests, parts.states.device)
        self._buffers = StepBuffers(
            parts.states,
            max_requests=sizes.max_requests,
            max_tokens=sizes.max_tokens,
            max_seq_len=sizes.max_seq_len,
        )
        self._decode = [
            DecodeGraph(n, parts, self._buffers, sizes.max_seq_len) for n in sizes.decode
        ]
        self._mixed = [MixedGraph(n, parts, self._buffers, sizes) for n in sizes.mixed]
        self._draws: list[DrawGraph] = []  # made when it is known what hidden states are like

    def choose(self, packed: PackedRows) -> DecodeGraph | MixedGraph | None:
        """The recorded step that holds this one; None when it must run eagerly."""
        if packed.max_seq_len > self.sizes.max_seq_len:
            return None
        if packed.is_decode:
            return self._ready(self._decode, packed.rows.size)
        at = bisect_left(self.sizes.mixed, packed.num_tokens)
        if at == len(self._mixed) or packed.rows.size > self.sizes.max_requests:
            return None
        graph = self._mixed[at]
        if graph.recording is None:
            graph.num_missed += 1
            if graph.num_missed <= _PATIENCE:
                return None
            self._record(graph)
        return graph

    def choose_draws(self, num_draws: int) -> DrawGraph | None:
        """The recorded draws that hold so many; None when they must be made eagerly.

        Ask before the forward pass: recording them now would overwrite what it leaves.
        """
        self._make_draws()
        return self._ready(self._draws, num_draws)

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run every size once, the largest first."""
        self._make_draws()
        graphs: list[AnyGraph] = [*self._draws, *self._decode, *self._mixed]
        for graph in reversed(graphs):
            if not graph.is_rehearsed:
                self._rehearse(graph)

    @torch.inference_mode()
    def record_first(self) -> None:
        """Record what the first requests will need."""
        self._make_draws()
        first: list[AnyGraph] = [*self._decode[:_NUM_AT_START], *self._draws[:1]]
        for graph in first:
            self._record(graph)

    def record_next(self) -> bool:
        """Record one more size; False when none is left."""
        graphs: list[AnyGraph] = [*self._decode, *self._draws, *self._mixed]
        for graph in graphs:
            if graph.recording is None:
                self._record(graph)
                return True
        return False

    def close(self) -> None:
        """Drop the recordings and their memory; nothing can be launched afterwards."""
        self._decode.clear()
        self._mixed.clear()
        self._draws.clear()
        self._recorder = None

    def _ready(self, graphs: Sequence[Ready], count: int) -> Ready | None:
        """The smallest for ``count`` requests, recorded now if it was not yet."""
        at = bisect_left(self.sizes.decode, count)
        if at == len(graphs):
            return None
        if graphs[at].recording is None:
            self._record(graphs[at])
        return graphs[at]

    def _make_draws(self) -> None:
        if not self._draws:
            hidden = self._rehearse(self._mixed[0])
            room = hidden.new_zeros(self.sizes.max_requests, hidden.shape[1])
            parts, sizes = self._parts, self.sizes.decode
            self._draws = [DrawGraph(n, parts, self._buffers, room) for n in sizes]

    def _rehearse(self, graph: AnyGraph) -> Tensor:
        assert self._recorder is not None, "the graphs were closed"
        graph.bring(self._buffers.nobody(), self._staging)
        out = self._recorder.rehearse(graph.run)
        graph.is_rehearsed = True
        if self._parts.states.device.type == "cuda":
            torch.cuda.synchronize()  # the staging is used again at once
        return out

    @torch.inference_mode()
    def _record(self, graph: AnyGraph) -> None:
        assert self._recorder is not None, "the graphs were closed"
        start_s = time.perf_counter()
        if not graph.is_rehearsed:
            self._rehearse(graph)
        graph.recording = self._recorder.record(graph.run)
        kind, seconds = type(graph).__name__, time.perf_counter() - start_s
        logger.debug("%s of %d recorded in %.1f ms", kind, graph.size, 1e3 * seconds)
