"""From logits to token ids: temperature, min-p, top-k, top-p, then one draw by Gumbel-max.

What the filters keep, in their order, for x = logits / temperature:
  min_p  tokens with exp(x - max x) >= min_p;
  top_k  of those, the tokens not below the k-th largest;
  top_p  of those, renormalised, each token whose strictly likelier ones sum to less than top_p.
So each filter is a threshold: tokens of exactly equal logits stay or go together, and the
likeliest token always stays. The draw is argmax(x + g) with the noise g of ``kernels.gumbel``; a
temperature below 1e-5 is plain argmax. Of equal candidates the lowest id wins.

On a GPU a row without filters is read once, by as many programs as fill the device; they leave
the best of each chunk to one more, small kernel. The device decides which rows are greedy, random
or filtered (``kernels.sampling_filters``), so nothing waits for it and a graph can hold it all.
Shapes: B rows, V vocabulary.

Source: min-p, Nguyen et al., arXiv:2407.01082.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dependent_launch
from kernels.gumbel import gumbel_noise_reference, noise_bits, noise_bound, noise_keys, noise_of
from kernels.sampling_cpu import GREEDY_BELOW, Rows, sample_cpu
from kernels.sampling_filters import apply_filters_triton

_LANES = 512
# Columns of a table, which lie anywhere: their alignment must not make another variant.
_COLUMNS = ["temperature_ptr", "floors_ptr", "seeds_ptr", "positions_ptr"]


class Sampled(NamedTuple):
    """The draw of one step, on the logits' device."""

    token_ids: Tensor  # [B] int64
    is_bad: Tensor  # [B] bool: NaN among the logits, or no token was left to draw


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    any_filter: bool = True,
) -> Sampled:
    """Draw one token per row; the logits are left as they are.

    The id of a bad row means nothing, but is within V.

    Args:
        logits: [B, V] float32, contiguous. -inf is never drawn.
        temperature: [B] float32.
        top_k: [B] int32, 0 is off.
        top_p, min_p: [B] float32, 1 and 0 are off.
        seeds: [B] int64, any bits.
        positions: [B] int64, the position of the token that is drawn.
        any_filter: False promises that no random row has a filter on, and spares the launches
            that would find out.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [B, V] float32, not {logits.shape}, {logits.dtype}")
    _check_rows(logits.shape[0], logits, temperature, top_k, top_p, min_p, seeds, positions)
    rows = Rows(temperature, top_k, top_p, min_p, seeds, positions)
    if logits.is_cuda:
        return sample_triton(logits, rows, any_filter)
    is_bad = ~(logits.amax(dim=1) > -torch.inf)  # torch's maximum carries a NaN through
    return Sampled(sample_cpu(logits, rows, any_filter), is_bad)


def _check_rows(B: int, logits: Tensor, *per_row: Tensor) -> None:
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    for tensor, dtype in zip(per_row, (f32, i32, f32, f32, i64, i64), strict=True):
        if tensor.shape != (B,) or tensor.dtype != dtype:
            raise ValueError(f"a parameter must be [{B}] {dtype}: {tensor.shape}, {tensor.dtype}")
    if not all(t.is_contiguous() and t.device == logits.device for t in (logits, *per_row)):
        raise ValueError("all tensors must be contiguous and on one device")


def sample_reference(logits: Tensor, rows: Rows) -> Tensor:
    """The definition of the ids, of rows that are not bad: one by one, with a full sort."""
    V = logits.shape[1]
    temperature, top_k, top_p, min_p, seeds, positions = rows
    noise = gumbel_noise_reference(seeds, positions, V)
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for b in range(logits.shape[0]):
        if float(temperature[b]) < GREEDY_BELOW:
            token_ids[b] = logits[b].argmax()
            continue
        x = logits[b] * (1.0 / temperature[b])
        x = x.masked_fill(x < x.max() + _log(float(min_p[b])), -torch.inf)
        k = int(top_k[b])
        if 0 < k < V:
            x = x.masked_fill(x < torch.topk(x, k).values[-1], -torch.inf)
        if float(top_p[b]) < 1.0:
            x = _top_p_reference(x, float(top_p[b]))
        token_ids[b] = (x + noise[b]).argmax()
    return token_ids


def is_bad_reference(logits: Tensor) -> Tensor:
    """The definition of a bad row."""
    return logits.isnan().any(dim=1) | (logits == -torch.inf).all(dim=1)


def _top_p_reference(x: Tensor, top_p: float) -> Tensor:
    weights = torch.exp((x - x.max()).double())
    values, order = torch.sort(x, descending=True)
    sums = torch.cumsum(weights[order], dim=0)
    # Mass of the strictly likelier: the running sum before the first token of equal logit.
    firsts = torch.searchsorted(-values, -values)
    likelier = torch.cat((sums.new_zeros(1), sums))[firsts]
    kept = (likelier < top_p * sums[-1]) | (values == values[0])
    return x.masked_fill(x < values[kept].min(), -torch.inf)


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf


def sample_triton(logits: Tensor, rows: Rows, any_filter: bool) -> Sampled:
    """Launch the kernels: the filters when one may be on, then the draw of what they leave."""
    B, V = logits.shape
    device = logits.device
    sampled = Sampled(
        torch.empty(B, dtype=torch.int64, device=device),
        torch.empty(B, dtype=torch.bool, device=device),
    )
    if B == 0:
        return sampled
    floors = rows.temperature  # not read without filters
    if any_filter:
        floors = apply_filters_triton(logits, rows, sampled.token_ids, sampled.is_bad)
    depth = _depth(B, V)
    num_chunks = triton.cdiv(V, depth * _LANES)
    best = torch.empty((B, num_chunks), dtype=torch.float32, device=device)
    best_ids = torch.empty((B, num_chunks), dtype=torch.int32, device=device)
    options = dependent_launch.options() | {"FILTER": any_filter}
    _draw_kernel[(B, num_chunks)](
        logits,
        rows.temperature,
        floors,
        rows.seeds,
        rows.positions,
        best,
        best_ids,
        V,
        LANES=_LANES,
        DEPTH=depth,
        num_warps=_LANES // 128,
        enable_fp_fusion=False,  # product and sum are rounded apart, as in the definition
        **options,
    )
    _pick_kernel[(B,)](
        best,
        best_ids,
        floors,
        sampled.token_ids,
        sampled.is_bad.view(torch.int8),
        NUM_CHUNKS=num_chunks,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        num_warps=1,
        **options,
    )
    return sampled


def _depth(B: int, V: int) -> int:
    """How many tokens a lane looks at: few where programs would be too few to fill the device."""
    return 4 if B * V <= 1 << 21 else 16


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    floors_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    best_ids_ptr,
    V,
    FILTER: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best token of a chunk of a row, and its value: NaN if there is one in the chunk."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row)
    floor = float("-inf")
    if FILTER:
        floor = tl.load(floors_ptr + row)
    if floor < float("inf"):  # else the row has been drawn
        row_ptr = logits_ptr + row * V
        start = tl.program_id(1) * DEPTH * LANES
        if temperature >= 1e-5:
            keys = noise_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            scale = tl.math.div_rn(1.0, temperature)
            best, best_id, total = _best_with_noise(
                row_ptr, V, start, scale, floor, keys[0], keys[1], FILTER, LANES, DEPTH
            )
        else:
            best, best_id, total = _best(row_ptr, V, start, LANES, DEPTH)
        if total != total:
            # A NaN, or infinities of both signs.
            is_nan = tl.zeros((LANES,), tl.int1)
            for i in tl.static_range(DEPTH):
                token_ids = start + i * LANES + tl.arange(0, LANES)
                x = tl.load(row_ptr + token_ids, token_ids < V, other=0.0)
                is_nan = is_nan | (x != x)
            best = tl.where(tl.sum(is_nan.to(tl.int32), axis=0) > 0, float("nan"), best)
        at = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(best_ptr + at, best)
        tl.store(best_ids_ptr + at, best_id)


@triton.jit
def _best(row_ptr, V, start, LANES: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a chunk, its token, and a sum that is NaN if one of them is."""
    lanes = tl.arange(0, LANES)
    most = tl.full((LANES,), float("-inf"), tl.float32)
    most_ids = start + lanes
    sums = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(DEPTH):
        token_ids = start + i * LANES + lanes
        x = tl.load(row_ptr + token_ids, token_ids < V, other=float("-inf"))
        sums += x
        most_ids = tl.where(x > most, token_ids, most_ids)
        most = tl.maximum(most, x)
    best = tl.max(most, axis=0)
    best_id = tl.min(tl.where(most == best, most_ids, 0x7FFFFFFF), axis=0)
    return best, best_id, tl.sum(sums, axis=0)


