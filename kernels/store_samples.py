"""Drawn tokens go where the next step reads them, and beside each other for the host.

Request b's token becomes entry seq_lens[b] of its row in the token table. The result holds the
ids, then for each of them whether its row is bad.
Shapes: B requests, R rows of the token table, W tokens that a row holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


def store_samples(
    token_ids: Tensor, is_bad: Tensor, rows: Tensor, seq_lens: Tensor, tokens: Tensor, out: Tensor
) -> None:
    """Write ``tokens`` and ``out``; several requests of one row leave any one of their ids there.

    Args:
        token_ids: [B] int64.
        is_bad: [B] bool.
        rows, seq_lens: [B] int32, within R and below W.
        tokens: [R, W] int32, written in place.
        out: [2, B] int32: the ids, then 0 or 1.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    B = token_ids.shape[0]
    if any(t.shape != (B,) for t in (token_ids, is_bad, rows, seq_lens)) or out.shape != (2, B):
        raise ValueError(f"one entry for each request: {token_ids.shape}, {out.shape}")
    if token_ids.dtype != torch.int64 or is_bad.dtype != torch.bool or tokens.ndim != 2:
        raise ValueError(f"ids are int64 and flags bool: {token_ids.dtype}, {is_bad.dtype}")
    if any(t.dtype != torch.int32 for t in (rows, seq_lens, tokens, out)):
        raise ValueError("rows, lengths, the table and the result are int32")
    everything = (token_ids, is_bad, rows, seq_lens, tokens, out)
    if not all(t.is_contiguous() and t.device == tokens.device for t in everything):
        raise ValueError("all tensors must be contiguous and on one device")
    run = store_samples_triton if tokens.is_cuda else store_samples_reference
    run(token_ids, is_bad, rows, seq_lens, tokens, out)


def store_samples_reference(
    token_ids: Tensor, is_bad: Tensor, rows: Tensor, seq_lens: Tensor, tokens: Tensor, out: Tensor
) -> None:
    """The definition."""
    tokens[rows.long(), seq_lens.long()] = token_ids.to(torch.int32)
    out[0] = token_ids
    out[1] = is_bad


def store_samples_triton(
    token_ids: Tensor, is_bad: Tensor, rows: Tensor, seq_lens: Tensor, tokens: Tensor, out: Tensor
) -> None:
    """Launch the kernel: one program for 128 requests."""
    B = token_ids.shape[0]
    if B:
        _store_samples_kernel[(triton.cdiv(B, _BLOCK),)](
            token_ids,
            is_bad.view(torch.uint8),
            rows,
            seq_lens,
            tokens,
            out,
            B,
            tokens.shape[1],
            BLOCK=_BLOCK,
            num_warps=1,
        )


@triton.jit(do_not_specialize=["num_requests", "tokens_width"])
def _store_samples_kernel(  # type: ignore[no-untyped-def]
    token_ids_ptr,
    is_bad_ptr,
    rows_ptr,
    seq_lens_ptr,
    tokens_ptr,
    out_ptr,
    num_requests,
    tokens_width,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = b < num_requests
    token_ids = tl.load(token_ids_ptr + b, mask, other=0).to(tl.int32)
    is_bad = tl.load(is_bad_ptr + b, mask, other=0).to(tl.int32)
    rows = tl.load(rows_ptr + b, mask, other=0).to(tl.int64)  # a table may hold 2**31 entries
    seq_lens = tl.load(seq_lens_ptr + b, mask, other=0)
    tl.store(tokens_ptr + rows * tokens_width + seq_lens, token_ids, mask)
    tl.store(out_ptr + b, token_ids, mask)
    tl.store(out_ptr + num_requests + b, is_bad, mask)
