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

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.attention_step import Options, Step, StepMemo
from kernels.paged_attention_cpu import paged_attention_cpu


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
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, not {soft_cap}")
    options = Options(scale, sliding_window, soft_cap)
    step = Step(block_table, query_start_loc, seq_lens, max_query_len, max_seq_len)
    if not q.is_cuda:
        return paged_attention_cpu(q, key_cache, value_cache, step, options, memo)
    if max_query_len <= 1:
        return paged_decode_triton(q, key_cache, value_cache, step, options)
    return paged_attention_triton(q, key_cache, value_cache, step, options)


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


def paged_attention_triton(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, step: Step, options: Options
) -> Tensor:
    """Launch the kernel for any mix of requests: one program a query tile and key head."""
    T, N, D = q.shape
    K, B = key_cache.shape[2], step.seq_lens.shape[0]
    out = torch.empty((T, N, D), dtype=q.dtype, device=q.device)
    if T == 0 or B == 0 or N == 0:
        return out
    group = N // K
    block_d, block_n, max_rows = _tile_sizes(D, q.element_size())
    rows = min(max_rows, triton.next_power_of_2(step.max_query_len * group))
    rows = max(16, rows, triton.next_power_of_2(group))
    queries = rows // group  # per tile
    _prefill_kernel[(T // queries + B, K)](
        q,
        key_cache,
        value_cache,
        out,
        step.block_table,
        step.query_start_loc,
        step.seq_lens,
        B,
        q.stride(0),
        step.block_table.stride(0),
        options.scale,
        options.soft_cap or 0.0,
        options.sliding_window or 0,
        TILE_QUERIES=queries,
        ROWS=rows,
        **_constants(key_cache, group, options, block_d, block_n),
        num_warps=8 if block_d >= 256 or rows >= 128 else 4,
        num_stages=2 if block_d * q.element_size() > 256 else 3,
    )
    return out


def paged_decode_triton(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, step: Step, options: Options
) -> Tensor:
    """Launch the kernel for requests of one query: one program a request, key head and split.

    Few programs would leave most of the GPU idle, so long requests are split; the parts meet in
    a second kernel, weighted by their sums of exponentials.
    """
    T, N, D = q.shape
    K, B = key_cache.shape[2], step.seq_lens.shape[0]
    out = torch.empty((T, N, D), dtype=q.dtype, device=q.device)
    if T == 0 or B == 0 or N == 0:
        return out
    group = N // K
    block_d, block_n, _ = _tile_sizes(D, q.element_size())
    splits = _num_splits(B * K, step.max_seq_len)
    if splits == 1:
        parts, log_sums = out, out  # the kernel writes the result itself
    else:
        parts = torch.empty((T, N, splits, D), dtype=torch.float32, device=q.device)
        log_sums = torch.empty((T, N, splits), dtype=torch.float32, device=q.device)
    _decode_kernel[(B, K, splits)](
        q,
        key_cache,
        value_cache,
        parts,
        log_sums,
        step.block_table,
        step.query_start_loc,
        step.seq_lens,
        splits,
        q.stride(0),
        step.block_table.stride(0),
        options.scale,
        options.soft_cap or 0.0,
        options.sliding_window or 0,
        SPLIT=splits > 1,
        ROWS=max(16, triton.next_power_of_2(group)),
        **_constants(key_cache, group, options, block_d, block_n),
        num_warps=8 if block_d >= 256 else 4 if block_d * q.element_size() > 256 else 2,
        num_stages=2 if block_d * q.element_size() > 256 else 3,
    )
    if splits > 1:
        _merge_kernel[(T, N)](
            parts,
            log_sums,
            out,
            splits,
            HEAD_DIM=D,
            BLOCK_D=block_d,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return out


def _tile_sizes(head_dim: int, item_size: int) -> tuple[int, int, int]:
    """Padded head size, keys per tile, and the most query rows that shared memory leaves."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    row_bytes = block_d * item_size
    if item_size == 4:  # no tensor cores at full precision: large tiles only swell the code
        return block_d, 32 if row_bytes <= 512 else 16, 32 if row_bytes <= 1024 else 16
    block_n = min(64, max(16, 16384 // row_bytes))
    return block_d, block_n, 64 if row_bytes <= 512 else 32


def _num_splits(num_programs: int, max_seq_len: int) -> int:
    """Aim at two programs a multiprocessor of a large GPU, each with 256 keys or more."""
    wanted = triton.cdiv(264, num_programs)
    return max(1, min(wanted, triton.cdiv(max_seq_len, 256), 64))


def _constants(
    key_cache: Tensor, group: int, options: Options, block_d: int, block_n: int
) -> dict[str, int | bool]:
    """The compile-time constants that both attention kernels share."""
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


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,  # [ROWS, BLOCK_D]
    query_positions,  # [ROWS]
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
):
    """Attend to keys [first, end): running maximum (base 2), sum and unscaled output.

    What lies outside is never loaded, so whatever an earlier owner left there cannot spread.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    cols = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_N)
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_N):
        positions = start + offsets
        live = positions < end
        block_ids = tl.load(block_ids_ptr + positions // BLOCK_SIZE, live, other=0)
        slots = block_ids.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        at = (slots * NUM_KV_HEADS + kv_head) * HEAD_DIM
        k_mask = live[None, :]
        v_mask = live[:, None]
        if HEAD_DIM != BLOCK_D:
            k_mask = k_mask & (cols < HEAD_DIM)[:, None]
            v_mask = v_mask & (cols < HEAD_DIM)[None, :]
        k = tl.load(key_cache_ptr + at[None, :] + cols[:, None], k_mask, other=0.0)
        v = tl.load(value_cache_ptr + at[:, None] + cols[None, :], v_mask, other=0.0)
        if INTERPRET:  # the interpreter multiplies the bits of 16-bit numbers
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:  # c tanh(s / c), as tanh(z) = 2 sigmoid(2z) - 1
            scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)
        seen = live[None, :] & (positions[None, :] <= query_positions[:, None])
        if HAS_WINDOW:
            seen = seen & (positions[None, :] > query_positions[:, None] - sliding_window)
        scores = tl.where(seen, scores * LOG2_E, -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        decay = tl.exp2(largest - new_largest)
        weights = tl.where(seen, tl.exp2(scores - new_largest[:, None]), 0.0)
        total = total * decay + tl.sum(weights, axis=1)
        out = out * decay[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        largest = new_largest
    return largest, total, out


@triton.jit(do_not_specialize=["num_requests", "block_table_stride", "sliding_window"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    key_cache_ptr,
    value_cache_ptr,
    out_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    num_requests,
    q_stride,
    block_table_stride,
    scale,
    soft_cap,
    sliding_window,
    TILE_QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    # Request b owns the tiles from query_start_loc[b] // TILE_QUERIES + b on: never fewer than
    # it needs, and known without a look at the other requests. Find the last b that starts here
    # or before.
    b = tile * 0
    after = num_requests
    while after - b > 1:
        middle = (b + after) // 2
        starts_at = tl.load(query_start_loc_ptr + middle) // TILE_QUERIES + middle
        if starts_at <= tile:
            b = middle
        else:
            after = middle
    query_start = tl.load(query_start_loc_ptr + b)
    query_len = tl.load(query_start_loc_ptr + b + 1) - query_start
    first_query = (tile - query_start // TILE_QUERIES - b) * TILE_QUERIES
    if first_query < query_len:
        seq_len = tl.load(seq_lens_ptr + b)
        rows = tl.arange(0, ROWS)
        queries = first_query + rows // GROUP
        row_mask = (rows < TILE_QUERIES * GROUP) & (queries < query_len)
        tokens = (query_start + queries).to(tl.int64)  # int64: T * N * D may pass 2**31
        heads = kv_head * GROUP + rows % GROUP
        cols = tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        q_at = tokens * q_stride + heads * HEAD_DIM
        q = tl.load(q_ptr + q_at[:, None] + cols[None, :], mask, other=0.0)
        if INTERPRET:
            q = q.to(tl.float32)
        query_positions = seq_len - query_len + queries
        first = 0
        if HAS_WINDOW:
            first = tl.maximum(seq_len - query_len + first_query - sliding_window + 1, 0)
        end = tl.minimum(seq_len, seq_len - query_len + first_query + TILE_QUERIES)
        _, total, out = _attend(
            q,
            query_positions,
            first,
            end,
            kv_head,
            key_cache_ptr,
            value_cache_ptr,
            block_table_ptr + b.to(tl.int64) * block_table_stride,
            scale,
            soft_cap,
            sliding_window,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_D,
            BLOCK_N,
            HAS_CAP,
            HAS_WINDOW,
            INTERPRET,
            ROWS,
        )
        out = out / tl.maximum(total, 1e-30)[:, None]
        out_at = (tokens * NUM_KV_HEADS * GROUP + heads) * HEAD_DIM
        tl.store(out_ptr + out_at[:, None] + cols[None, :], out, mask)


@triton.jit(do_not_specialize=["num_splits", "block_table_stride", "sliding_window"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    key_cache_ptr,
    value_cache_ptr,
    parts_ptr,  # with SPLIT [T, N, num_splits, D] float32, else the result, [T, N, D]
    log_sums_ptr,  # with SPLIT [T, N, num_splits], base 2
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    num_splits,
    q_stride,
    block_table_stride,
    scale,
    soft_cap,
    sliding_window,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(query_start_loc_ptr + b)
    if tl.load(query_start_loc_ptr + b + 1) > token:
        seq_len = tl.load(seq_lens_ptr + b)
        first = 0
        if HAS_WINDOW:
            first = tl.maximum(seq_len - sliding_window, 0)
        end = seq_len
        if SPLIT:
            share = tl.cdiv(tl.cdiv(seq_len - first, num_splits), BLOCK_N) * BLOCK_N
            first = first + split * share
            end = tl.minimum(first + share, seq_len)
        rows = tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK_D)
        mask = (rows < GROUP)[:, None] & (cols < HEAD_DIM)[None, :]
        heads = kv_head * GROUP + rows
        q_at = token.to(tl.int64) * q_stride + heads * HEAD_DIM
        q = tl.load(q_ptr + q_at[:, None] + cols[None, :], mask, other=0.0)
        if INTERPRET:
            q = q.to(tl.float32)
        largest, total, out = _attend(
            q,
            tl.full((ROWS,), 0, tl.int32) + seq_len - 1,
            first,
            end,
            kv_head,
            key_cache_ptr,
            value_cache_ptr,
            block_table_ptr + b * block_table_stride,
            scale,
            soft_cap,
            sliding_window,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_D,
            BLOCK_N,
            HAS_CAP,
            HAS_WINDOW,
            INTERPRET,
            ROWS,
        )
        out = out / tl.maximum(total, 1e-30)[:, None]
        out_rows = token.to(tl.int64) * NUM_KV_HEADS * GROUP + heads
        if SPLIT:
            out_rows = out_rows * num_splits + split
            log_sum = tl.where(total > 0.0, largest + tl.log2(tl.maximum(total, 1e-30)), -1e30)
            tl.store(log_sums_ptr + out_rows, log_sum, rows < GROUP)
        tl.store(parts_ptr + out_rows[:, None] * HEAD_DIM + cols[None, :], out, mask)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    log_sums_ptr,
    out_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, BLOCK_S)
    cols = tl.arange(0, BLOCK_D)
    in_split = splits < num_splits
    log_sums = tl.load(log_sums_ptr + row * num_splits + splits, in_split, other=-1e30)
    weights = tl.exp2(log_sums - tl.max(log_sums, axis=0))
    weights = tl.where(in_split, weights, 0.0)
    parts_at = (row * num_splits + splits)[:, None] * HEAD_DIM + cols[None, :]
    mask = in_split[:, None] & (cols < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + parts_at, mask, other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + row * HEAD_DIM + cols, out, cols < HEAD_DIM)
