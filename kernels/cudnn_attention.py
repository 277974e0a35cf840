"""Attention of long prompts by cuDNN, which reaches rates that Triton does not on a Hopper GPU.

cuDNN knows no block tables: keys and values are gathered first. Its causal mask begins at the first
key, so a request with cached tokens takes two calls, one over the tokens before a border and one
over the rest, which meet by their sums of exponentials. For each shape it makes a plan, which takes
some 40 ms the first time: hence the grain of ``Share``, and no short prompts. What a share leaves
over, a few hundred queries at the end, is for ``prefill_attention``.
Shapes: T packed tokens, N query heads, K key/value heads, D head size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_step import Options, Step, StepLengths

MIN_QUERIES = 2048  # with fewer the plans cost more than they save
GRAIN = 1024
_HOPPER = (9, 0)


class Share(NamedTuple):
    """The part of a request that cuDNN computes."""

    request: int
    first_token: int  # its place in the step
    num_queries: int  # from the request's first in this step on
    border: int  # keys before it are in one call, the others in another; a multiple of GRAIN
    num_ahead: int  # tokens from the border to the first query, computed in vain


def can_serve(q: Tensor, options: Options) -> bool:
    """Whether cuDNN has such attention, and was measured to be the faster."""
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] in (64, 128)
        and options.sliding_window is None
        and options.soft_cap is None
        and torch.cuda.get_device_capability(q.device) == _HOPPER
    )


def find_shares(lengths: StepLengths) -> list[Share]:
    """What cuDNN should do of a step; ``num_served`` says the same of one request, on a GPU."""
    shares = []
    starts, seq_lens = list(lengths.query_start_loc), list(lengths.seq_lens)
    for b, seq_len in enumerate(seq_lens):
        num_queries = starts[b + 1] - starts[b]
        if num_queries >= MIN_QUERIES:
            num_ahead = (seq_len - num_queries) % GRAIN
            num_rows = (num_queries + num_ahead) // GRAIN * GRAIN
            border = seq_len - num_queries - num_ahead
            shares.append(
                Share(b, int(starts[b]), int(num_rows - num_ahead), int(border), int(num_ahead))
            )
    return shares


@triton.jit
def num_served(num_queries, seq_len, min_queries, GRAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of a request's queries, from the first on, ``find_shares`` gives to cuDNN."""
    num_ahead = (seq_len - num_queries) % GRAIN
    served = (num_queries + num_ahead) // GRAIN * GRAIN - num_ahead
    return tl.where(num_queries >= min_queries, served, 0)


