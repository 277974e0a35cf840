"""From logits to token ids: temperature, min-p, top-k, top-p, then one draw by Gumbel-max.

The noise of a draw is a pure function of (request seed, token position, token id), so a result
depends neither on batch mates nor on the order of steps, and a restarted request draws the same.

What the filters keep, in their order, for x = logits / temperature:
  min_p  tokens with exp(x - max x) >= min_p;
  top_k  of those, the tokens not below the k-th largest;
  top_p  of those, renormalised, each token whose strictly likelier ones sum to less than top_p.
So each filter is a threshold: tokens of exactly equal logits stay or go together, and the
likeliest token always stays. The draw is argmax(x + g) with g = -log(-log u), u uniform; a
temperature below 1e-5 is plain argmax. Of equal candidates the lowest id wins.
Shapes: B rows, V vocabulary.

Sources: Gumbel-max, Gumbel (1954); min-p, Nguyen et al., arXiv:2407.01082; the multipliers of
the hash's mixing step are Wellons', https://nullprogram.com/blog/2018/07/31/.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling_cpu import GREEDY_BELOW, Rows, greedy_cpu, gumbel_noise_cpu, sample_cpu

_MASK = 0xFFFFFFFF
_DRAW_CHUNK = 4096


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    any_random: bool = True,
    any_filter: bool = True,
) -> Tensor:
    """Return one token id per row, [B] int64; the logits are left as they are.

    Args:
        logits: [B, V] float32, contiguous, without NaN. -inf is never drawn, unless a whole row
            is: it returns 0.
        temperature: [B] float32.
        top_k: [B] int32, 0 is off.
        top_p, min_p: [B] float32, 1 and 0 are off.
        seeds: [B] int64, any bits.
        positions: [B] int64, the position of the token that is drawn.
        any_random: False promises that every row is greedy. Known to the host, so nothing waits
            for the device.
        any_filter: False promises that no random row has a filter on.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [B, V] float32, not {logits.shape}, {logits.dtype}")
    _check_rows(logits.shape[0], logits, temperature, top_k, top_p, min_p, seeds, positions)
    if not any_random:
        return logits.argmax(dim=1) if logits.is_cuda else greedy_cpu(logits)
    rows = Rows(temperature, top_k, top_p, min_p, seeds, positions)
    run = sample_triton if logits.is_cuda else sample_cpu
    return run(logits, rows, any_filter)


def _check_rows(B: int, logits: Tensor, *per_row: Tensor) -> None:
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    for tensor, dtype in zip(per_row, (f32, i32, f32, f32, i64, i64), strict=True):
        if tensor.shape != (B,) or tensor.dtype != dtype:
            raise ValueError(f"a parameter must be [{B}] {dtype}: {tensor.shape}, {tensor.dtype}")
    if not all(t.is_contiguous() and t.device == logits.device for t in (logits, *per_row)):
        raise ValueError("all tensors must be contiguous and on one device")


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Return the noise of each draw, [B, vocab_size] float32, for [B] int64 seeds and positions.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if seeds.ndim != 1 or seeds.shape != positions.shape or vocab_size < 1:
        raise ValueError(f"seeds and positions must be [B]: {seeds.shape}, {positions.shape}")
    if seeds.dtype != torch.int64 or positions.dtype != torch.int64:
        raise ValueError(f"seeds and positions must be int64: {seeds.dtype}, {positions.dtype}")
    if seeds.device != positions.device:
        raise ValueError("seeds and positions must be on one device")
    if not (seeds.is_contiguous() and positions.is_contiguous()):
        raise ValueError("seeds and positions must be contiguous")
    run = gumbel_noise_triton if seeds.is_cuda else gumbel_noise_cpu
    return run(seeds, positions, vocab_size)


