"""Min-p, top-k and top-p on a GPU, without sorting; ``kernels.sampling`` defines what they keep.

Four kernels of fixed grids, whose programs end at once for rows without a filter:
  scan     the largest logit of each group of tokens, and for top-p the sum of exponentials;
  rank     a value that the filters' threshold cannot be below. The k-th largest of the groups'
           maxima is one for top-k: k tokens reach it, and hardly more, as few groups hold two.
           For top-p it is the value above which the maxima alone have the mass;
  collect  the tokens that reach that value, some dozens as a rule;
  settle   which of these the filters keep, exactly, and the draw among them.
A row with too much to collect (top-p of a flat distribution, a very large top-k) gets its threshold
by ``kernels.sampling_threshold``, and takes part in the ordinary draw. The result is the same.
Shapes: B rows, V vocabulary, G groups, C chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dependent_launch
from kernels.sampling_among import draw_of_few, draw_of_many
from kernels.sampling_cpu import Rows
from kernels.sampling_threshold import LARGEST, row_threshold

_LANES = 512  # groups of a chunk
_MAX_GROUPS = 8192
_MAX_RANK = 2048  # tokens that are looked for among the groups' maxima
_FEW = 512  # tokens that are compared each with each
_MAX_FOUND = 4096  # tokens that are settled in registers
_DEPTH = 8  # tokens of a lane that are collected at once
# Columns of a table, which lie anywhere: their alignment must not make another variant.
_COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"]


class _Scratch(NamedTuple):
    """What the kernels leave for each other."""

    maxima: Tensor  # [B, G]
    chunk_maxima: Tensor  # [B, C]
    chunk_sums: Tensor  # [B, C]: of exp(x - the chunk's largest) for top-p; NaN if there is one
    largest: Tensor  # [B]; NaN where the row is bad
    mass: Tensor  # [B] float64: the sum of exp(x - largest), for top-p
    floors: Tensor  # [B]
    counts: Tensor  # [B] int32, of the tokens that reach the floor
    found: Tensor  # [B, _MAX_FOUND], the first of them
    found_ids: Tensor  # [B, _MAX_FOUND] int32


def apply_filters_triton(logits: Tensor, rows: Rows, token_ids: Tensor, is_bad: Tensor) -> Tensor:
    """Draw the filtered rows that can be drawn here, and return what is left to do.

    Args:
        logits: [B, V] float32.
        token_ids, is_bad: [B] int64 and bool; written for rows that are done.

    Returns:
        [B] float32: +inf where a row is done, else the smallest logits / temperature that its
        filters keep, -inf without any.
    """
    B, V = logits.shape
    group = _group_size(V)
    num_chunks = triton.cdiv(V, group * _LANES)
    scratch = _make_scratch(B, num_chunks, logits.device)
    filters = (rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    options = dependent_launch.options()
    _scan_kernel[(B, num_chunks)](
        logits,
        *filters,
        scratch.maxima,
        scratch.chunk_maxima,
        scratch.chunk_sums,
        V,
        GROUP=group,
        LANES=_LANES,
        num_warps=4,
        **options,
    )
    _rank_kernel[(B,)](
        *filters,
        scratch.maxima,
        scratch.chunk_maxima,
        scratch.chunk_sums,
        scratch.largest,
        scratch.mass,
        scratch.floors,
        scratch.counts,
        token_ids,
        is_bad.view(torch.int8),
        V,
        NUM_CHUNKS=num_chunks,
        LANES=_LANES,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        BLOCK_G=triton.next_power_of_2(num_chunks * _LANES),
        MAX_RANK=min(_MAX_RANK, num_chunks * _LANES // 2),
        MAX_FOUND=_MAX_FOUND,
        num_warps=8,
        enable_fp_fusion=False,
        **options,
    )
    _collect_kernel[(B, triton.cdiv(V, _LANES * _DEPTH))](
        logits,
        *filters,
        scratch.floors,
        scratch.counts,
        scratch.found,
        scratch.found_ids,
        V,
        LANES=_LANES,
        DEPTH=_DEPTH,
        MAX_FOUND=_MAX_FOUND,
        num_warps=4,
        **options,
    )
    _settle(logits, rows, scratch, token_ids, is_bad)
    return scratch.floors


def _settle(
    logits: Tensor, rows: Rows, scratch: _Scratch, token_ids: Tensor, is_bad: Tensor
) -> None:
    B, V = logits.shape
    _settle_kernel[(B,)](
        logits,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seeds,
        rows.positions,
        scratch.largest,
        scratch.mass,
        scratch.counts,
        scratch.found,
        scratch.found_ids,
        scratch.floors,
        token_ids,
        is_bad.view(torch.int8),
        V,
        FEW=_FEW,
        MAX_FOUND=_MAX_FOUND,
        LANES=2048,  # four of a thread: what a load brings
        num_warps=16,
        enable_fp_fusion=False,  # product and sum are rounded apart, as in the definition
        **dependent_launch.options(),
    )


def _group_size(V: int) -> int:
    """How many tokens share a maximum: few, as long as the maxima of a row fit in registers."""
    group = 8
    while triton.cdiv(V, group * _LANES) * _LANES > _MAX_GROUPS:
        group *= 2
    return group


def _make_scratch(B: int, num_chunks: int, device: torch.device) -> _Scratch:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return _Scratch(
        maxima=empty(B, num_chunks * _LANES),
        chunk_maxima=empty(B, num_chunks),
        chunk_sums=empty(B, num_chunks),
        largest=empty(B),
        mass=empty(B, dtype=torch.float64),
        floors=empty(B),
        counts=empty(B, dtype=torch.int32),
        found=empty(B, _MAX_FOUND),
        found_ids=empty(B, _MAX_FOUND, dtype=torch.int32),
    )


@triton.jit
def _filters_of(row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V):  # type: ignore[no-untyped-def]
    """Which filters a row has, and what its logits are multiplied by."""
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    is_random = temperature >= 1e-5
    by_count = is_random & (top_k > 0) & (top_k < V)
    by_mass = is_random & (top_p < 1.0)
    is_filtered = by_count | by_mass | (is_random & (min_p > 0.0))
    scale = tl.math.div_rn(1.0, tl.where(is_random, temperature, 1.0))
    return is_filtered, by_count, by_mass, top_k, top_p, min_p, scale


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _scan_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,
    chunk_maxima_ptr,
    chunk_sums_ptr,
    V,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each lane takes the maximum of every LANES-th token of a chunk: its group."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    chunk = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    is_filtered, by_count, by_mass, _, _, _, scale = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    if is_filtered:
        lanes = tl.arange(0, LANES)
        start = chunk * GROUP * LANES
        x_ptr = logits_ptr + row * V
        peaks = tl.full((LANES,), float("-inf"), tl.float32)
        is_nan = tl.zeros((LANES,), tl.int1)
        for first in range(start, start + GROUP * LANES, 8 * LANES):
            for i in tl.static_range(8):
                token_ids = first + i * LANES + lanes
                x = tl.load(x_ptr + token_ids, token_ids < V, other=float("-inf")) * scale
                peaks = tl.maximum(peaks, x)
                is_nan = is_nan | (x != x)
        largest = tl.max(peaks, axis=0)
        num_nan = tl.sum(is_nan.to(tl.int32), axis=0)
        total = tl.where(num_nan > 0, float("nan"), 0.0)
        if by_mass & (not by_count):
            shift = tl.where(largest > float("-inf"), tl.minimum(largest, LARGEST), 0.0)
            sums = tl.zeros((LANES,), tl.float32)
            for first in range(start, start + GROUP * LANES, 8 * LANES):
                for i in tl.static_range(8):
                    token_ids = first + i * LANES + lanes
                    x = tl.load(x_ptr + token_ids, token_ids < V, other=float("-inf")) * scale
                    sums += tl.exp(x - shift)
            total += tl.sum(sums, axis=0)
        at = row * tl.num_programs(1) + chunk
        tl.store(maxima_ptr + at * LANES + lanes, peaks)
        tl.store(chunk_maxima_ptr + at, largest)
        tl.store(chunk_sums_ptr + at, total)


@triton.jit
def _value_reached_by(values, amounts, wanted):  # type: ignore[no-untyped-def]
    """A value such that all that reach it amount to ``wanted``, and hardly more; else -inf."""
    low = tl.min(tl.where(values > float("-inf"), values, float("inf")), axis=0)
    high = tl.max(values, axis=0)
    amount = tl.sum(tl.where(values >= low, amounts, 0.0), axis=0)
    is_enough = amount >= wanted
    steps = 0
    while (amount > wanted) & (steps < 10):
        middle = low + (high - low) * 0.5
        above = tl.sum(tl.where(values >= middle, amounts, 0.0), axis=0)
        is_low = above >= wanted
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
        amount = tl.where(is_low, above, amount)
        steps += 1
    return tl.where(is_enough, low, float("-inf"))


@triton.jit
def _row_mass(chunk_maxima, chunk_sums):  # type: ignore[no-untyped-def]
    """A row's largest x, NaN if there is one or no token, and the sum of exp(x - largest)."""
    num_nan = tl.sum((chunk_sums != chunk_sums).to(tl.int32), axis=0)
    largest = tl.max(chunk_maxima, axis=0)
    factors = tl.exp(tl.minimum(chunk_maxima, LARGEST) - tl.minimum(largest, LARGEST))
    mass = tl.sum(chunk_sums.to(tl.float64) * factors, axis=0)
    is_bad = (num_nan > 0) | (largest == float("-inf"))
    return tl.where(is_bad, float("nan"), largest), mass


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _rank_kernel(  # type: ignore[no-untyped-def]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,
    chunk_maxima_ptr,
    chunk_sums_ptr,
    largest_ptr,
    mass_ptr,
    floors_ptr,
    counts_ptr,
    token_ids_ptr,
    is_bad_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MAX_RANK: tl.constexpr,
    MAX_FOUND: tl.constexpr,
    PDL: tl.constexpr,
):
    """A value that a row's threshold is not below; +inf where too many tokens would reach it."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    is_filtered, by_count, by_mass, top_k, top_p, min_p, _ = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    c = tl.arange(0, BLOCK_C)
    at = row * NUM_CHUNKS + c
    chunk_maxima = tl.load(chunk_maxima_ptr + at, c < NUM_CHUNKS, other=float("-inf"))
    chunk_sums = tl.load(chunk_sums_ptr + at, c < NUM_CHUNKS, other=0.0)
    floor = float("-inf")
    if is_filtered:
        largest, mass = _row_mass(chunk_maxima, chunk_sums)
        tl.store(largest_ptr + row, largest)
        tl.store(mass_ptr + row, mass)
        tl.store(counts_ptr + row, 0)
        if min_p > 0.0:
            floor = tl.minimum(largest + tl.log(min_p), LARGEST)
        if largest != largest:
            tl.store(token_ids_ptr + row, 0)
            tl.store(is_bad_ptr + row, 1)
            floor = float("inf")
        elif by_count & (top_k > MAX_RANK):
            if (min_p <= 0.0) & (V > MAX_FOUND):
                floor = float("inf")
        elif by_count | (by_mass & (min_p <= 0.0)):
            g = tl.arange(0, BLOCK_G)
            is_group = g < NUM_CHUNKS * LANES
            peaks = tl.load(maxima_ptr + row * NUM_CHUNKS * LANES + g, is_group, float("-inf"))
            amounts = tl.full((BLOCK_G,), 1.0, tl.float32)
            wanted = top_k.to(tl.float32)
            if not by_count:
                amounts = tl.exp(peaks - tl.minimum(largest, LARGEST))
                # A little more, as the maxima are summed less exactly.
                wanted = (1.00001 * top_p * mass).to(tl.float32)
            reached = _value_reached_by(peaks, amounts, wanted)
            if (not by_count) & (reached == float("-inf")):
                # The maxima have not the mass; all that reach the following may have it.
                amounts = tl.full((BLOCK_G,), 1.0, tl.float32)
                reached = _value_reached_by(peaks, amounts, MAX_RANK)
            floor = tl.maximum(floor, reached)
    tl.store(floors_ptr + row, floor)


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _collect_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    floors_ptr,
    counts_ptr,
    found_ptr,
    found_ids_ptr,
    V,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    MAX_FOUND: tl.constexpr,
    PDL: tl.constexpr,
):
    """List the tokens that reach the floor, in any order, as far as there is room; count all."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    floor = tl.load(floors_ptr + row)
    _, by_count, by_mass, _, _, _, scale = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    if (by_count | by_mass) & (floor < float("inf")):
        floor = tl.maximum(floor, -LARGEST)  # a banned token is never found
        row_ptr = logits_ptr + row * V
        lanes = tl.program_id(1) * LANES * DEPTH + tl.arange(0, LANES)
        counts = tl.zeros((LANES,), tl.int32)
        for i in tl.static_range(DEPTH):
            token_ids = lanes + i * LANES
            x = tl.load(row_ptr + token_ids, token_ids < V, other=float("-inf")) * scale
            counts += (x >= floor).to(tl.int32)
        num_found = tl.sum(counts, axis=0)
        if num_found > 0:
            # Additions to one counter queue up: a few may, more get their places from one.
            is_few = num_found <= 8
            place = tl.zeros((LANES,), tl.int32)
            if not is_few:
                first = tl.atomic_add(counts_ptr + row, num_found, sem="relaxed")
                place += first + tl.cumsum(counts, axis=0) - counts
            for i in tl.static_range(DEPTH):
                token_ids = lanes + i * LANES
                x = tl.load(row_ptr + token_ids, token_ids < V, other=float("-inf")) * scale
                is_found = x >= floor
                if is_few:
                    place = tl.atomic_add(counts_ptr + row + 0 * lanes, 1, is_found, sem="relaxed")
                has_room = is_found & (place < MAX_FOUND)
                tl.store(found_ptr + row * MAX_FOUND + place, x, has_room)
                tl.store(found_ids_ptr + row * MAX_FOUND + place, token_ids, has_room)
                place += is_found.to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=[*_COLUMNS, "seeds_ptr", "positions_ptr"])
