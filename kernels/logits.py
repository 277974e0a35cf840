"""Changes to logits before sampling, in place: penalties, bias and bans, grammar bitmasks.

Shapes: B rows of logits, V vocabulary. Logits are float32 and contiguous; a token that must
not be drawn gets -inf.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_V = 1024


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """Penalise tokens that were seen already, in place.

    First repetition, for tokens of the prompt or the output: a positive logit is divided by it,
    any other multiplied. Then, for tokens of the output alone, frequency times the count and
    presence once are taken away.

    Args:
        logits: [B, V] float32.
        output_counts: [B, V] int32, how often each token stands in the output so far.
        prompt_mask: [B, V] bool, which tokens stand in the prompt.
        presence, frequency, repetition: [B] float32; 0, 0 and 1 change nothing.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    _check_logits(logits)
    if output_counts.shape != logits.shape or prompt_mask.shape != logits.shape:
        raise ValueError(
            f"shapes differ: {logits.shape}, {output_counts.shape}, {prompt_mask.shape}"
        )
    if output_counts.dtype != torch.int32 or prompt_mask.dtype != torch.bool:
        raise ValueError(
            "output_counts must be int32 and prompt_mask bool, not "
            f"{output_counts.dtype}, {prompt_mask.dtype}"
        )
    for values in (presence, frequency, repetition):
        if values.shape != logits.shape[:1] or values.dtype != torch.float32:
            raise ValueError(f"a penalty must be [B] float32: {values.shape}, {values.dtype}")
    _check_layout(logits, output_counts, prompt_mask, presence, frequency, repetition)
    run = apply_penalties_triton if logits.is_cuda else apply_penalties_reference
    run(logits, output_counts, prompt_mask, presence, frequency, repetition)


def apply_token_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """Add ``values[i]`` to ``logits[rows[i], token_ids[i]]``, in place; -inf bans the token.

    A pair may come several times, its values add up; the order of that sum is not fixed on a
    GPU.

    Args:
        logits: [B, V] float32.
        rows, token_ids: [E] int64, within B and V.
        values: [E] float32.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    _check_logits(logits)
    if rows.ndim != 1 or rows.shape != token_ids.shape or rows.shape != values.shape:
        raise ValueError(
            f"rows, token_ids and values must be [E]: {rows.shape}, "
            f"{token_ids.shape}, {values.shape}"
        )
    if rows.dtype != torch.int64 or token_ids.dtype != torch.int64:
        raise ValueError(f"rows and token_ids must be int64: {rows.dtype}, {token_ids.dtype}")
    if values.dtype != torch.float32:
        raise ValueError(f"values must be float32, not {values.dtype}")
    _check_layout(logits, rows, token_ids, values)
    run = apply_token_bias_triton if logits.is_cuda else apply_token_bias_cpu
    run(logits, rows, token_ids, values)


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """Ban every token whose bit is 0, in place, in the rows that have a mask.

    Args:
        logits: [B, V] float32.
        rows: [R] int64, the row that each mask is for; no row twice.
        bitmask: [R, ceil(V / 32)] int32; token i is bit i % 32 of word i // 32.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    _check_logits(logits)
    if rows.ndim != 1 or bitmask.shape != (rows.shape[0], triton.cdiv(logits.shape[1], 32)):
        raise ValueError(
            f"bitmask must be [R, ceil(V / 32)]: {bitmask.shape}, rows {rows.shape}, "
            f"logits {logits.shape}"
        )
    if rows.dtype != torch.int64 or bitmask.dtype != torch.int32:
        raise ValueError(f"rows must be int64 and bitmask int32: {rows.dtype}, {bitmask.dtype}")
    _check_layout(logits, rows, bitmask)
    run = apply_bitmask_triton if logits.is_cuda else apply_bitmask_cpu
    run(logits, rows, bitmask)


def has_nan(logits: Tensor) -> Tensor:
    """Return [B] bool: which rows hold a NaN, so that their requests can be failed alone.

    Raises:
        ValueError: logits is not a contiguous [B, V] float32.
    """
    _check_logits(logits)
    return (has_nan_triton if logits.is_cuda else has_nan_cpu)(logits)


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [B, V] float32, not {logits.shape}, {logits.dtype}")
    if not logits.is_contiguous():
        raise ValueError("logits must be contiguous")


def _check_layout(logits: Tensor, *others: Tensor) -> None:
    if not all(t.is_contiguous() and t.device == logits.device for t in others):
        raise ValueError("all tensors must be contiguous and on one device")


