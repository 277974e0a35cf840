"""Log-probabilities of the model's own distribution: log-softmax of raw float32 logits.

For each row: the chosen token's log-probability and rank, and the k likeliest tokens. Rank 1 is
the likeliest token; tokens with exactly equal logits share the better rank.
Shapes: B rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    rank = (logprobs > chosen).sum(dim=1) + 1
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
    """Launch the kernel, one program a row; the k best come from torch's own selection."""
    B, V = logits.shape
    log_sum = torch.empty(B, dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(log_sum)
    rank = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B:
        _logprobs_kernel[(B,)](
            logits, token_ids, log_sum, chosen, rank, V, BLOCK_V=4096, num_warps=8
        )
    top = torch.topk(logits, k, dim=1)
    return chosen, rank, top.indices, top.values - log_sum.unsqueeze(1)


@triton.jit
def _logprobs_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, token_ids_ptr, log_sum_ptr, chosen_ptr, rank_ptr, V, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    logits_row = logits_ptr + row * V
    chosen = tl.load(logits_row + tl.load(token_ids_ptr + row))
    cols = tl.arange(0, BLOCK_V)
    # Each lane keeps its own maximum and sum; they meet once, after the loop.
    largest = tl.full((BLOCK_V,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    better = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, V, BLOCK_V):
        x = tl.load(logits_row + start + cols, start + cols < V, other=float("-inf"))
        new_largest = tl.maximum(largest, x)
        total = total * tl.exp(largest - new_largest) + tl.exp(x - new_largest)
        largest = new_largest
        better += (x > chosen).to(tl.int32)
    row_largest = tl.max(largest, axis=0)
    row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)
    log_sum = row_largest + tl.log(row_total)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(chosen_ptr + row, chosen - log_sum)
    tl.store(rank_ptr + row, (tl.sum(better, axis=0) + 1).to(tl.int64))
