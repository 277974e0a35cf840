"""The CPU path of ``qkv_rope_store`` for bfloat16: one compiled call.

The definition is in ``kernels.qkv_rope_store``; here the rotation's rows come gathered, once for
all layers of a step. Shapes: T tokens, N query heads, K key heads, D head size, R <= D values of a
head that turn.
"""

import torch
from torch import Tensor

from kernels import cpu_library
from kernels.cpu_library import address
from kernels.qkv_rope_store import HeadNorm, PagedCache

_EMPTY = torch.empty(0)


def can_serve(qkv: Tensor, cache: PagedCache, norm: HeadNorm | None) -> bool:
    """Whether there is a compiled function for these tensors, as the layers give them."""
    if norm is not None and (norm.weight_offset or norm.q_weight.dtype is not torch.float32):
        return False
    library = cpu_library.library_for(qkv, cache.key)
    return library is not None and cache.key.shape[3] <= cpu_library.MAX_HEAD_DIM


def qkv_rope_store_cpu(
    qkv: Tensor,
    num_heads: int,
    cache: PagedCache,
    *,
    norm: HeadNorm | None = None,
    cos: Tensor = _EMPTY,
    sin: Tensor = _EMPTY,
) -> Tensor:
    """Return the queries [T, N, D], contiguous, and store keys and values.

    Args:
        qkv: [T, (N + 2K) * D], queries before keys before values; the rows may be apart.
        num_heads: N.
        cache: written in place.
        norm: weights in float32, without an offset.
        cos, sin: [T, 1, R] float32, the tokens' rows of ``rotary.widen_tables``; empty: none turns.

    Raises:
        ValueError: a shape, layout or dtype that the function cannot take.
    """
    key, value, slots = cache
    T, R = qkv.shape[0], cos.shape[-1]
    K, D = key.shape[2:]
    if qkv.shape[1] != (num_heads + 2 * K) * D or key.shape != value.shape or not 0 <= R <= D:
        raise ValueError(f"shapes differ: {qkv.shape}, {num_heads}, {key.shape}, {cos.shape}")
    if R and not (cos.shape == sin.shape == (T, 1, R) and cos.is_contiguous()):
        raise ValueError(f"cos and sin must be [T, 1, R]: {cos.shape}, {sin.shape}")
    if not (key.is_contiguous() and value.is_contiguous() and slots.is_contiguous()):
        raise ValueError("caches and slot_mapping must be contiguous")
    if slots.shape != (T,) or slots.dtype != torch.int64 or (T and qkv.stride(1) != 1):
        raise ValueError("a token's qkv must be contiguous, and slot_mapping int64 [T]")
    library = cpu_library.load()
    assert library is not None, "can_serve said so"
    q = torch.empty((T, num_heads, D), dtype=qkv.dtype)
    is_outside = library.qkv_rope_store(
        qkv.data_ptr(),
        qkv.stride(0),
        q.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        slots.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        R,
        None if norm is None else address(norm.q_weight),
        None if norm is None else address(norm.k_weight),
        0.0 if norm is None else norm.eps,
        T,
        num_heads,
        K,
        D,
        key.shape[0] * key.shape[1],
        torch.get_num_threads(),
    )
    if is_outside:
        raise ValueError(f"slot_mapping leaves the cache of {key.shape[0]} blocks")
    return q
