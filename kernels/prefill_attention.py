"""Attention of requests with several queries: whole prompts, chunks of them, and mixed steps.

One program takes a tile of queries of one request, for one key head, and meets all their keys.
The grid depends on the number of tokens and requests alone, so a step can be captured. Requests of
one query may be left out: ``decode_attention`` serves them better; and so may the share of a long
prompt that ``cudnn_attention`` takes.
Shapes: T packed tokens, B requests, N query heads, K key/value heads, D head size, G = N / K.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.attend_keys import fold_in, load_keys, loop_constants, no_keys, padded_batch
from kernels.attention_step import Options, Step
from kernels.cudnn_attention import GRAIN, MIN_QUERIES, num_served

_MANY_ROWS = 4096


class PrefillTiles(NamedTuple):
    """How a launch is cut."""

    max_rows: int  # query rows in a tile, counting each head
    num_keys: int
    num_warps: int
    num_stages: int


def tiles_for(head_dim: int, item_size: int, num_rows: int) -> PrefillTiles:
    """The pinned choice; large tiles pay where there are enough of them for all programs."""
    row_bytes = max(16, triton.next_power_of_2(head_dim)) * item_size
    if item_size == 4:  # no tensor cores at full precision: large tiles only swell the code
        rows = 32 if row_bytes <= 1024 else 16
        return PrefillTiles(rows, 32 if row_bytes <= 512 else 16, 4 if row_bytes < 1024 else 8, 2)
    if row_bytes > 256:
        rows = 64 if row_bytes <= 512 else 32
        return PrefillTiles(rows, max(16, 16384 // row_bytes), 8, 2)
    if row_bytes == 256 and num_rows >= _MANY_ROWS:
        return PrefillTiles(128, 128, 8, 2)
    return PrefillTiles(64, 64, 4, 2)


def prefill_attention_triton(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    options: Options,
    *,
    out: Tensor | None = None,
    skip_single: bool = False,
    skip_shares: bool = False,
    tiles: PrefillTiles | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Return [T, N, D], for any mix of requests.

    Args:
        out: [T, N, D], contiguous, to be written to; made here if None.
        skip_single: leave the rows of requests with one query as they are.
        skip_shares: likewise those of ``find_shares``, up to a tile's queries at their end.
        tiles: another choice than the pinned one.
        batch_invariant: cut every step alike, so that a query's result is the same to the bit
            whatever else the step has, and whichever step of its request it is in.
    """
    T, N, D = q.shape
    K, B = key_cache.shape[2], step.seq_lens.shape[0]
    if out is None:
        out = torch.empty((T, N, D), dtype=q.dtype, device=q.device)
    if T == 0 or B == 0 or N == 0:
        return out
    group, interpret = N // K, knobs.runtime.interpret
    tiles = tiles or tiles_for(D, q.element_size(), 0 if batch_invariant else T * group)
    rows = tiles.max_rows
    if not batch_invariant:
        rows = min(rows, triton.next_power_of_2(step.max_query_len * group))
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
        1 if skip_single else 0,
        MIN_QUERIES if skip_shares else 2**30,
        TILE_QUERIES=queries,
        ROWS=rows,
        GRAIN=GRAIN,
        BLOCK_B=padded_batch(B),
        PDL=not interpret,
        **loop_constants(
            key_cache, group, options, max(16, triton.next_power_of_2(D)), tiles.num_keys
        ),
        num_warps=max(tiles.num_warps, 8 if rows >= 128 else 4),
        num_stages=tiles.num_stages,
        launch_pdl=not interpret,
    )
    return out


