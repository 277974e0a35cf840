"""What lies between the projection of queries, keys and values and their attention, in one pass.

Of the packed projection of a token, the heads of queries and keys are normalised where a model
does that (``kernels.rms_norm``), then turned to their position where it does that
(``kernels.rotary``). Queries come out as a tensor of their own; keys, and values as they were, go
into the paged cache (``kernels.store_kv_cache``). Arithmetic is float32; what would be rounded
between the three steps is not.
Shapes: T tokens, N query heads, K key heads, D head size, P positions in the tables. R <= D values
of a head turn.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dependent_launch
from kernels.rms_norm import rms_norm_reference
from kernels.rotary import apply_rotary_reference
from kernels.store_kv_cache import store_kv_cache_reference


class HeadNorm(NamedTuple):
    """RMS norm of each head of queries and keys."""

    q_weight: Tensor  # [D]
    k_weight: Tensor  # [D]
    eps: float
    weight_offset: float


class Rotation(NamedTuple):
    """Where the tokens are, and how far that turns which pair of values."""

    cos: Tensor  # [P, R/2] float32
    sin: Tensor
    positions: Tensor  # [T] integers in [0, P)
    interleaved: bool = False  # the pairs are (2j, 2j + 1) instead of (j, j + R/2)


class PagedCache(NamedTuple):
    """Where the keys and values go."""

    key: Tensor  # [num_blocks, block_size, K, D]
    value: Tensor
    slot_mapping: Tensor  # [T] int64; see ``store_kv_cache``


def qkv_rope_store(
    qkv: Tensor,
    num_heads: int,
    cache: PagedCache,
    *,
    norm: HeadNorm | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Return the queries [T, N, D], contiguous, and store keys and values.

    Args:
        qkv: [T, (N + 2K) * D], queries before keys before values; the rows may be apart.
        num_heads: N.
        cache: written in place.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    _check_cache(qkv, num_heads, cache)
    D = cache.key.shape[3]
    if norm is not None:
        for weight in (norm.q_weight, norm.k_weight):
            if weight.shape != (D,) or not weight.is_contiguous() or weight.device != qkv.device:
                raise ValueError(f"a norm's weight must be a contiguous [{D}]: {weight.shape}")
    if rotation is not None:
        _check_rotation(qkv, D, rotation)
    run = qkv_rope_store_triton if qkv.is_cuda else qkv_rope_store_reference
    return run(qkv, num_heads, cache, norm, rotation)


def _check_cache(qkv: Tensor, num_heads: int, cache: PagedCache) -> None:
    key, value, slots = cache
    if key.ndim != 4 or key.shape != value.shape or slots.shape != qkv.shape[:1]:
        raise ValueError(f"caches do not fit: {key.shape}, {value.shape}, {slots.shape}")
    width = (num_heads + 2 * key.shape[2]) * key.shape[3]
    if qkv.ndim != 2 or num_heads < 1 or qkv.shape[1] != width:
        raise ValueError(f"qkv must be [T, (N + 2K) * D], N {num_heads}: {qkv.shape}, {key.shape}")
    if (qkv.shape[0] and qkv.stride(1) != 1) or slots.dtype != torch.int64:
        raise ValueError("a token's qkv must be contiguous, and slot_mapping int64")
    if not all(t.is_contiguous() and t.device == qkv.device for t in cache):
        raise ValueError("caches and slot_mapping must be contiguous, and on one device with qkv")


def _check_rotation(qkv: Tensor, D: int, rotation: Rotation) -> None:
    cos, sin, positions, _ = rotation
    if cos.ndim != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= D:
        raise ValueError(f"cos and sin must be [P, R/2], R <= {D}: {cos.shape}, {sin.shape}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must be float32, not {cos.dtype}, {sin.dtype}")
    if positions.shape != qkv.shape[:1] or positions.is_floating_point():
        raise ValueError(f"positions must be [T] integers, not {positions.shape}")
    if not all(t.is_contiguous() and t.device == qkv.device for t in (cos, sin, positions)):
        raise ValueError("cos, sin and positions must be contiguous and on one device")


def qkv_rope_store_reference(
    qkv: Tensor,
    num_heads: int,
    cache: PagedCache,
    norm: HeadNorm | None,
    rotation: Rotation | None,
) -> Tensor:
    """The definition: one step after the other, in float32 until the end."""
    K, D = cache.key.shape[2:]
    heads = qkv.view(-1, num_heads + 2 * K, D)
    q, k = heads[:, :num_heads].float(), heads[:, num_heads:-K].float()
    if norm is not None:
        q = rms_norm_reference(q, norm.q_weight, norm.eps, norm.weight_offset)
        k = rms_norm_reference(k, norm.k_weight, norm.eps, norm.weight_offset)
    if rotation is not None:
        q, k = apply_rotary_reference(q, k, *rotation)
    store_kv_cache_reference(k, heads[:, -K:], *cache)
    return q.to(qkv.dtype)


def qkv_rope_store_triton(
    qkv: Tensor,
    num_heads: int,
    cache: PagedCache,
    norm: HeadNorm | None,
    rotation: Rotation | None,
) -> Tensor:
    """Launch the kernel: one program for a few heads, of one kind, of a token."""
    T = qkv.shape[0]
    K, D = cache.key.shape[2:]
    q = torch.empty((T, num_heads, D), dtype=qkv.dtype, device=qkv.device)
    if T == 0:
        return q
    half = D // 2 if rotation is None else rotation.cos.shape[1]
    heads, num_warps = _shape_of_program(T, num_heads, K, triton.next_power_of_2(half))
    nothing = qkv  # stands for a pointer that is never followed
    cos, sin, positions, interleaved = rotation or (nothing, nothing, nothing, False)
    q_weight, k_weight, eps, weight_offset = norm or (nothing, nothing, 0.0, 0.0)
    options = dependent_launch.options()
    _qkv_kernel[(T, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(K, heads))](
        qkv,
        q,
        *cache,
        cos,
        sin,
        positions,
        q_weight,
        k_weight,
        qkv.stride(0),
        eps,
        weight_offset,
        N=num_heads,
        K=K,
        D=D,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, D - 2 * half)),
        HEADS=heads,
        NORM=norm is not None,
        ROTATE=rotation is not None,
        INTERLEAVED=interleaved,
        num_warps=num_warps,
        **options,
    )
    return q


def _shape_of_program(T: int, N: int, K: int, block_half: int) -> tuple[int, int]:
    """How many heads a program takes, and its warps; measured with heads of 128 on an H200."""
    heads = 16 if T >= 1024 and N >= 32 else 8
    heads = min(heads, triton.next_power_of_2(max(N, K)))
    return heads, max(1, min(4, heads * block_half // 128))


@triton.jit
def _load_float(ptr, mask):  # type: ignore[no-untyped-def]
    return tl.load(ptr, mask, other=0.0).to(tl.float32)


@triton.jit
def _place(block, N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a program has queries or values, its first head among its kind, and among all."""
    Q_BLOCKS: tl.constexpr = (N + HEADS - 1) // HEADS
    K_BLOCKS: tl.constexpr = (K + HEADS - 1) // HEADS
    is_query = block < Q_BLOCKS
    is_value = block >= Q_BLOCKS + K_BLOCKS
    first = tl.where(is_query, block, (block - Q_BLOCKS) % K_BLOCKS) * HEADS
    skipped = tl.where(is_query, 0, tl.where(is_value, N + K, N))
    return is_query, is_value, first, skipped + first