@triton.jit
def _best_with_noise(  # type: ignore[no-untyped-def]
    row_ptr,
    V,
    start,
    scale,
    floor,
    key_a,
    key_b,
    FILTER: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The same of logits * scale + noise, among the tokens that reach the floor.

    The noise itself is two logarithms, so each token first gets a bound of it, and noise is made
    for the lanes whose bound reaches the best value so far: seldom more than one.
    """
    lanes = tl.arange(0, LANES)
    bounds = tl.full((LANES,), float("-inf"), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(DEPTH):
        token_ids = start + i * LANES + lanes
        x = tl.load(row_ptr + token_ids, token_ids < V, other=float("-inf"))
        sums += x
        x *= scale
        bound = x + noise_bound(noise_bits(key_a, key_b, token_ids))
        if FILTER:
            bound = tl.where(x >= floor, bound, float("-inf"))
        bounds = tl.maximum(bounds, bound)
    best = float("-inf")
    best_id = start
    most = tl.max(bounds, axis=0)
    while (most >= best) & (most > float("-inf")):
        lane = tl.min(tl.where(bounds == most, lanes, LANES), axis=0)
        ids = start + lane + tl.arange(0, DEPTH) * LANES
        values = tl.load(row_ptr + ids, ids < V, other=float("-inf")) * scale
        is_kept = values >= floor
        values = tl.where(is_kept, values + noise_of(noise_bits(key_a, key_b, ids)), float("-inf"))
        value = tl.max(values, axis=0)
        token_id = tl.min(tl.where(values == value, ids, 0x7FFFFFFF), axis=0)
        is_better = (value > best) | ((value == best) & (token_id < best_id))
        best = tl.where(is_better, value, best)
        best_id = tl.where(is_better, token_id, best_id)
        bounds = tl.where(lanes == lane, float("-inf"), bounds)
        most = tl.max(bounds, axis=0)
    return best, best_id, tl.sum(sums, axis=0)


@triton.jit(do_not_specialize_on_alignment=["floors_ptr"])
def _pick_kernel(  # type: ignore[no-untyped-def]
    best_ptr,
    best_ids_ptr,
    floors_ptr,
    token_ids_ptr,
    is_bad_ptr,
    FILTER: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    floor = float("-inf")
    if FILTER:
        floor = tl.load(floors_ptr + row)
    if floor < float("inf"):
        c = tl.arange(0, BLOCK_C)
        best = tl.load(best_ptr + row * NUM_CHUNKS + c, c < NUM_CHUNKS, other=float("-inf"))
        num_nan = tl.sum((best != best).to(tl.int32), axis=0)
        best = tl.where(best == best, best, float("-inf"))
        most, place = tl.max(best, axis=0, return_indices=True)
        token_id = tl.load(best_ids_ptr + row * NUM_CHUNKS + place)
        tl.store(token_ids_ptr + row, token_id.to(tl.int64))
        is_bad = (num_nan > 0) | (most == float("-inf"))
        tl.store(is_bad_ptr + row, is_bad.to(tl.int8))