def attend_share(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    share: Share,
    step: Step,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The share's rows of the result, [num_queries, N, D]. Needs a GPU with cuDNN.

    Args:
        out: [T, N, D], to which the rows are written; made here, for these rows alone, if None.
    """
    tokens = slice(share.first_token, share.first_token + share.num_queries)
    num_rows, border = share.num_queries + share.num_ahead, share.border
    rows = q[tokens]
    if share.num_ahead:
        rows = torch.zeros((num_rows, *q.shape[1:]), dtype=q.dtype, device=q.device)
        rows[share.num_ahead :] = q[tokens]
    k, v = gather_keys(
        key_cache, value_cache, step.block_table[share.request], num_keys=border + num_rows
    )
    recent = _cudnn(rows, k[border:], v[border:], scale, is_causal=True)
    wanted = recent[0][share.num_ahead :]
    if border == 0 and out is None:
        return wanted
    place = torch.empty_like(wanted) if out is None else out[tokens]
    if border == 0:
        return place.copy_(wanted)
    cached = _cudnn(rows, k[:border], v[:border], scale, is_causal=False)
    merge_results(recent, cached, place, num_ahead=share.num_ahead)
    return place


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """[S, N, D] on [S', K, D] -> [S, N, D], and [N, S] natural logs of sums of exponentials."""
    out, log_sums = torch.ops.aten._cudnn_attention_forward(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        None,
        None,
        None,
        q.shape[0],
        k.shape[0],
        True,
        0.0,
        is_causal,
        scale=scale,
    )[:2]
    return out[0].transpose(0, 1).contiguous(), log_sums[0, :, :, 0]


def gather_keys(
    key_cache: Tensor, value_cache: Tensor, block_ids: Tensor, *, num_keys: int
) -> tuple[Tensor, Tensor]:
    """The first ``num_keys`` keys and values of a request, in order: [num_keys, K, D] each."""
    block_size = key_cache.shape[1]
    row = key_cache.shape[2] * key_cache.shape[3]
    shape = (num_keys, *key_cache.shape[2:])
    k, v = (torch.empty(shape, dtype=key_cache.dtype, device=key_cache.device) for _ in range(2))
    _gather_kernel[(triton.cdiv(num_keys, block_size),)](
        key_cache,
        value_cache,
        k,
        v,
        block_ids,
        num_keys,
        ROW=row,
        BLOCK_SIZE=block_size,
        BLOCK_ROW=triton.next_power_of_2(row),
        num_warps=8,
    )
    return k, v


@triton.jit(do_not_specialize=["num_keys"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    key_cache_ptr,
    value_cache_ptr,
    k_ptr,
    v_ptr,
    block_ids_ptr,
    num_keys,
    ROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    block = tl.program_id(0)
    cols = tl.arange(0, BLOCK_ROW)
    source = tl.load(block_ids_ptr + block).to(tl.int64) * BLOCK_SIZE * ROW
    target = block.to(tl.int64) * BLOCK_SIZE * ROW
    for i in tl.static_range(BLOCK_SIZE):
        mask = (cols < ROW) & (block * BLOCK_SIZE + i < num_keys)
        k = tl.load(key_cache_ptr + source + i * ROW + cols, mask)
        v = tl.load(value_cache_ptr + source + i * ROW + cols, mask)
        tl.store(k_ptr + target + i * ROW + cols, k, mask)
        tl.store(v_ptr + target + i * ROW + cols, v, mask)


Result = tuple[Tensor, Tensor]  # [S, N, D], and [N, S] natural logs of sums of exponentials


def merge_results_reference(a: Result, b: Result, out: Tensor, *, num_ahead: int) -> None:
    """The definition: the mean of two results, weighted by their sums of exponentials."""
    weight = torch.sigmoid(a[1] - b[1]).T.unsqueeze(2)  # [S, N, 1]
    out.copy_((a[0].float() * weight + b[0].float() * (1.0 - weight))[num_ahead:])


def merge_results(a: Result, b: Result, out: Tensor, *, num_ahead: int) -> None:
    """Write to ``out`` what a softmax over the keys of both would have given.

    Args:
        out: [S - num_ahead, N, D], contiguous; the first ``num_ahead`` rows are left out.
    """
    num_rows, N, D = out.shape
    _merge_kernel[(num_rows,)](
        a[0],
        a[1],
        b[0],
        b[1],
        out,
        num_ahead,
        a[1].stride(0),
        b[1].stride(0),
        NUM_HEADS=N,
        HEAD_DIM=D,
        BLOCK_N=triton.next_power_of_2(N),
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_ahead", "a_stride", "b_stride"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    a_log_sums_ptr,
    b_ptr,
    b_log_sums_ptr,
    out_ptr,
    num_ahead,
    a_stride,
    b_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) + num_ahead
    heads = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    is_head = heads < NUM_HEADS
    a_log_sums = tl.load(a_log_sums_ptr + heads * a_stride + row, is_head, other=0.0)
    b_log_sums = tl.load(b_log_sums_ptr + heads * b_stride + row, is_head, other=0.0)
    weight = tl.sigmoid(a_log_sums - b_log_sums)[:, None]
    mask = is_head[:, None] & (cols < HEAD_DIM)[None, :]
    at = heads[:, None] * HEAD_DIM + cols[None, :]
    start = row.to(tl.int64) * NUM_HEADS * HEAD_DIM
    a = tl.load(a_ptr + start + at, mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + start + at, mask, other=0.0).to(tl.float32)
    target = tl.program_id(0).to(tl.int64) * NUM_HEADS * HEAD_DIM
    tl.store(out_ptr + target + at, a * weight + b * (1.0 - weight), mask)