@triton.jit(
    do_not_specialize=[
        "num_requests",
        "block_table_stride",
        "sliding_window",
        "skip_single",
        "min_shared",
    ]
)
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
    skip_single,
    min_shared,
    TILE_QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
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
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest of a prompt first
    kv_head = tl.program_id(1)
    b, first_query = _find(query_start_loc_ptr, tile, num_requests, TILE_QUERIES, BLOCK_B)
    query_start = tl.load(query_start_loc_ptr + b)
    query_len = tl.load(query_start_loc_ptr + b + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + b)
    served = num_served(query_len, seq_len, min_shared, GRAIN)
    is_wanted = (first_query < query_len) & (query_len > skip_single)
    if is_wanted & (first_query + TILE_QUERIES > served):
        rows = tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK_D)
        queries = first_query + rows // GROUP
        row_mask = (rows < TILE_QUERIES * GROUP) & (queries < query_len)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        tokens = (query_start + queries).to(tl.int64)  # int64: T * N * D may pass 2**31
        heads = kv_head * GROUP + rows % GROUP
        q_at = tokens * q_stride + heads * HEAD_DIM
        q = tl.load(q_ptr + q_at[:, None] + cols[None, :], mask, other=0.0)
        if INTERPRET:
            q = q.to(tl.float32)
        out = _attend(
            q,
            seq_len - query_len + queries,
            kv_head,
            (key_cache_ptr, value_cache_ptr),
            block_table_ptr + b.to(tl.int64) * block_table_stride,
            (seq_len - query_len + first_query, seq_len),
            (scale, soft_cap, sliding_window),
            TILE_QUERIES,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_D,
            BLOCK_N,
            ROWS,
            HAS_CAP,
            HAS_WINDOW,
            INTERPRET,
        )
        out_at = (tokens * NUM_KV_HEADS * GROUP + heads) * HEAD_DIM
        tl.store(out_ptr + out_at[:, None] + cols[None, :], out, mask)


@triton.jit
def _find(  # type: ignore[no-untyped-def]
    query_start_loc_ptr, tile, num_requests, TILE_QUERIES: tl.constexpr, BLOCK_B: tl.constexpr
):
    """The request of a tile, and the first of its queries there.

    Request b owns the tiles from query_start_loc[b] // TILE_QUERIES + b on: never fewer than it
    needs, and known without a look at the other requests.
    """
    ids = tl.arange(0, BLOCK_B)
    starts = tl.load(query_start_loc_ptr + ids, ids < num_requests, other=2**30)
    first_tiles = starts // TILE_QUERIES + ids
    b = tl.sum((first_tiles <= tile).to(tl.int32), axis=0) - 1
    first_tile = tl.max(tl.where(first_tiles <= tile, first_tiles, 0), axis=0)
    return b, (tile - first_tile) * TILE_QUERIES


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,  # [ROWS, BLOCK_D]
    query_positions,  # [ROWS]
    kv_head,
    caches,
    block_ids_ptr,
    places,  # position of the first query; keys of the request
    options,  # scale, soft cap, window
    TILE_QUERIES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Attend to all keys that the tile's rows see."""
    low = tl.maximum(places[0] - options[2] + 1, 0) if HAS_WINDOW else 0
    first = low // BLOCK_N * BLOCK_N  # whatever the window, a key is always in the same tile
    end = tl.minimum(places[1], places[0] + TILE_QUERIES)
    # The first query sees all keys up to its own, so for those there is nothing to compare.
    border = first
    if not HAS_WINDOW:
        border = tl.minimum(places[0] + 1, end) // BLOCK_N * BLOCK_N
    largest, total, out = no_keys(ROWS, BLOCK_D)
    for is_masked in tl.static_range(2):
        start, stop = (border, end) if is_masked else (first, border)
        # Block ids are read a tile ahead: found in the same turn, they would hold up the keys'
        # loads, which the compiler then starts too late to cover the memory's latency.
        ahead = start + tl.arange(0, BLOCK_N)
        ids = tl.load(block_ids_ptr + ahead // BLOCK_SIZE, ahead < end, other=0)
        for at in range(start, stop, BLOCK_N):
            positions = at + tl.arange(0, BLOCK_N)
            live = (positions >= low) & (positions < end) if is_masked else None
            k, v = load_keys(
                caches,
                ids,
                positions,
                live,
                kv_head,
                NUM_KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                BLOCK_D,
                INTERPRET,
            )
            ahead = positions + BLOCK_N
            ids = tl.load(block_ids_ptr + ahead // BLOCK_SIZE, ahead < end, other=0)
            seen = None
            if is_masked:
                seen = positions[None, :] <= query_positions[:, None]
            if is_masked and HAS_WINDOW:
                seen = seen & (positions[None, :] > query_positions[:, None] - options[2])
            state = largest, total, out
            largest, total, out = fold_in(q, k, v, seen, state, options[0], options[1], HAS_CAP)
    return out / tl.maximum(total, 1e-30)[:, None]
