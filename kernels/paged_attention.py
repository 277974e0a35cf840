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

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention_step import Options, Step, StepMemo
from kernels.cudnn_attention import Share, attend_share, can_serve, find_shares
from kernels.decode_attention import decode_attention_triton
from kernels.paged_attention_cpu import paged_attention_cpu
from kernels.prefill_attention import prefill_attention_triton


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
    memo: StepMemo | None = None,
    batch_invariant: bool = False,
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
        memo: one for all layers of a step, which spares a CPU most of its bookkeeping.
        batch_invariant: on a GPU, one kernel and one tile for everything, for the sake of results
            that are the same to the bit in any batch. Slower: no split keys, no cuDNN.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    _check_tensors(q, key_cache, value_cache)
    if memo is None or not memo.entries:  # else another layer had them checked
        _check_requests(q, block_table, query_start_loc, seq_lens)
    if max_query_len < 0 or not 0 <= max_seq_len <= block_table.shape[1] * key_cache.shape[1]:
        raise ValueError(
            f"max_query_len {max_query_len} and max_seq_len {max_seq_len} do not fit "
            f"a block table of {tuple(block_table.shape)}"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, not {soft_cap}")
    options = Options(scale, sliding_window, soft_cap)
    step = Step(block_table, query_start_loc, seq_lens, max_query_len, max_seq_len)
    if not q.is_cuda:
        return paged_attention_cpu(q, key_cache, value_cache, step, options, memo)
    if batch_invariant:
        return prefill_attention_triton(
            q, key_cache, value_cache, step, options, batch_invariant=True
        )
    if max_query_len <= 1:
        return decode_attention_triton(q, key_cache, value_cache, step, options, memo)
    return mixed_attention(q, key_cache, value_cache, step, options, memo)


class _Division(NamedTuple):
    """Which kernels a step of several queries needs."""

    shares: list[Share]  # for cuDNN
    may_have_single: bool  # requests of one query
    may_have_others: bool  # queries that are neither


def mixed_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    options: Options,
    memo: StepMemo | None = None,
) -> Tensor:
    """Serve requests of one query, long prompts and all others each by what suits them."""
    division = _divide(q, step, options, memo)
    shares = division.shares
    if len(shares) == 1 and shares[0].num_queries == q.shape[0]:
        return attend_share(q, key_cache, value_cache, shares[0], step, options.scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if division.may_have_single:
        decode_attention_triton(q, key_cache, value_cache, step, options, memo, out=out)
    if division.may_have_others:
        prefill_attention_triton(
            q,
            key_cache,
            value_cache,
            step,
            options,
            out=out,
            skip_single=division.may_have_single,
            skip_shares=bool(shares),
        )
    for share in shares:
        attend_share(q, key_cache, value_cache, share, step, options.scale, out=out)
    return out


def _divide(q: Tensor, step: Step, options: Options, memo: StepMemo | None) -> _Division:
    if memo is None or memo.lengths is None:
        return _Division([], step.seq_lens.shape[0] > 1, True)
    can_share = can_serve(q, options)
    key = ("division", can_share)
    if key not in memo.entries:
        starts = list(memo.lengths.query_start_loc)
        query_lens = [end - start for start, end in pairwise(starts)]
        shares = find_shares(memo.lengths) if can_share else []
        num_single = query_lens.count(1)
        num_shared = sum(share.num_queries for share in shares)
        memo.entries[key] = _Division(
            shares, num_single > 0, num_single + num_shared < sum(query_lens)
        )
    division: _Division = memo.entries[key]
    return division


def _check_tensors(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    shape, cache, dtype = q.shape, key_cache.shape, q.dtype  # each look-up costs on a CPU
    if len(shape) != 3 or len(cache) != 4 or cache != value_cache.shape:
        raise ValueError(
            f"q must be [T, N, D] and the caches [num_blocks, block_size, K, D]: "
            f"{shape}, {cache}, {value_cache.shape}"
        )
    _, block_size, num_kv_heads, head_dim = cache
    if num_kv_heads == 0 or shape[1] % num_kv_heads or shape[2] != head_dim:
        raise ValueError(f"heads do not fit: {shape}, {cache}")
    if block_size not in (8, 16, 32):
        raise ValueError(f"block_size must be 8, 16 or 32, not {block_size}")
    if not dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(f"dtypes differ: {dtype}, {key_cache.dtype}, {value_cache.dtype}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, not {dtype}")
    if q.stride()[1:] != (head_dim, 1) and q.numel():
        raise ValueError(f"a token's queries must be contiguous, strides are {q.stride()}")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("the caches must be contiguous")
    if not q.device == key_cache.device == value_cache.device:
        raise ValueError("q and the caches must be on one device")


def _check_requests(
    q: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor
) -> None:
    table, lens = block_table.shape, seq_lens.shape
    if len(table) != 2 or len(lens) != 1 or table[0] != lens[0]:
        raise ValueError(f"block_table must be [B, M] and seq_lens [B]: {table}, {lens}")
    if query_start_loc.shape != (lens[0] + 1,):
        raise ValueError(f"query_start_loc must be [B + 1], not {query_start_loc.shape}")
    device = q.device
    for tensor in (block_table, query_start_loc, seq_lens):
        if tensor.dtype != torch.int32 or tensor.device != device:
            raise ValueError(
                "block_table, query_start_loc and seq_lens must be int32 and on q's "
                f"device, not {tensor.dtype} on {tensor.device}"
            )
        if tensor.stride(-1) != 1 and tensor.numel():
            raise ValueError(f"rows must be contiguous, strides are {tensor.stride()}")


def paged_attention_reference(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    options: Options,
) -> Tensor:
    """The definition: a loop over requests, all scores in memory, float32."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    starts = step.query_start_loc.tolist()
    for b, seq_len in enumerate(step.seq_lens.tolist()):
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
        slots = step.block_table[b, positions // block_size].long() * block_size
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
