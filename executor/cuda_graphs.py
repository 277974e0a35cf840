"""Steps recorded as CUDA graphs: one launch in place of hundreds.

A decode step, in which every row owes one token and samples the next, is recorded whole, from rows
to drawn ids, for some batch sizes. Any other small step is recorded up to its hidden states, for
some numbers of tokens. A step takes the smallest size that holds it; the places that are left
belong to nobody. Larger steps, and contexts beyond what was asked to be captured, run eagerly.

Every size is rehearsed once at the start, which compiles all that it launches. The smallest decode
sizes are recorded then as well; the others in idle moments, or a decode size when it is first
needed, as it will be needed again in the next step. Nothing is ever compiled while recording.

What must not move, because recordings hold its address: weights, cache, rows, ``StepBuffers``.
Temporaries of all recordings share one piece of memory, so what a replay leaves there (logits,
hidden states) lasts until the next replay: read it on the same stream, before that.
Shapes: T packed tokens, B requests, H hidden size, V vocabulary.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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
_NUM_AT_START = 4  # decode sizes recorded before the first request

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
        """Temporaries, and what the driver keeps for each graph."""
        num_graphs = len(self.sizes.decode) + len(self.sizes.mixed)
        return self.temporaries_bytes + num_graphs * _BYTES_PER_GRAPH


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

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Run it once as it will be recorded."""

    def record(self, run: Callable[[], Tensor]) -> Recording:
        """Keep what it launches, without running it."""


class CudaRecorder:
    """Records on a stream of its own. Drop the recordings before the recorder."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """``num_bytes`` are set aside for temporaries; what does not fit is added to them."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.MemPool()
        with torch.cuda.stream(self._stream):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                # The libraries' workspace of this stream outlives the pool: not from there.
                square = torch.zeros(16, 16, dtype=dtype, device=device)
                torch.mm(square, square)
            with torch.cuda.use_mem_pool(self._pool, device):
                torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Run it on the recorder's stream, with temporaries where they will be."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool, self._device):
            run()
        current.wait_stream(self._stream)

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
        self._parts = parts
        self._buffers = buffers
        self._max_seq_len = max_seq_len

    def launch(self, packed: PackedRows, staging: Staging) -> Tensor:
        """Queue the step; returns where the raw logits [size, V] will be until the next launch."""
        assert self.recording is not None, f"the decode step of {self.size} was not recorded"
        self.bring(packed, staging)
        self.recording.replay()
        return self.recording.out

    def bring(self, packed: PackedRows, staging: Staging) -> None:
        """Queue the copy of the step's inputs."""
        self._buffers.fill_decode(self.size, packed, staging.up_array)
        staged = self.views.staged
        staged.copy_(staging.up[: staged.shape[0]], non_blocking=True)

    def take_away(self, staging: Staging) -> Tensor:
        """Queue the copy of the result; returns the [2, size] int32 on the host."""
        down = staging.down[: 2 * self.size].view(2, self.size)
        return down.copy_(self.views.result, non_blocking=True)

    def run(self) -> Tensor:
        """The step itself."""
        parts, views = self._parts, self.views
        tokens = parts.states.tokens.tensor
        prepare_inputs(
            views.requests,
            tokens,
            parts.states.blocks.tensor,
            views.inputs,
            block_size=parts.states.block_size,
            tables=parts.states.sampling.tables,
            draws=views.draws,
        )
        hidden = _forward(parts, views, 1, self._max_seq_len)
        logits = parts.model.compute_logits(hidden)
        sampled = draw(logits, views.draws)
        rows, seq_lens, _ = views.requests
        store_samples(sampled.token_ids, sampled.is_bad, rows, seq_lens, tokens, views.result)
        return logits


class MixedGraph:
    """A recorded forward pass of up to ``size`` tokens, dealt out in any way."""

    def __init__(self, size: int, parts: Parts, buffers: StepBuffers, sizes: GraphSizes) -> None:
        self.size = size
        self.views = buffers.mixed_views(sizes.max_requests, size)
        self.recording: Recording | None = None
        self._parts = parts
        self._buffers = buffers
        self._sizes = sizes

    def launch(self, packed: PackedRows, staging: Staging) -> Tensor:
        """Queue the pass; returns where the hidden states [size, H] will be until the next."""
        assert self.recording is not None, f"the step of {self.size} tokens was not recorded"
        self.bring(packed, staging)
        self.recording.replay()
        return self.recording.out

    def bring(self, packed: PackedRows, staging: Staging) -> None:
        """Queue the copy of the step's inputs."""
        self._buffers.fill_mixed(self._sizes.max_requests, packed, staging.up_array)
        staged = self.views.staged
        staged.copy_(staging.up[: staged.shape[0]], non_blocking=True)

    def run(self) -> Tensor:
        """The pass itself."""
        states = self._parts.states
        prepare_inputs(
            self.views.requests,
            states.tokens.tensor,
            states.blocks.tensor,
            self.views.inputs,
            block_size=states.block_size,
        )
        return _forward(self._parts, self.views, self.size, self._sizes.max_seq_len)


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
        self._states = parts.states
        self._staging = Staging(sizes.max_requests, parts.states.device)
        buffers = StepBuffers(
            parts.states,
            max_requests=sizes.max_requests,
            max_tokens=sizes.max_tokens,
            max_seq_len=sizes.max_seq_len,
        )
        self._nobody = buffers.nobody()
        self._decode = [DecodeGraph(n, parts, buffers, sizes.max_seq_len) for n in sizes.decode]
        self._mixed = [MixedGraph(n, parts, buffers, sizes) for n in sizes.mixed]

    def choose(self, packed: PackedRows) -> DecodeGraph | MixedGraph | None:
        """The recorded step that holds this one; None when it must run eagerly."""
        if packed.max_seq_len > self.sizes.max_seq_len:
            return None
        if packed.is_decode:
            at = bisect_left(self.sizes.decode, packed.rows.size)
            if at == len(self._decode):
                return None
            graph = self._decode[at]
            if graph.recording is None:
                self._record(graph)
            return graph
        at = bisect_left(self.sizes.mixed, packed.num_tokens)
        if at == len(self._mixed) or packed.rows.size > self.sizes.max_requests:
            return None
        return self._mixed[at] if self._mixed[at].recording is not None else None

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run every size once, the largest first: it shows how much memory they need."""
        assert self._recorder is not None, "the graphs were closed"
        for graph in reversed(self._all()):
            graph.bring(self._nobody, self._staging)
            self._recorder.rehearse(graph.run)
            if self._states.device.type == "cuda":
                torch.cuda.synchronize()  # the staging is used again at once

    def record_first(self) -> None:
        """Record what the first requests will need."""
        for graph in self._decode[:_NUM_AT_START]:
            self._record(graph)

    def record_next(self) -> bool:
        """Record one more size; False when none is left."""
        for graph in self._all():
            if graph.recording is None:
                self._record(graph)
                return True
        return False

    def _all(self) -> list[DecodeGraph | MixedGraph]:
        return [*self._decode, *self._mixed]

    def close(self) -> None:
        """Drop the recordings and their memory; nothing can be launched afterwards."""
        self._decode.clear()
        self._mixed.clear()
        self._recorder = None

    @torch.inference_mode()
    def _record(self, graph: DecodeGraph | MixedGraph) -> None:
        assert self._recorder is not None, "the graphs were closed"
        start_s = time.perf_counter()
        graph.recording = self._recorder.record(graph.run)
        kind, seconds = type(graph).__name__, time.perf_counter() - start_s
        logger.debug("%s of %d recorded in %.1f ms", kind, graph.size, 1e3 * seconds)