def _settle_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    largest_ptr,
    mass_ptr,
    counts_ptr,
    found_ptr,
    found_ids_ptr,
    floors_ptr,
    token_ids_ptr,
    is_bad_ptr,
    V,
    FEW: tl.constexpr,
    MAX_FOUND: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draw the row, or leave the threshold for the ordinary draw."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _, by_count, by_mass, top_k, top_p, min_p, scale = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    largest = tl.load(largest_ptr + row)
    mass = tl.load(mass_ptr + row)
    num_found = tl.load(counts_ptr + row)
    floor = tl.load(floors_ptr + row)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    if (largest == largest) & (by_count | by_mass):
        shift = tl.minimum(largest, LARGEST)
        least = float("-inf")
        if min_p > 0.0:
            least = largest + tl.log(min_p)
        found_ptr += row * MAX_FOUND
        found_ids_ptr += row * MAX_FOUND
        # Everything that min-p keeps was looked for, so nothing below can matter.
        is_whole = floor <= least
        needs_mass = by_mass & (not by_count) & (not is_whole)
        is_enough = (is_whole | needs_mass | (num_found >= top_k)) & (num_found <= MAX_FOUND)
        token_id = tl.full((), 0, tl.int32)
        if is_enough & (num_found <= FEW):
            token_id, is_enough = draw_of_few(
                found_ptr,
                found_ids_ptr,
                num_found,
                seed,
                position,
                shift,
                mass,
                by_count,
                by_mass,
                needs_mass,
                top_k,
                top_p,
                FEW,
            )
        elif is_enough:
            token_id, is_enough = draw_of_many(
                found_ptr,
                found_ids_ptr,
                num_found,
                seed,
                position,
                shift,
                mass,
                by_count,
                by_mass,
                needs_mass,
                top_k,
                top_p,
                MAX_FOUND,
            )
        floor = float("inf")
        if is_enough:
            tl.store(token_ids_ptr + row, token_id.to(tl.int64))
            tl.store(is_bad_ptr + row, 0)
        else:
            floor = row_threshold(
                logits_ptr + row * V,
                V,
                scale,
                least,
                largest,
                mass,
                by_count,
                by_mass,
                top_k,
                top_p,
                LANES,
            )
        tl.store(floors_ptr + row, floor)
