"""Causal attention of packed queries over a paged KV cache: prefill, chunks and decode in one.

Query i of request b stands at position seq_lens[b] - query_len[b] + i and sees every key at a
position not after its own, or only the last ``sliding_window`` of them, itself included. Keys
and values of the step's own tokens are in the cache already. With a soft cap c a score s becomes
c * tanh(s / c). Softmax and sums are float32.
Shapes: T packed tokens, B requests, N query heads, K key/value heads, D head size, M blocks per
request. Query heads n*G to n*G + G - 1 share key head n, where G = N / K.

Sources: Kwon et al., "PagedAttention", arXiv:2309.06180; Dao, "FlashAttention-2",
arXiv:2307.08691; for split keys "Flash-Decoding", https://pytorch.org/blog/flash-decoding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# CPU decode: requests of similar length attend together. A group is closed when padding it to
# its longest member would add this many tokens, or when it no longer fits a core's cache.
_MAX_GROUP_PADDING = 512
_MAX_GROUP_TOKENS = 2048


class _Options(NamedTuple):
    """What turns a raw score into a weight."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Return [T, N, D], contiguous and in q's dtype.

    Rows past ``query_start_loc[-1]`` belong to no request; what they return is unspecified. A
    request without queries, or with a length of 0, is allowed, and the latter returns zeros.

    Args:
        q: [T, N, D], contiguous within a token.
        key_cache, value_cache: [num_blocks, block_size, K, D], contiguous, in q's dtype.
        block_table: [B, M] int32, rows contiguous. Entries beyond a request's length, or wholly
            before its window, are never used.
        query_start_loc: [B + 1] int32, prefix sums of the requests' query counts.
        seq_lens: [B] int32, keys of each request, this step's tokens included.
        max_query_len, max_seq_len: upper bounds known to the host, so that a GPU launch needs
            no value from the device. ``max_query_len == 1`` picks the decode kernel.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    _check_tensors(q, key_cache, value_cache)
    _check_requests(q, block_table, query_start_loc, seq_lens)
    if max_query_len < 0 or not 0 <= max_seq_len <= block_table.shape[1] * key_cache.shape[1]:
        raise ValueError(
            f"max_query_len {max_query_len} and max_seq_len {max_seq_len} do not fit "
            f"a block table of {tuple(block_table.shape)}"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, not {soft_cap}")
    options = _Options(scale, sliding_window, soft_cap)
    if not q.is_cuda:
        return paged_attention_cpu(
            q, key_cache, value_cache, block_table, query_start_loc, seq_lens, options
        )
    raise NotImplementedError


def _check_tensors(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    if q.ndim != 3 or key_cache.ndim != 4 or key_cache.shape != value_cache.shape:
        raise ValueError(
            f"q must be [T, N, D] and the caches [num_blocks, block_size, K, D]: "
            f"{q.shape}, {key_cache.shape}, {value_cache.shape}"
        )
    num_heads, num_kv_heads = q.shape[1], key_cache.shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads or q.shape[2] != key_cache.shape[3]:
        raise ValueError(f"heads do not fit: {q.shape}, {key_cache.shape}")
    if key_cache.shape[1] not in (8, 16, 32):
        raise ValueError(f"block_size must be 8, 16 or 32, not {key_cache.shape[1]}")
    if not q.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(f"dtypes differ: {q.dtype}, {key_cache.dtype}, {value_cache.dtype}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, not {q.dtype}")
    if q.numel() and q.stride()[1:] != (q.shape[2], 1):
        raise ValueError(f"a token's queries must be contiguous, strides are {q.stride()}")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("the caches must be contiguous")
    if not q.device == key_cache.device == value_cache.device:
        raise ValueError("q and the caches must be on one device")


def _check_requests(
    q: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor
) -> None:
    num_requests = seq_lens.shape[0] if seq_lens.ndim == 1 else -1
    if block_table.ndim != 2 or block_table.shape[0] != num_requests:
        raise ValueError(
            f"block_table must be [B, M] and seq_lens [B]: {block_table.shape}, {seq_lens.shape}"
        )
    if query_start_loc.shape != (num_requests + 1,):
        raise ValueError(f"query_start_loc must be [B + 1], not {query_start_loc.shape}")
    for tensor in (block_table, query_start_loc, seq_lens):
        if tensor.dtype != torch.int32 or tensor.device != q.device:
            raise ValueError(
                "block_table, query_start_loc and seq_lens must be int32 and on q's "
                f"device, not {tensor.dtype} on {tensor.device}"
            )
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"rows must be contiguous, strides are {tensor.stride()}")


def paged_attention_reference(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    options: _Options,
) -> Tensor:
    """The definition: a loop over requests, all scores in memory, float32."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    starts = query_start_loc.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        query_len = rows.stop - rows.start
        if query_len == 0 or seq_len == 0:
            continue
        positions = torch.arange(seq_len, device=q.device)
        query_positions = positions[seq_len - query_len :].unsqueeze(1)
        seen = positions <= query_positions  # [query_len, seq_len]
        if options.sliding_window is not None:
            seen &= positions > query_positions - options.sliding_window
        used = seen.any(dim=0)
        slots = block_table[b, positions // block_size].long() * block_size
        slots = torch.where(used, slots + positions % block_size, 0)
        k, v = (
            torch.where(used[:, None, None], cache.flatten(0, 1)[slots].float(), 0.0)
            for cache in (key_cache, value_cache)
        )  # [seq_len, K, D]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qnd,snd->nqs", q[rows].float(), k) * options.scale
        if options.soft_cap is not None:
            scores = torch.tanh(scores / options.soft_cap) * options.soft_cap
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        out[rows] = torch.einsum("nqs,snd->qnd", weights, v).to(q.dtype)
    return out


def paged_attention_cpu(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    options: _Options,
) -> Tensor:
    """The CPU path: decoding requests in groups of similar length, the others one by one."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    decoding: list[tuple[int, int, int]] = []  # (length, request, row)
    for b, seq_len in enumerate(lens):
        row, query_len = starts[b], starts[b + 1] - starts[b]
        if query_len == 0 or seq_len == 0:
            continue
        if query_len == 1:
            decoding.append((seq_len, b, row))
        else:
            rows = slice(row, row + query_len)
            out[rows] = _attend_one(
                q[rows], key_cache, value_cache, block_table[b], seq_len, options
            )
    for seq_len, b, row in decoding:
        rows = slice(row, row + 1)
        out[rows] = _attend_one(q[rows], key_cache, value_cache, block_table[b], seq_len, options)
    return out


def _attend_one(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_ids: Tensor,
    seq_len: int,
    options: _Options,
) -> Tensor:
    """Attend one request's queries [query_len, N, D]; reads exactly the keys that they see."""
    query_len, block_size = q.shape[0], key_cache.shape[1]
    first = 0
    if options.sliding_window is not None:
        first = max(0, seq_len - query_len - options.sliding_window + 1)
    first_block = first // block_size
    ids = block_ids[first_block : -(-seq_len // block_size)]
    offset = first_block * block_size
    k, v = (
        cache.index_select(0, ids).flatten(0, 1)[first - offset : seq_len - offset].transpose(0, 1)
        for cache in (key_cache, value_cache)
    )  # [K, seq_len - first, D]
    num_keys = seq_len - first
    mask = None
    if query_len > 1 and (query_len < num_keys or options.sliding_window is not None):
        keys = torch.arange(num_keys)
        own = torch.arange(num_keys - query_len, num_keys).unsqueeze(1)
        mask = keys <= own
        if options.sliding_window is not None:
            mask &= keys > own - options.sliding_window
    heads = q.transpose(0, 1)  # [N, query_len, D]
    out = F.scaled_dot_product_attention(
        heads.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None and query_len > 1,
        scale=options.scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)
