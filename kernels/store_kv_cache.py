"""Write the keys and values of a step's tokens into the paged KV cache.

Shapes: T tokens, K key/value heads, D head size. A cache is [num_blocks, block_size, K, D]; a
slot is ``block_id * block_size + offset``. Block 0 is the null block: padded tokens carry one of
its slots, so several may write there at once and nobody reads what they leave.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def store_kv_cache(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store token t's key and value at ``slot_mapping[t]``, converted to the cache's dtype.

    Args:
        k, v: [T, K, D], contiguous within a token: slices of a packed projection are fine.
        key_cache, value_cache: [num_blocks, block_size, K, D], contiguous; written in place.
        slot_mapping: [T] int64, each in [0, num_blocks * block_size). Slots outside are an
            error on the CPU and an illegal access on a GPU.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if k.ndim != 3 or k.shape != v.shape or slot_mapping.shape != k.shape[:1]:
        raise ValueError(f"shapes differ: {k.shape}, {v.shape}, {slot_mapping.shape}")
    if key_cache.shape != value_cache.shape or key_cache.shape[2:] != k.shape[1:]:
        raise ValueError(f"caches do not fit: {key_cache.shape}, {value_cache.shape}, {k.shape}")
    if key_cache.ndim != 4 or slot_mapping.dtype != torch.int64:
        raise ValueError("a cache has four dimensions, and slot_mapping is int64")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("the caches must be contiguous")
    rows = (k.shape[2], 1)
    if (k.stride()[1:] != rows or v.stride()[1:] != rows) and k.numel():
        raise ValueError(f"a token's k and v must be contiguous: {k.stride()}, {v.stride()}")
    if not k.device == v.device == key_cache.device == value_cache.device == slot_mapping.device:
        raise ValueError("all tensors must be on one device")
    run = store_kv_cache_triton if k.is_cuda else store_kv_cache_cpu
    run(k, v, key_cache, value_cache, slot_mapping)


def store_kv_cache_reference(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """The definition: one token after the other."""
    block_size = key_cache.shape[1]
    for t, slot in enumerate(slot_mapping.tolist()):
        key_cache[slot // block_size, slot % block_size] = k[t]
        value_cache[slot // block_size, slot % block_size] = v[t]


def store_kv_cache_cpu(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """The CPU path: one scatter a cache."""
    for source, cache in ((k, key_cache), (v, value_cache)):
        if source.dtype != cache.dtype:
            source = source.to(cache.dtype)
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, source)


def store_kv_cache_triton(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Launch the kernel: one program for up to 1024 values of a token."""
    row = k.shape[1] * k.shape[2]
    if k.numel() == 0:
        return
    block = min(1024, triton.next_power_of_2(row))
    _store_kernel[(k.shape[0], triton.cdiv(row, block))](
        k,
        v,
        key_cache,
        value_cache,
        slot_mapping,
        row,
        k.stride(0),
        v.stride(0),
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _store_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    row,
    k_stride,
    v_stride,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < row
    slot = tl.load(slot_mapping_ptr + t)  # int64, as the cache passes 2**31 values
    k = tl.load(k_ptr + t * k_stride + cols, mask).to(tl.float32)
    tl.store(key_cache_ptr + slot * row + cols, k, mask)
    v = tl.load(v_ptr + t * v_stride + cols, mask).to(tl.float32)
    tl.store(value_cache_ptr + slot * row + cols, v, mask)
