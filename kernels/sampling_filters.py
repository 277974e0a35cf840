"""Min-p, top-k and top-p on a GPU, without sorting; ``kernels.sampling`` defines what they keep.

Four kernels of fixed grids, whose programs end at once for rows without a filter:
  scan     the largest logit of each group of tokens, and each chunk's sum of exponentials;
  rank     a value that the filters' threshold cannot be below. The k-th largest of the groups'
           maxima is one for top-k: k tokens reach it, and hardly more, as few groups hold two;
  collect  the tokens that reach that value, some hundreds as a rule;
  settle   the threshold among these, exactly, by bisection on the bits of their logits; and the
           draw from what stays.
A row with too much to collect (top-p of a flat distribution, a very large top-k) takes the long
way: bisection over the whole row, and the ordinary draw. All of it is exact, however it goes.
Shapes: B rows, V vocabulary, G groups, C chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dependent_launch
from kernels.gumbel import noise_bits, noise_keys, noise_of
from kernels.sampling_cpu import Rows

_GROUPS_PER_CHUNK = 128
_MAX_GROUPS = 4096
_MAX_RANK = 1024  # tokens that are looked for among the groups' maxima
_MAX_FOUND = 4096  # tokens that are settled in registers
_COLLECT_CHUNK = 4096
_LARGEST = tl.constexpr(3.0e38)  # stands for +inf where that would make inf - inf


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
    device = logits.device
    group = 16
    while triton.cdiv(V, group * _GROUPS_PER_CHUNK) * _GROUPS_PER_CHUNK > _MAX_GROUPS:
        group *= 2
    num_chunks = triton.cdiv(V, group * _GROUPS_PER_CHUNK)
    num_groups = num_chunks * _GROUPS_PER_CHUNK
    floors = torch.empty(B, dtype=torch.float32, device=device)
    maxima = torch.empty((B, num_groups), dtype=torch.float32, device=device)
    sums = torch.empty((B, num_chunks), dtype=torch.float32, device=device)
    counts = torch.empty(B, dtype=torch.int32, device=device)
    found = torch.empty((B, _MAX_FOUND), dtype=torch.float32, device=device)
    found_ids = torch.empty((B, _MAX_FOUND), dtype=torch.int32, device=device)
    filters = (rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    options = dependent_launch.options()
    _scan_kernel[(B, num_chunks)](
        logits,
        *filters,
        maxima,
        sums,
        counts,
        V,
        GROUP=group,
        GROUPS=_GROUPS_PER_CHUNK,
        num_warps=8,
        **options,
    )
    layout = {
        "NUM_GROUPS": num_groups,
        "BLOCK_G": triton.next_power_of_2(num_groups),
        "MAX_RANK": min(_MAX_RANK, num_groups // 2),
        "MAX_FOUND": _MAX_FOUND,
    }
    _rank_kernel[(B,)](*filters, maxima, floors, V, **layout, num_warps=8, **options)
    _collect_kernel[(B, triton.cdiv(V, _COLLECT_CHUNK))](
        logits,
        *filters,
        floors,
        counts,
        found,
        found_ids,
        V,
        MAX_FOUND=_MAX_FOUND,
        CHUNK=_COLLECT_CHUNK,
        num_warps=4,
        **options,
    )
    _settle_kernel[(B,)](
        logits,
        *filters,
        rows.seeds,
        rows.positions,
        maxima,
        sums,
        counts,
        found,
        found_ids,
        floors,
        token_ids,
        is_bad.view(torch.int8),
        V,
        NUM_CHUNKS=num_chunks,
        GROUPS=_GROUPS_PER_CHUNK,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        MAX_FOUND=_MAX_FOUND,
        BLOCK_V=8192,
        num_warps=16,
        enable_fp_fusion=False,
        **options,
    )
    return floors


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


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,
    sums_ptr,
    counts_ptr,
    V,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Per group the largest x; per chunk the sum of exp(x - the chunk's largest), NaN of a NaN."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    chunk = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    is_filtered, _, _, _, _, _, scale = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    if is_filtered:
        g = tl.arange(0, GROUPS)
        token_ids = chunk * GROUP * GROUPS + tl.arange(0, GROUP)[:, None] * GROUPS + g[None, :]
        x = tl.load(logits_ptr + row * V + token_ids, token_ids < V, other=float("-inf")) * scale
        peaks = tl.max(x, axis=0)
        largest = tl.max(peaks, axis=0)
        shift = tl.where(largest > float("-inf"), tl.minimum(largest, _LARGEST), 0.0)
        total = tl.sum(tl.sum(tl.exp(x - shift), axis=0), axis=0)
        num_chunks = tl.num_programs(1)
        tl.store(maxima_ptr + (row * num_chunks + chunk) * GROUPS + g, peaks)
        tl.store(sums_ptr + row * num_chunks + chunk, total)
        if chunk == 0:
            tl.store(counts_ptr + row, 0)


@triton.jit
def _value_of_rank(values, rank):  # type: ignore[no-untyped-def]
    """A value that at least ``rank`` of ``values`` reach, and few more; -inf if not so many do."""
    low = tl.min(tl.where(values > float("-inf"), values, float("inf")), axis=0)
    high = tl.max(values, axis=0)
    num_reached = tl.sum((values >= low).to(tl.int32), axis=0)
    is_enough = num_reached >= rank
    steps = 0
    while (num_reached > rank) & (steps < 14):
        middle = low + (high - low) * 0.5
        num_above = tl.sum((values >= middle).to(tl.int32), axis=0)
        is_low = num_above >= rank
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
        num_reached = tl.where(is_low, num_above, num_reached)
        steps += 1
    return tl.where(is_enough, low, float("-inf"))


@triton.jit
def _rank_kernel(  # type: ignore[no-untyped-def]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,
    floors_ptr,
    V,
    NUM_GROUPS: tl.constexpr,
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
    is_filtered, by_count, _, top_k, _, min_p, _ = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    floor = float("-inf")
    if is_filtered:
        g = tl.arange(0, BLOCK_G)
        peaks = tl.load(maxima_ptr + row * NUM_GROUPS + g, g < NUM_GROUPS, other=float("-inf"))
        if min_p > 0.0:
            floor = tl.max(peaks, axis=0) + tl.log(min_p)
        rank = tl.where(by_count, top_k, MAX_RANK)
        if rank > MAX_RANK:
            if (min_p <= 0.0) & (V > MAX_FOUND):
                floor = float("inf")
        elif by_count | (min_p <= 0.0):
            # Of top-p alone the threshold may well be lower: then it is not settled here.
            floor = tl.maximum(floor, _value_of_rank(peaks, rank))
    tl.store(floors_ptr + row, floor)


@triton.jit
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
    MAX_FOUND: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """List the tokens that reach the floor, in any order, as far as there is room; count all."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _, by_count, by_mass, _, _, _, scale = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    floor = tl.load(floors_ptr + row)
    if (by_count | by_mass) & (floor < float("inf")):
        token_ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row * V + token_ids, token_ids < V, other=float("-inf")) * scale
        is_found = (x >= floor) & (x > float("-inf"))
        num_found = tl.sum(is_found.to(tl.int32), axis=0)
        if num_found > 0:
            first = tl.atomic_add(counts_ptr + row, num_found, sem="relaxed")
            place = first + tl.cumsum(is_found.to(tl.int32), axis=0) - 1
            has_room = is_found & (place < MAX_FOUND)
            tl.store(found_ptr + row * MAX_FOUND + place, x, has_room)
            tl.store(found_ids_ptr + row * MAX_FOUND + place, token_ids, has_room)


