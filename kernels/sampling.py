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
    chunk, num_warps = _chunk(B, V)
    num_chunks = triton.cdiv(V, chunk)
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
        CHUNK=chunk,
        num_warps=num_warps,
        enable_fp_fusion=False,  # product and sum are rounded apart, as in the definition
        **options,
    )
    _pick_kernel[(B,)](
        best,
        best_ids,
        floors,
        sampled.token_ids,
        sampled.is_bad.view(torch.int8),
        V,
        CHUNK=chunk,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        num_warps=1,
        **options,
    )
    return sampled


def _chunk(B: int, V: int) -> tuple[int, int]:
    """How many tokens a program looks at, and with how many warps."""
    return (1024, 4) if B * V <= 1 << 20 else (4096, 4)


@triton.jit
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
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best token of a chunk of a row; a NaN is better than anything.

    The noise itself is two logarithms, so each token first gets a bound of it, and the noise is
    made for the tokens whose bound reaches the best value so far: seldom more than one.
    """
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row)
    is_random = temperature >= 1e-5
    floor = float("-inf")
    if FILTER:
        floor = tl.load(floors_ptr + row)
    if floor < float("inf"):  # else the row has been drawn
        start = tl.program_id(1) * CHUNK
        cols = tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row * V + start + cols, start + cols < V, other=float("-inf"))
        scale = 1.0
        key_a, key_b = noise_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        bound = x
        if is_random:
            scale = tl.math.div_rn(1.0, temperature)
            x = x * scale
            bound = x + noise_bound(noise_bits(key_a, key_b, start + cols))
            if FILTER:
                bound = tl.where(x >= floor, bound, float("-inf"))
        # Below a NaN, which must come first whatever else is there.
        bound = tl.where(x == x, tl.minimum(bound, 3.0e38), float("inf"))
        best, best_id = _search(
            bound, cols, start, logits_ptr + row * V, scale, is_random, key_a, key_b
        )
        at = row * tl.cdiv(V, CHUNK) + tl.program_id(1)
        tl.store(best_ptr + at, best)
        tl.store(best_ids_ptr + at, best_id)


@triton.jit
def _search(bound, cols, start, logits_row_ptr, scale, is_random, key_a, key_b):  # type: ignore[no-untyped-def]
    """The best value and its token, by making values until no bound is above the best of them."""
    best = float("-inf")
    best_id = start
    most, place = tl.max(bound, axis=0, return_indices=True)
    searching = most > float("-inf")
    while searching:
        token_id = start + place
        value = tl.load(logits_row_ptr + token_id)
        if is_random:
            value = value * scale + noise_of(noise_bits(key_a, key_b, token_id))
        is_better = (value > best) | ((value == best) & (token_id < best_id)) | (value != value)
        best = tl.where(is_better, value, best)
        best_id = tl.where(is_better, token_id, best_id)
        bound = tl.where(cols == place, float("-inf"), bound)
        most, place = tl.max(bound, axis=0, return_indices=True)
        searching = (most > best) | ((most == best) & (start + place < best_id))
        searching = searching & (most > float("-inf"))
    return best, best_id


@triton.jit
def _pick_kernel(  # type: ignore[no-untyped-def]
    best_ptr,
    best_ids_ptr,
    floors_ptr,
    token_ids_ptr,
    is_bad_ptr,
    V,
    FILTER: tl.constexpr,
    CHUNK: tl.constexpr,
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
        num_chunks = tl.cdiv(V, CHUNK)
        c = tl.arange(0, BLOCK_C)
        best = tl.load(best_ptr + row * num_chunks + c, c < num_chunks, other=float("-inf"))
        num_nan = tl.sum((best != best).to(tl.int32), axis=0)
        most, place = tl.max(
            tl.where(best == best, best, float("-inf")), axis=0, return_indices=True
        )
        token_id = tl.load(best_ids_ptr + row * num_chunks + place)
        tl.store(token_ids_ptr + row, token_id.to(tl.int64))
        is_bad = (num_nan > 0) | (most == float("-inf"))
        tl.store(is_bad_ptr + row, is_bad.to(tl.int8))