@triton.jit(do_not_specialize_on_alignment=["slot_mapping_ptr", "positions_ptr"])
def _qkv_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    q_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_weight_ptr,
    k_weight_ptr,
    qkv_stride,
    eps,
    weight_offset,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of a head, a and b are the two of each pair that turns, c is what does not turn."""
    t = tl.program_id(0).to(tl.int64)  # int64: T * N * D may pass 2**31
    is_query, is_value, first, first_packed = _place(tl.program_id(1), N, K, HEADS)
    h = tl.arange(0, HEADS)[:, None]
    j = tl.arange(0, BLOCK_HALF)[None, :]
    a_cols = 2 * j if INTERLEAVED else j
    b_cols = 2 * j + 1 if INTERLEAVED else j + HALF
    c_cols = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    is_head = first + h < tl.where(is_query, N, K)
    turns = is_head & (j < HALF)
    stays = is_head & (c_cols < D)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_ptr = qkv_ptr + t * qkv_stride + (first_packed + h) * D
    a = _load_float(x_ptr + a_cols, turns)
    b = _load_float(x_ptr + b_cols, turns)
    c = _load_float(x_ptr + c_cols, stays)
    if not is_value:
        if NORM:
            weight_ptr = q_weight_ptr if is_query else k_weight_ptr
            squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1) + tl.sum(c * c, axis=1)
            inv_rms = (1.0 / tl.sqrt(squares / D + eps))[:, None]
            a *= inv_rms * (_load_float(weight_ptr + a_cols, j < HALF) + weight_offset)
            b *= inv_rms * (_load_float(weight_ptr + b_cols, j < HALF) + weight_offset)
            c *= inv_rms * (_load_float(weight_ptr + c_cols, c_cols < D) + weight_offset)
        if ROTATE:
            at = tl.load(positions_ptr + t).to(tl.int64) * HALF + j
            cos = _load_float(cos_ptr + at, j < HALF)
            sin = _load_float(sin_ptr + at, j < HALF)
            a, b = a * cos - b * sin, b * cos + a * sin
    if is_query:
        y_ptr = q_ptr + (t * N + first + h) * D
    else:
        slot = tl.load(slot_mapping_ptr + t)  # int64, as the cache passes 2**31 values
        cache_ptr = value_cache_ptr if is_value else key_cache_ptr
        y_ptr = cache_ptr + (slot * K + first + h) * D
    tl.store(y_ptr + a_cols, a, turns)
    tl.store(y_ptr + b_cols, b, turns)
    tl.store(y_ptr + c_cols, c, stays)