@triton.jit
def _keys_of(x):  # type: ignore[no-untyped-def]
    """Integers in the order of floats; the two zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_key(keys, k, low, high):  # type: ignore[no-untyped-def]
    """The k-th largest of ``keys``, which lies within [low, high]; these are int64."""
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        is_low = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0) >= k
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle - 1)
    return low


@triton.jit
def _mass_key(keys, weights, wanted, low, high):  # type: ignore[no-untyped-def]
    """The smallest key whose larger ones weigh less than ``wanted``, within [low, high]."""
    while low < high:
        middle = low + ((high - low) >> 1)
        larger = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0.0), axis=0)
        is_kept = larger < wanted
        high = tl.where(is_kept, middle, high)
        low = tl.where(is_kept, low, middle + 1)
    return low


@triton.jit
def _row_floor(  # type: ignore[no-untyped-def]
    logits_row_ptr,
    V,
    scale,
    lowest,
    largest,
    target,
    BY_WEIGHT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The smallest x of a row, at or above ``lowest``, whose larger ones stay below ``target``.

    They are counted, or with BY_WEIGHT summed as exp(x - largest). Bisection, whose ends move to
    values of the row, so it ends as soon as one is left.
    """
    low = lowest
    high = largest
    cols = tl.arange(0, BLOCK_V)
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        mass = tl.zeros((BLOCK_V,), tl.float32)
        above = tl.full((BLOCK_V,), float("inf"), tl.float32)
        below = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        for start in range(0, V, BLOCK_V):
            inside = start + cols < V
            x = tl.load(logits_row_ptr + start + cols, inside, other=float("-inf")) * scale
            is_above = x >= middle
            if BY_WEIGHT:
                mass += tl.where(is_above, tl.exp(x - largest), 0.0)
            else:
                mass += tl.where(is_above, 1.0, 0.0)
            above = tl.minimum(above, tl.where(is_above, x, float("inf")))
            below = tl.maximum(below, tl.where(is_above, float("-inf"), x))
        if tl.sum(mass.to(tl.float64), axis=0) >= target:
            low = tl.min(above, axis=0)
        else:
            high = tl.max(below, axis=0)
    return low