def _mix_reference(x: Tensor) -> Tensor:
    """Scatter 32 bits held in an int64; each input bit reaches each output bit."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def noise_bits_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The definition of the random bits, [B, vocab_size], uint32 values held in int64.

    Two 32-bit keys come from (seed, position); the token id is mixed with one, then the other.
    """
    low, high, position = seeds & _MASK, (seeds >> 32) & _MASK, positions & _MASK
    key_a, key_b = _mix_reference(position ^ 0x3C6EF372), _mix_reference(low ^ 0xA54FF53A)
    for a, b in ((low, high), (high, position)):
        key_a, key_b = _mix_reference(key_a ^ a), _mix_reference(key_b ^ b)
    token_ids = torch.arange(vocab_size, device=seeds.device)
    x = (token_ids * 0x9E3779B9 + key_a.unsqueeze(1)) & _MASK
    return _mix_reference(_mix_reference(x) ^ key_b.unsqueeze(1))


def gumbel_noise_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The definition: u from the upper 24 bits, the last of them set so that 0 < u < 1."""
    bits = noise_bits_reference(seeds, positions, vocab_size)
    u = ((bits >> 8) | 1).float() * 2.0**-24
    return -torch.log(-torch.log(u))


def sample_reference(logits: Tensor, rows: Rows) -> Tensor:
    """The definition: one row after the other, with a full sort."""
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


def gumbel_noise_triton(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Launch the noise alone: one program for 1024 tokens of a row."""
    B = seeds.shape[0]
    noise = torch.empty((B, vocab_size), dtype=torch.float32, device=seeds.device)
    if B:
        _noise_kernel[(B, triton.cdiv(vocab_size, 1024))](
            seeds, positions, noise, vocab_size, BLOCK_V=1024, num_warps=4
        )
    return noise


