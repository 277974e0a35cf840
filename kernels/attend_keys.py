"""The inner loop of attention over a paged cache: a tile of query rows meets a range of keys.

The kernels for decode and for prefill call it; they alone know which rows and which keys. Scores,
softmax and sums are float32. Rows are queries of one key head, packed: G query heads share it.
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
def attend_keys(  # type: ignore[no-untyped-def]
    q,  # [ROWS, BLOCK_D]
    query_positions,  # [ROWS]; used with CAUSAL alone
    first,
    end,
    kv_head,
    key_cache_ptr,
    value_cache_ptr,
    block_ids_ptr,
    scale,
    soft_cap,
    sliding_window,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Attend to keys [first, end): running maximum (base 2), sum and unscaled output.

    With CAUSAL a row sees no key after its own position, and of those before it only the window;
    else it sees them all. What lies outside the range is never loaded, so whatever an earlier
    owner left there cannot spread.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    cols = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_N)
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # Block ids are read a tile ahead: found in the same turn, they would hold up the keys' loads,
    # which the compiler then starts too late to cover the memory's latency.
    ahead = first + offsets
    block_ids = tl.load(block_ids_ptr + ahead // BLOCK_SIZE, ahead < end, other=0)
    for start in range(first, end, BLOCK_N):
        positions = start + offsets
        live = positions < end
        slots = block_ids.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        at = (slots * NUM_KV_HEADS + kv_head) * HEAD_DIM
        is_col = cols < HEAD_DIM
        k_mask = live[None, :] & is_col[:, None]
        v_mask = live[:, None] & is_col[None, :]
        ahead = positions + BLOCK_N
        block_ids = tl.load(block_ids_ptr + ahead // BLOCK_SIZE, ahead < end, other=0)
        k = tl.load(key_cache_ptr + at[None, :] + cols[:, None], k_mask, other=0.0)
        v = tl.load(value_cache_ptr + at[:, None] + cols[None, :], v_mask, other=0.0)
        if INTERPRET:  # the interpreter multiplies the bits of 16-bit numbers
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:  # c tanh(s / c), as tanh(z) = 2 sigmoid(2z) - 1
            scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)
        scores *= LOG2_E
        seen = live[None, :]
        if CAUSAL:
            seen = seen & (positions[None, :] <= query_positions[:, None])
        if CAUSAL and HAS_WINDOW:
            seen = seen & (positions[None, :] > query_positions[:, None] - sliding_window)
        scores = tl.where(seen, scores, -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        decay = tl.exp2(largest - new_largest)
        weights = tl.where(seen, tl.exp2(scores - new_largest[:, None]), 0.0)
        total = total * decay + tl.sum(weights, axis=1)
        out = out * decay[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        largest = new_largest
    return largest, total, out
