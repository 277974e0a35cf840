"""Log-probabilities of the model's own distribution: log-softmax of raw float32 logits.

For each row: the chosen token's log-probability and rank, and the k likeliest tokens. Rank 1 is
the likeliest token; tokens with exactly equal logits share the better rank.
Shapes: B rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dependent_launch

_CHUNK = 4096
_MAX_NAMED = 32  # tokens that are named by repeated search

TokenLogprobs = tuple[Tensor, Tensor, Tensor, Tensor]


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """Return ``(chosen, rank, top_ids, top_logprobs)``; the logits are left as they are.

    Args:
        logits: [B, V] float32, contiguous.
        token_ids: [B] int64 within V, the tokens whose log-probability and rank are wanted.
        k: how many of the likeliest tokens to name, 0 <= k <= V.

    Returns:
        chosen [B] float32, rank [B] int64, top_ids [B, k] int64 and top_logprobs [B, k] float32,
        likeliest first.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take, or k beyond V.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            f"logits must be a contiguous [B, V] float32: {logits.shape}, {logits.dtype}"
        )
    if token_ids.shape != logits.shape[:1] or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be [B] int64: {token_ids.shape}, {token_ids.dtype}")
    if not token_ids.is_contiguous() or token_ids.device != logits.device:
        raise ValueError("token_ids must be contiguous and on the logits' device")
    if logits.shape[1] == 0 or not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k must be within 0 and the vocabulary, {logits.shape[1]}, not {k}")
    run = token_logprobs_triton if logits.is_cuda else token_logprobs_cpu
    return run(logits, token_ids, k)