@triton.jit
def _long_way(  # type: ignore[no-untyped-def]
    logits_row_ptr, V, scale, least, largest, by_count, by_mass, top_k, top_p, BLOCK_V: tl.constexpr
):
    """The threshold of a row's filters by reading the row again and again.

    ``least`` and ``largest`` bound it; the former is -inf without a min-p.
    """
    largest = tl.minimum(largest, _LARGEST)
    cols = tl.arange(0, BLOCK_V)
    lowest = tl.full((BLOCK_V,), float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        x = tl.load(logits_row_ptr + start + cols, start + cols < V, other=float("-inf")) * scale
        lowest = tl.minimum(lowest, tl.where(x > float("-inf"), x, float("inf")))
    threshold = tl.maximum(tl.min(lowest, axis=0), least)
    if by_count:
        k = top_k.to(tl.float64)
        threshold = _row_floor(logits_row_ptr, V, scale, threshold, largest, k, False, BLOCK_V)
    if by_mass:
        mass = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, V, BLOCK_V):
            inside = start + cols < V
            x = tl.load(logits_row_ptr + start + cols, inside, other=float("-inf")) * scale
            mass += tl.where(x >= threshold, tl.exp(x - largest), 0.0)
        wanted = top_p * tl.sum(mass.to(tl.float64), axis=0)
        threshold = _row_floor(logits_row_ptr, V, scale, threshold, largest, wanted, True, BLOCK_V)
    return tl.minimum(threshold, _LARGEST)