def apply_penalties_reference(
    logits: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """The definition, and the CPU path: it has no loop to take out."""
    in_output = output_counts > 0
    factor = repetition.unsqueeze(1).expand_as(logits)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits.copy_(torch.where(in_output | prompt_mask, repeated, logits))
    logits -= frequency.unsqueeze(1) * output_counts
    logits -= presence.unsqueeze(1) * in_output


def apply_token_bias_reference(
    logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor
) -> None:
    """The definition: one entry after the other."""
    for row, token_id, value in zip(rows.tolist(), token_ids.tolist(), values, strict=True):
        logits[row, token_id] += value


def apply_token_bias_cpu(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """The CPU path: one scatter."""
    logits.index_put_((rows, token_ids), values, accumulate=True)


def apply_bitmask_reference(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """The definition: unpack the bits with shifts."""
    bits = (bitmask.unsqueeze(-1) >> torch.arange(32, device=bitmask.device)) & 1  # [R, W, 32]
    banned = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(banned, -torch.inf)


def apply_bitmask_cpu(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """The CPU path: numpy unpacks a byte at a time."""
    octets = (~bitmask).numpy().view(np.uint8)
    banned = torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little")).bool()
    for i, row in enumerate(rows.tolist()):
        logits[row].masked_fill_(banned[i, : logits.shape[1]], -torch.inf)


def has_nan_reference(logits: Tensor) -> Tensor:
    """The definition."""
    return logits.isnan().any(dim=1)


def has_nan_cpu(logits: Tensor) -> Tensor:
    """The CPU path: torch's maximum carries a NaN through, so one pass is enough."""
    return logits.amax(dim=1).isnan()


def apply_penalties_triton(
    logits: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """Launch the kernel: one program for 1024 tokens of a row."""
    B, V = logits.shape
    if B == 0:
        return
    _penalties_kernel[(B, triton.cdiv(V, _BLOCK_V))](
        logits,
        output_counts,
        prompt_mask.view(torch.uint8),
        presence,
        frequency,
        repetition,
        V,
        BLOCK_V=_BLOCK_V,
        num_warps=4,
    )


def apply_token_bias_triton(
    logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor
) -> None:
    """Launch the kernel: one program for 128 entries."""
    num_entries = rows.shape[0]
    if num_entries == 0:
        return
    _token_bias_kernel[(triton.cdiv(num_entries, 128),)](
        logits, rows, token_ids, values, num_entries, logits.shape[1], BLOCK_E=128, num_warps=4
    )


def apply_bitmask_triton(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """Launch the kernel: one program for 1024 tokens of a masked row."""
    R, W = bitmask.shape
    if R == 0:
        return
    V = logits.shape[1]
    grid = (R, triton.cdiv(V, _BLOCK_V))
    _bitmask_kernel[grid](logits, rows, bitmask, V, W, BLOCK_V=_BLOCK_V, num_warps=4)


def has_nan_triton(logits: Tensor) -> Tensor:
    """Launch the kernel: one program a row."""
    B, V = logits.shape
    found = torch.empty(B, dtype=torch.int32, device=logits.device)
    if B:
        _has_nan_kernel[(B,)](logits, found, V, BLOCK_V=4096, num_warps=8)
    return found != 0


@triton.jit
def _penalties_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    output_counts_ptr,
    prompt_mask_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    V,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: B * V may pass 2**31
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    at = row * V + cols
    x = tl.load(logits_ptr + at, mask, other=0.0)
    counts = tl.load(output_counts_ptr + at, mask, other=0)
    in_prompt = tl.load(prompt_mask_ptr + at, mask, other=0) != 0
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    repetition = tl.load(repetition_ptr + row)
    in_output = counts > 0
    repeated = tl.where(x > 0, x / repetition, x * repetition)
    x = tl.where(in_output | in_prompt, repeated, x)
    x -= frequency * counts.to(tl.float32)
    x -= tl.where(in_output, presence, 0.0)
    tl.store(logits_ptr + at, x, mask)


@triton.jit(do_not_specialize=["num_entries"])
def _token_bias_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, rows_ptr, token_ids_ptr, values_ptr, num_entries, V, BLOCK_E: tl.constexpr
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = e < num_entries
    row = tl.load(rows_ptr + e, mask, other=0)  # int64, as B * V may pass 2**31
    token_id = tl.load(token_ids_ptr + e, mask, other=0)
    value = tl.load(values_ptr + e, mask, other=0.0)
    tl.atomic_add(logits_ptr + row * V + token_id, value, mask, sem="relaxed")


@triton.jit
def _bitmask_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, rows_ptr, bitmask_ptr, V, W, BLOCK_V: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    row = tl.load(rows_ptr + i)  # int64, as B * V may pass 2**31
    word = tl.load(bitmask_ptr + i * W + cols // 32, mask, other=-1)
    banned = ((word >> (cols % 32)) & 1) == 0
    minus_inf = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    tl.store(logits_ptr + row * V + cols, minus_inf, mask & banned)


@triton.jit
def _has_nan_kernel(logits_ptr, found_ptr, V, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    count = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, V, BLOCK_V):
        x = tl.load(logits_ptr + row * V + start + cols, start + cols < V, other=0.0)
        count += (x != x).to(tl.int32)
    tl.store(found_ptr + row, tl.sum(count, axis=0))