def token_logprobs_reference(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """The definition."""
    logprobs = torch.log_softmax(logits, dim=1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    rank = (logits > logits.gather(1, token_ids.unsqueeze(1))).sum(dim=1) + 1
    top = torch.topk(logprobs, k, dim=1)
    return chosen.squeeze(1), rank, top.indices, top.values


def token_logprobs_cpu(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """The CPU path: one sum of exponentials instead of a [B, V] log-softmax."""
    log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    rank = (logits > chosen).sum(dim=1) + 1
    top = torch.topk(logits, k, dim=1)
    return (chosen - log_sum).squeeze(1), rank, top.indices, top.values - log_sum


def token_logprobs_triton(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """Launch the kernels: each chunk of a row names its best, then the row the best of these.

    Both read what they need once. Of equal tokens the lowest ids are named. Where k is large the
    k best come from torch's own selection.
    """
    B, V = logits.shape
    num_named = k if k <= _MAX_NAMED else 0
    num_chunks = triton.cdiv(V, _CHUNK)
    f32, i32, device = torch.float32, torch.int32, logits.device
    largest = torch.empty((B, num_chunks), dtype=f32, device=device)
    sums = torch.empty_like(largest)
    num_better = torch.empty((B, num_chunks), dtype=i32, device=device)
    best = torch.empty((B, num_chunks, num_named), dtype=f32, device=device)
    best_ids = torch.empty((B, num_chunks, num_named), dtype=i32, device=device)
    chosen = torch.empty(B, dtype=f32, device=device)
    log_sum = torch.empty_like(chosen)
    rank = torch.empty(B, dtype=torch.int64, device=device)
    top_ids = torch.empty((B, num_named), dtype=torch.int64, device=device)
    top = torch.empty((B, num_named), dtype=f32, device=device)
    if B:
        options = dependent_launch.options()
        _chunk_logprobs_kernel[(B, num_chunks)](
            logits,
            token_ids,
            largest,
            sums,
            num_better,
            best,
            best_ids,
            V,
            num_named,
            CHUNK=_CHUNK,
            num_warps=8,
            **options,
        )
        _row_logprobs_kernel[(B,)](
            logits,
            token_ids,
            largest,
            sums,
            num_better,
            best,
            best_ids,
            chosen,
            log_sum,
            rank,
            top_ids,
            top,
            V,
            num_named,
            NUM_CHUNKS=num_chunks,
            BLOCK_C=triton.next_power_of_2(num_chunks),
            BLOCK_N=triton.next_power_of_2(num_chunks * _MAX_NAMED),
            num_warps=8,
            **options,
        )
    if num_named < k:
        selected = torch.topk(logits, k, dim=1)
        return chosen, rank, selected.indices, selected.values - log_sum.unsqueeze(1)
    return chosen, rank, top_ids, top


@triton.jit(do_not_specialize=["num_named"], do_not_specialize_on_alignment=["token_ids_ptr"])
def _chunk_logprobs_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    token_ids_ptr,
    largest_ptr,
    sums_ptr,
    num_better_ptr,
    best_ptr,
    best_ids_ptr,
    V,
    num_named,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of a chunk: the sum of exp(x - largest), how many beat the chosen token, and its best."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_ptr = logits_ptr + row * V
    chosen = tl.load(row_ptr + tl.load(token_ids_ptr + row))
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    is_left = ids < V
    loaded = tl.load(row_ptr + ids, is_left, other=float("-inf"))
    x = tl.where(loaded == loaded, loaded, float("-inf"))  # a NaN is in the sum alone
    largest = tl.max(x, axis=0)
    shift = tl.where(largest > float("-inf"), largest, 0.0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest_ptr + at, largest)
    tl.store(sums_ptr + at, tl.sum(tl.exp(loaded - shift), axis=0))
    tl.store(num_better_ptr + at, tl.sum((x > chosen).to(tl.int32), axis=0))
    for i in range(num_named):
        most, best_id, is_left = _take_best(x, ids, is_left)
        tl.store(best_ptr + at * num_named + i, most)
        tl.store(best_ids_ptr + at * num_named + i, best_id)


@triton.jit
def _take_best(x, ids, is_left):  # type: ignore[no-untyped-def]
    """The largest of what is left, its id (2**31 - 1 without one), and what is left then."""
    most = tl.max(tl.where(is_left, x, float("-inf")), axis=0)
    best_id = tl.min(tl.where(is_left & (x == most), ids, 0x7FFFFFFF), axis=0)
    return most, best_id, is_left & (ids != best_id)


@triton.jit(do_not_specialize=["num_named"], do_not_specialize_on_alignment=["token_ids_ptr"])
def _row_logprobs_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    token_ids_ptr,
    largest_ptr,
    sums_ptr,
    num_better_ptr,
    best_ptr,
    best_ids_ptr,
    chosen_ptr,
    log_sum_ptr,
    rank_ptr,
    top_ids_ptr,
    top_ptr,
    V,
    num_named,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    c = tl.arange(0, BLOCK_C)
    at = row * NUM_CHUNKS + c
    peaks = tl.load(largest_ptr + at, c < NUM_CHUNKS, other=float("-inf"))
    sums = tl.load(sums_ptr + at, c < NUM_CHUNKS, other=0.0)
    num_better = tl.load(num_better_ptr + at, c < NUM_CHUNKS, other=0)
    largest = tl.max(peaks, axis=0)
    log_sum = largest + tl.log(tl.sum(sums * tl.exp(peaks - largest), axis=0))
    chosen = tl.load(logits_ptr + row * V + tl.load(token_ids_ptr + row))
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(chosen_ptr + row, chosen - log_sum)
    tl.store(rank_ptr + row, (tl.sum(num_better, axis=0) + 1).to(tl.int64))
    n = tl.arange(0, BLOCK_N)
    num_candidates = NUM_CHUNKS * num_named
    best = tl.load(best_ptr + row * num_candidates + n, n < num_candidates, other=float("-inf"))
    ids = tl.load(best_ids_ptr + row * num_candidates + n, n < num_candidates, other=0x7FFFFFFF)
    is_left = ids < V
    for i in range(num_named):
        most, best_id, is_left = _take_best(best, ids, is_left)
        # Without a number left (a row of NaN) any token will do.
        tl.store(top_ids_ptr + row * num_named + i, tl.minimum(best_id, V - 1).to(tl.int64))
        tl.store(top_ptr + row * num_named + i, most - log_sum)
