"""One turn of attention over a paged cache: a tile of query rows meets a tile of keys.

The kernels for decode and for prefill are loops of such turns; they alone know which rows and which
keys. Scores, softmax and sums are float32. Rows are queries of one key head, packed: G query heads
share it.
Source: Dao, "FlashAttention-2", arXiv:2307.08691.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.attention_step import Options


def loop_constants(
    key_cache: Tensor, group: int, options: Options, block_d: int, block_n: int
) -> dict[str, int | bool]:
    """The compile-time constants that the attention kernels share."""
    return {
        "GROUP": group,
        "NUM_KV_HEADS": key_cache.shape[2],
        "HEAD_DIM": key_cache.shape[3],
        "BLOCK_SIZE": key_cache.shape[1],
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "HAS_CAP": options.soft_cap is not None,
        "HAS_WINDOW": options.sliding_window is not None,
        "INTERPRET": knobs.runtime.interpret,
    }


def padded_batch(num_requests: int) -> int:
    """How many requests a program looks at in one go: few sizes, so that few are compiled."""
    return 256 if num_requests <= 256 else max(1024, triton.next_power_of_2(num_requests))


@triton.jit
def load_keys(  # type: ignore[no-untyped-def]
    caches,  # pointers to the keys and the values
    block_ids,  # [BLOCK_N]
    positions,  # [BLOCK_N]
    live,  # [BLOCK_N]; None: all
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Keys [BLOCK_D, BLOCK_N] and values [BLOCK_N, BLOCK_D] of one head.

    What is not live is never loaded, so whatever an earlier owner left there cannot spread.
    """
    cols = tl.arange(0, BLOCK_D)
    is_col = cols < HEAD_DIM
    slots = block_ids.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    at = (slots * NUM_KV_HEADS + kv_head) * HEAD_DIM
    k_mask = is_col[:, None]
    v_mask = is_col[None, :]
    if live is not None:
        k_mask = k_mask & live[None, :]
        v_mask = v_mask & live[:, None]
    k = tl.load(caches[0] + at[None, :] + cols[:, None], k_mask, other=0.0)
    v = tl.load(caches[1] + at[:, None] + cols[None, :], v_mask, other=0.0)
    if INTERPRET:  # the interpreter multiplies the bits of 16-bit numbers
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    return k, v


@triton.jit
def no_keys(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The running maximum (base 2), sum and unscaled output before any key."""
    largest = tl.full((ROWS,), -1e30, tl.float32)
    return largest, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)


@triton.jit
def fold_in(  # type: ignore[no-untyped-def]
    q,  # [ROWS, BLOCK_D]
    k,
    v,
    seen,  # [ROWS, BLOCK_N], or one row for all; None: everything
    state,  # what this returned for the keys so far, or ``no_keys``
    scale,
    soft_cap,
    HAS_CAP: tl.constexpr,
):
    """The state with the seen keys added. The scale must be positive."""
    largest, total, out = state
    LOG2_E: tl.constexpr = 1.4426950408889634
    scores = tl.dot(q, k, input_precision="ieee")
    unit = scale * LOG2_E
    if HAS_CAP:  # c tanh(s / c), as tanh(z) = 2 sigmoid(2z) - 1
        scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scale * scores / soft_cap) - 1.0)
        unit = LOG2_E
    if seen is not None:
        scores = tl.where(seen, scores, -1e30)
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * unit)
    decay = tl.exp2(largest - new_largest)
    weights = tl.exp2(scores * unit - new_largest[:, None])
    if seen is not None:
        weights = tl.where(seen, weights, 0.0)
    total = total * decay + tl.sum(weights, axis=1)
    out = out * decay[:, None]
    out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
    return new_largest, total, out