@triton.jit
def _row_mass(  # type: ignore[no-untyped-def]
    maxima_ptr, sums_ptr, NUM_CHUNKS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A row's largest x, the sum of exp(x - largest), and whether there is nothing to draw."""
    c = tl.arange(0, BLOCK_C)
    at = c[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    peaks = tl.load(maxima_ptr + at, (c < NUM_CHUNKS)[:, None], other=float("-inf"))
    peaks = tl.max(peaks, axis=1)
    sums = tl.load(sums_ptr + c, c < NUM_CHUNKS, other=0.0)
    num_nan = tl.sum((sums != sums).to(tl.int32), axis=0)
    largest = tl.max(peaks, axis=0)
    is_bad = (num_nan > 0) | (largest == float("-inf"))
    factors = tl.exp(tl.minimum(peaks, _LARGEST) - tl.minimum(largest, _LARGEST))
    return largest, tl.sum(sums.to(tl.float64) * factors, axis=0), is_bad


@triton.jit
def _kept(x, is_found, weights, by_count, by_mass, is_whole, top_k, num_found, top_p, mass):  # type: ignore[no-untyped-def]
    """``x`` of the tokens that top-k and top-p keep, -inf of the others."""
    keys = _keys_of(x)
    low = tl.min(tl.where(is_found, keys, 0x7FFFFFFF), axis=0).to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64)
    if by_count & (top_k < num_found):
        low = _kth_key(keys, top_k, low, high)
    if by_mass:
        weights = tl.where(keys >= low.to(tl.int32), weights, 0.0)
        if by_count | is_whole:
            mass = tl.sum(weights, axis=0)
        low = _mass_key(keys, weights, top_p * mass, low, high)
    return tl.where(is_found & (keys >= low.to(tl.int32)), x, float("-inf"))


@triton.jit
def _draw_kept(x, token_ids, seed_ptr, position_ptr, V):  # type: ignore[no-untyped-def]
    """The draw among tokens in any order; -inf is never drawn."""
    key_a, key_b = noise_keys(tl.load(seed_ptr), tl.load(position_ptr))
    noisy = x + noise_of(noise_bits(key_a, key_b, token_ids))
    winners = tl.where(noisy == tl.max(noisy, axis=0), token_ids, V)
    return tl.min(winners, axis=0)


@triton.jit
def _finish(row, token_id, is_bad, token_ids_ptr, is_bad_ptr, floors_ptr):  # type: ignore[no-untyped-def]
    """Write a row's result, and that nothing is left to draw."""
    tl.store(token_ids_ptr + row, token_id)
    tl.store(is_bad_ptr + row, is_bad)
    tl.store(floors_ptr + row, float("inf"))


@triton.jit
def _settle_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    maxima_ptr,
    sums_ptr,
    counts_ptr,
    found_ptr,
    found_ids_ptr,
    floors_ptr,
    token_ids_ptr,
    is_bad_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAX_FOUND: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draw the row, or leave the threshold for the ordinary draw."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    is_filtered, by_count, by_mass, top_k, top_p, min_p, scale = _filters_of(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V
    )
    if is_filtered:
        largest, mass, is_bad = _row_mass(
            maxima_ptr + row * NUM_CHUNKS * GROUPS,
            sums_ptr + row * NUM_CHUNKS,
            NUM_CHUNKS,
            GROUPS,
            BLOCK_C,
        )
        least = float("-inf")
        if min_p > 0.0:
            least = largest + tl.log(min_p)
        if is_bad:
            _finish(row, 0, 1, token_ids_ptr, is_bad_ptr, floors_ptr)
        elif by_count | by_mass:
            i = tl.arange(0, MAX_FOUND)
            num_found = tl.load(counts_ptr + row)
            is_found = i < num_found
            x = tl.load(found_ptr + row * MAX_FOUND + i, is_found, other=float("-inf"))
            weights = tl.exp(x - tl.minimum(largest, _LARGEST)).to(tl.float64)
            # Everything that min-p keeps was looked for, so nothing below can matter.
            is_whole = tl.load(floors_ptr + row) <= least
            is_enough = is_whole | (by_count & (num_found >= top_k))
            if by_mass & (not by_count) & (not is_whole):
                is_enough = tl.sum(weights, axis=0) >= top_p * mass
            if is_enough & (num_found <= MAX_FOUND):
                token_ids = tl.load(found_ids_ptr + row * MAX_FOUND + i, is_found, other=0)
                x = _kept(
                    x, is_found, weights, by_count, by_mass, is_whole, top_k, num_found, top_p, mass
                )
                token_id = _draw_kept(x, token_ids, seeds_ptr + row, positions_ptr + row, V)
                _finish(row, token_id, 0, token_ids_ptr, is_bad_ptr, floors_ptr)
            else:
                floor = _long_way(
                    logits_ptr + row * V,
                    V,
                    scale,
                    least,
                    largest,
                    by_count,
                    by_mass,
                    top_k,
                    top_p,
                    BLOCK_V,
                )
                tl.store(floors_ptr + row, floor)
        else:
            tl.store(floors_ptr + row, tl.minimum(least, _LARGEST))