def sample_triton(logits: Tensor, rows: Rows, any_filter: bool) -> Tensor:
    """Launch the kernels: a threshold per row when a filter may be on, then the draw.

    The threshold is found without sorting, by bisection over the row. The draw runs over
    chunks of a row, whose winners meet in a last, small kernel.
    """
    B, V = logits.shape
    token_ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return token_ids
    thresholds = torch.empty(B, dtype=torch.float32, device=logits.device)
    if any_filter:
        _threshold_kernel[(B,)](
            logits,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            thresholds,
            V,
            BLOCK_V=8192,
            num_warps=16,
        )
    chunks = triton.cdiv(V, _DRAW_CHUNK)
    best = torch.empty((B, chunks), dtype=torch.float32, device=logits.device)
    best_ids = torch.empty((B, chunks), dtype=torch.int32, device=logits.device)
    _draw_kernel[(B, chunks)](
        logits,
        rows.temperature,
        thresholds,
        rows.seeds,
        rows.positions,
        best,
        best_ids,
        V,
        FILTER=any_filter,
        BLOCK_V=_DRAW_CHUNK,
        num_warps=8,
    )
    block_c = triton.next_power_of_2(chunks)
    _pick_kernel[(B,)](best, best_ids, token_ids, chunks, BLOCK_C=block_c, num_warps=1)
    return token_ids


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(seed, position, token_ids):  # type: ignore[no-untyped-def]
    """The noise of [BLOCK] token ids in one draw; all integers wrap at 32 bits."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    place = position.to(tl.uint32)
    key_a = _mix(_mix(_mix(place ^ 0x3C6EF372) ^ low) ^ high)
    key_b = _mix(_mix(_mix(low ^ 0xA54FF53A) ^ high) ^ place)
    x = token_ids.to(tl.uint32) * 0x9E3779B9 + key_a
    bits = _mix(_mix(x) ^ key_b)
    u = ((bits >> 8) | 1).to(tl.float32) * 5.9604644775390625e-08
    return -tl.log(-tl.log(u))


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, noise_ptr, V, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    token_ids = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    noise = _gumbel(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token_ids)
    tl.store(noise_ptr + row * V + token_ids, noise, token_ids < V)


@triton.jit
def _smallest_kept(  # type: ignore[no-untyped-def]
    logits_row_ptr,
    V,
    inverse_temperature,
    lowest,
    largest,
    target,
    BY_WEIGHT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The smallest value at or above ``lowest`` whose strictly larger ones stay below ``target``.

    They are counted, or with BY_WEIGHT summed as exp(x - largest). Bisection: both ends move to
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
            x = tl.load(logits_row_ptr + start + cols, inside, other=float("-inf"))
            x = x * inverse_temperature
            is_above = x >= middle
            if BY_WEIGHT:
                mass += tl.where(is_above, tl.exp(x - largest), 0.0)
            else:
                mass += tl.where(is_above, 1.0, 0.0)
            above = tl.minimum(above, tl.where(is_above, x, float("inf")))
            below = tl.maximum(below, tl.where(is_above, float("-inf"), x))
        if tl.sum(mass, axis=0) >= target:
            low = tl.min(above, axis=0)
        else:
            high = tl.max(below, axis=0)
    return low


@triton.jit
def _threshold_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    thresholds_ptr,
    V,
    BLOCK_V: tl.constexpr,
):
    """The smallest value of logits / temperature that a row's filters keep; -inf without any."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    threshold = float("-inf")
    by_count = (top_k > 0) & (top_k < V)
    if (temperature >= 1e-5) & (by_count | (top_p < 1.0) | (min_p > 0.0)):
        inverse_temperature = tl.math.div_rn(1.0, temperature)
        logits_row_ptr = logits_ptr + row * V
        cols = tl.arange(0, BLOCK_V)
        above = tl.full((BLOCK_V,), float("inf"), tl.float32)
        below = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        for start in range(0, V, BLOCK_V):
            inside = start + cols < V
            x = tl.load(logits_row_ptr + start + cols, inside, other=float("-inf"))
            x = x * inverse_temperature
            below = tl.maximum(below, x)
            above = tl.minimum(above, tl.where(x > float("-inf"), x, float("inf")))
        largest = tl.max(below, axis=0)
        threshold = tl.min(above, axis=0)
        if min_p > 0.0:
            threshold = tl.maximum(threshold, largest + tl.log(min_p))
        if by_count:
            threshold = _smallest_kept(
                logits_row_ptr,
                V,
                inverse_temperature,
                threshold,
                largest,
                top_k.to(tl.float32),
                False,
                BLOCK_V,
            )
        if top_p < 1.0:
            mass = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, V, BLOCK_V):
                inside = start + cols < V
                x = tl.load(logits_row_ptr + start + cols, inside, other=float("-inf"))
                x = x * inverse_temperature
                mass += tl.where(x >= threshold, tl.exp(x - largest), 0.0)
            threshold = _smallest_kept(
                logits_row_ptr,
                V,
                inverse_temperature,
                threshold,
                largest,
                top_p * tl.sum(mass, axis=0),
                True,
                BLOCK_V,
            )
    tl.store(thresholds_ptr + row, threshold)


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    thresholds_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    best_ids_ptr,
    V,
    FILTER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    chunk = tl.program_id(1)
    token_ids = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + row * V + token_ids, token_ids < V, other=float("-inf"))
    temperature = tl.load(temperature_ptr + row)
    if temperature >= 1e-5:
        x = x * tl.math.div_rn(1.0, temperature)
        noise = _gumbel(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token_ids)
        noisy = x + noise
        if FILTER:
            noisy = tl.where(x >= tl.load(thresholds_ptr + row), noisy, float("-inf"))
        x = noisy
    best, place = tl.max(x, axis=0, return_indices=True)
    at = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + at, best)
    tl.store(best_ids_ptr + at, chunk * BLOCK_V + place)


@triton.jit
def _pick_kernel(best_ptr, best_ids_ptr, token_ids_ptr, chunks, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    best = tl.load(best_ptr + row * chunks + c, c < chunks, other=float("-inf"))
    _, place = tl.max(best, axis=0, return_indices=True)
    tl.store(token_ids_ptr + row, tl.load(best_ids_ptr + row * chunks + place).to(tl.int64))
