"""The noise of a draw: a pure function of (request seed, token position, token id).

argmax(x + g) draws from softmax(x) when g = -log(-log u) with u uniform. u comes from a hash, so
nothing has state: a result depends neither on batch mates nor on the order of steps.
Shapes: B rows, V vocabulary.

Sources: Gumbel-max, Gumbel (1954); the multipliers of the hash's mixing step are Wellons',
https://nullprogram.com/blog/2018/07/31/.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling_cpu import gumbel_noise_cpu

_MASK = 0xFFFFFFFF


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


def gumbel_noise_triton(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Launch the noise alone: one program for 1024 tokens of a row."""
    B = seeds.shape[0]
    noise = torch.empty((B, vocab_size), dtype=torch.float32, device=seeds.device)
    if B:
        _noise_kernel[(B, triton.cdiv(vocab_size, 1024))](
            seeds, positions, noise, vocab_size, BLOCK_V=1024, num_warps=4
        )
    return noise


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_keys(seed, position):  # type: ignore[no-untyped-def]
    """The two keys of a draw; all integers wrap at 32 bits."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    place = position.to(tl.uint32)
    key_a = _mix(_mix(_mix(place ^ 0x3C6EF372) ^ low) ^ high)
    key_b = _mix(_mix(_mix(low ^ 0xA54FF53A) ^ high) ^ place)
    return key_a, key_b


@triton.jit
def noise_bits(key_a, key_b, token_ids):  # type: ignore[no-untyped-def]
    """The random bits of token ids in one draw."""
    return _mix(_mix(token_ids.to(tl.uint32) * 0x9E3779B9 + key_a) ^ key_b)


@triton.jit
def noise_of(bits):  # type: ignore[no-untyped-def]
    """The noise that random bits stand for."""
    u = ((bits >> 8) | 1).to(tl.float32) * 5.9604644775390625e-08
    return -tl.log(-tl.log(u))


@triton.jit
def noise_bound(bits):  # type: ignore[no-untyped-def]
    """A value above ``noise_of(bits)``, by 0.06 near the largest noise, for a fraction of its cost.

    With v = 1 - u, -log u >= v, so the noise is at most -log v; and the exponent and mantissa of
    a float, read as one integer, are a log2 that is never too large. The last summand covers
    what rounding does to either side.
    """
    v = (((bits ^ 0xFFFFFFFF) >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355
    log2_v = v.to(tl.int32, bitcast=True).to(tl.float32)  # times 2**23, plus 127
    return tl.fma(log2_v, -8.262958294867817e-08, 88.02969193111305 + 1e-4)


@triton.jit(do_not_specialize_on_alignment=["seeds_ptr", "positions_ptr"])
def _noise_kernel(seeds_ptr, positions_ptr, noise_ptr, V, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    token_ids = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_a, key_b = noise_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    noise = noise_of(noise_bits(key_a, key_b, token_ids))
    tl.store(noise_ptr + row * V + token_ids, noise, token_ids < V)
