"""Attention of requests that have one query each, with their keys shared out evenly.

The keys of all requests and key heads are laid end to end, in tiles, and cut into equal ranges, one
for each of a fixed number of programs, whatever the lengths are: so a captured launch serves any
batch, and no program waits for a longer one. A program goes through its range in one loop, across
the borders of requests, so that the next keys are always on their way. A range may begin and end
inside a stretch (the keys of one request and head); its parts meet in the program that finishes
last. Where stretches are few, each is cut by itself, so that no program has two of them.

The line is laid out from the lengths alone, once for all layers of a step: see ``Plan``.
Shapes: T packed tokens, B requests, N query heads, K key/value heads, D head size, G = N / K.
Sources: for split keys "Flash-Decoding", https://pytorch.org/blog/flash-decoding; for even ranges
Osama et al., "Stream-K", arXiv:2301.03598.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.attend_keys import fold_in, load_keys, loop_constants, no_keys, padded_batch
from kernels.attention_step import Options, Step, StepMemo

_NUM_HEADER = tl.constexpr(2)
_MERGED_AT_ONCE = 2048  # values of parts, for each warp


class DecodeTiles(NamedTuple):
    """How a launch is cut. Measured on an H200; see ``tiles_for``."""

    num_keys: int  # in a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_share: int = 64  # keys of a program; with fewer the merging costs more than it saves


def tiles_for(head_dim: int, item_size: int, num_requests: int) -> DecodeTiles:
    """The pinned choice: with few requests the way to the first result counts, else the rate."""
    row_bytes = max(16, triton.next_power_of_2(head_dim)) * item_size
    if item_size == 4:  # no tensor cores at full precision: large tiles only swell the code
        return DecodeTiles(32 if row_bytes <= 512 else 16, 4, 2, 2)
    if row_bytes > 256:
        return DecodeTiles(max(16, 16384 // row_bytes), 8 if row_bytes > 512 else 4, 2, 2)
    return DecodeTiles(64, 2, 3, 2) if num_requests <= 4 else DecodeTiles(32, 2, 3, 4)


def decode_attention_triton(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    options: Options,
    memo: StepMemo | None = None,
    *,
    out: Tensor | None = None,
    tiles: DecodeTiles | None = None,
    num_programs: int | None = None,
) -> Tensor:
    """Return [T, N, D]; rows of requests with more than one query are left as they are.

    Args:
        memo: holds the plan for the other layers of the step.
        out: [T, N, D], contiguous, to be written to; made here if None.
        tiles, num_programs: other choices than the pinned ones.
    """
    T, N, D = q.shape
    K, B = key_cache.shape[2], step.seq_lens.shape[0]
    if out is None:
        out = torch.empty((T, N, D), dtype=q.dtype, device=q.device)
    if T == 0 or B == 0 or N == 0:
        return out
    tiles = tiles or tiles_for(D, q.element_size(), B)
    programs = num_programs or _num_multiprocessors(q.device) * tiles.programs_per_sm
    plan_of = PlanKey(K, programs, tiles.num_keys, tiles.min_share, options.sliding_window)
    plan, is_first = _shared_plan(step, plan_of, memo)
    group = N // K
    parts = torch.empty((programs, 2, group, D), dtype=torch.float32, device=q.device)
    log_sums = torch.empty((programs, 2, group), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(D))
    padded_group = triton.next_power_of_2(group)
    interpret = knobs.runtime.interpret
    _decode_kernel[(programs,)](
        q,
        key_cache,
        value_cache,
        out,
        parts,
        log_sums,
        plan,
        step.block_table,
        B,
        q.stride(0),
        step.block_table.stride(0),
        options.scale,
        options.soft_cap or 0.0,
        options.sliding_window or 0,
        ROWS=max(16, padded_group),
        PADDED_GROUP=padded_group,
        BLOCK_B=padded_batch(B),
        MERGE=max(1, min(64, _MERGED_AT_ONCE * tiles.num_warps // (padded_group * block_d))),
        PDL=not interpret,
        **loop_constants(key_cache, group, options, block_d, tiles.num_keys),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        # A step's first launch waits for all before it, its plan included; see the kernel.
        launch_pdl=not (interpret or is_first),
    )
    return out


class PlanKey(NamedTuple):
    """What a plan depends on besides the step."""

    num_kv_heads: int
    num_programs: int
    tile: int  # keys
    min_share: int  # keys
    sliding_window: int | None


class Plan(NamedTuple):
    """How the line is laid out and cut. The kernels read the tensor that these are views of."""

    share: Tensor  # [] tiles in each program's range
    num_tiles: Tensor  # [] in all, of all heads
    # Records of the requests that have one query, in order; nothing follows the last.
    starts: Tensor  # [B + 1] tiles before it, of one head
    requests: Tensor  # [B + 1]
    seq_lens: Tensor  # [B + 1]
    tokens: Tensor  # [B + 1] where its query is
    num_done: Tensor  # [B * K] parts of each stretch that are there; zeros between launches

    @classmethod
    def read(cls, plan: Tensor, num_requests: int) -> "Plan":
        """Name the parts of a plan."""
        header = _NUM_HEADER.value
        records = plan[header:][: 4 * (num_requests + 1)].view(4, num_requests + 1)
        starts, requests, seq_lens, tokens = records
        rest = plan[header + records.numel() :]
        return cls(plan[0], plan[1], starts, requests, seq_lens, tokens, rest)


def _shared_plan(step: Step, key: PlanKey, memo: StepMemo | None) -> tuple[Tensor, bool]:
    """The plan, and whether it was made just now."""
    if memo is not None and key in memo.entries:
        return memo.entries[key], False
    plan = make_plan(step, key)
    if memo is not None:
        memo.entries[key] = plan
    return plan, True


def make_plan(step: Step, key: PlanKey) -> Tensor:
    """Lay out the line of keys and cut it, on the device. Returns what ``Plan.read`` names."""
    B, num_stretches = step.seq_lens.shape[0], step.seq_lens.shape[0] * key.num_kv_heads
    size = _NUM_HEADER.value + 4 * (B + 1) + num_stretches
    plan = torch.empty(size, dtype=torch.int32, device=step.seq_lens.device)
    _plan_kernel[(1,)](
        plan,
        step.query_start_loc,
        step.seq_lens,
        B,
        num_stretches,
        key.num_programs,
        key.sliding_window or 0,
        NUM_KV_HEADS=key.num_kv_heads,
        TILE=key.tile,
        MIN_SHARE=max(1, key.min_share // key.tile),
        HAS_WINDOW=key.sliding_window is not None,
        BLOCK_B=padded_batch(B),
        num_warps=8,
    )
    return plan


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit(do_not_specialize=["num_requests", "num_counters", "num_programs", "sliding_window"])
def _plan_kernel(  # type: ignore[no-untyped-def]
    plan_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    num_requests,
    num_counters,
    num_programs,
    sliding_window,
    NUM_KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.arange(0, BLOCK_B)
    mask = b < num_requests
    token = tl.load(query_start_loc_ptr + b, mask, other=0)
    num_queries = tl.load(query_start_loc_ptr + b + 1, mask, other=0) - token
    seq_len = tl.load(seq_lens_ptr + b, mask, other=0)
    num_keys = seq_len
    if HAS_WINDOW:
        num_keys = tl.minimum(num_keys, sliding_window)
    # A request without keys still gets a tile, so that somebody writes its zeros.
    is_active = mask & (num_queries == 1)
    tiles = tl.where(is_active, tl.maximum(tl.cdiv(num_keys, TILE), 1), 0)
    even = tl.maximum(tl.cdiv(tl.sum(tiles, axis=0) * NUM_KV_HEADS, num_programs), MIN_SHARE)
    # A little more for each program is a fair price for no stretch beginning inside a range.
    share = even
    is_aligned = even < 0
    for i in tl.static_range(5):
        longer = even + tl.cdiv(even * (4 - i), 16)
        fits = tl.sum(tl.cdiv(tiles, longer), axis=0) * NUM_KV_HEADS <= num_programs
        share = tl.where(fits, longer, share)
        is_aligned = is_aligned | fits
    tiles = tl.where(is_aligned, tl.cdiv(tiles, share) * share, tiles)
    num_tiles = tl.sum(tiles, axis=0)
    tl.store(plan_ptr, share)
    tl.store(plan_ptr + 1, num_tiles * NUM_KV_HEADS)
    width = num_requests + 1
    starts_ptr = plan_ptr + _NUM_HEADER
    for start in range(0, width, BLOCK_B):  # one more than the block, perhaps
        tl.store(starts_ptr + start + b, b * 0 + num_tiles, start + b < width)
        for column in tl.static_range(1, 4):
            tl.store(starts_ptr + column * width + start + b, b * 0, start + b < width)
    counters_ptr = starts_ptr + 4 * width
    for start in range(0, num_counters, BLOCK_B):
        tl.store(counters_ptr + start + b, b * 0, start + b < num_counters)
    tl.debug_barrier()  # some of these places are written again
    rank = tl.cumsum(is_active.to(tl.int32), axis=0) - 1
    tl.store(starts_ptr + rank, tl.cumsum(tiles, axis=0) - tiles, is_active)
    tl.store(starts_ptr + width + rank, b, is_active)
    tl.store(starts_ptr + 2 * width + rank, seq_len, is_active)
    tl.store(starts_ptr + 3 * width + rank, token, is_active)


@triton.jit(do_not_specialize=["num_requests", "block_table_stride", "sliding_window"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    key_cache_ptr,
    value_cache_ptr,
    out_ptr,
    parts_ptr,  # [programs, 2, G, D] float32
    log_sums_ptr,  # [programs, 2, G] float32, base 2
    plan_ptr,
    block_table_ptr,
    num_requests,
    q_stride,
    block_table_stride,
    scale,
    soft_cap,
    sliding_window,
    ROWS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    MERGE: tl.constexpr,
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
    line = plan_ptr + _NUM_HEADER, num_requests + 1
    caches, table = (key_cache_ptr, value_cache_ptr), (block_table_ptr, block_table_stride)
    window = sliding_window, HAS_WINDOW
    share = tl.load(plan_ptr)
    first_tile = tl.program_id(0) * share
    r, kv_head, t = _find(line[0], first_tile, num_requests, NUM_KV_HEADS, BLOCK_B)
    first_row, first_t = r * NUM_KV_HEADS + kv_head, t
    size, seq_len, token, positions, ids = _look_up(line, r, t, table, window, BLOCK_SIZE, BLOCK_N)
    end_tile = _end_range(plan_ptr, first_tile, t, size, _num_tiles(seq_len, window, BLOCK_N))
    largest, total, out = no_keys(ROWS, BLOCK_D)
    # What was read so far is older than the kernel before this one: the step's first launch
    # waited for the plan to be complete, and no later launch overtakes that one.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for tile in range(first_tile, end_tile):
        live = positions < seq_len
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
        q_at = token.to(tl.int64) * q_stride + kv_head * GROUP * HEAD_DIM
        q = _load_queries(q_ptr + q_at, GROUP, HEAD_DIM, ROWS, BLOCK_D, INTERPRET)
        state = tl.where(t == 0, -1e30, largest), tl.where(t == 0, 0.0, total), out
        largest, total, out = fold_in(q, k, v, live[None, :], state, scale, soft_cap, HAS_CAP)
        t += 1
        if (t == size) | (tile + 1 == end_tile):
            begins_here = tile + 1 - t >= first_tile
            is_whole = begins_here & (t == _num_tiles(seq_len, window, BLOCK_N))
            out_at = (token.to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP * HEAD_DIM
            targets = out_ptr + out_at, parts_ptr, log_sums_ptr
            place = tl.program_id(0) * 2 + begins_here.to(tl.int32)
            state = (largest, total, out)
            _store_result(state, targets, place, is_whole, GROUP, HEAD_DIM, ROWS, BLOCK_D)
        # The next tile's place and blocks are read now: found in its own turn, they would hold
        # up its keys' loads, which then start too late to cover the memory's latency.
        r, kv_head, t = _step_on(r, kv_head, t, size, NUM_KV_HEADS)
        size, seq_len, token, positions, ids = _look_up(
            line, r, t, table, window, BLOCK_SIZE, BLOCK_N
        )
    tl.debug_barrier()  # the counts below must not be seen before all of the parts
    for i in range(2):
        # The stretch that the range began in; then that in which it ended, if that is another.
        row = tl.where(i == 0, first_row, r * NUM_KV_HEADS + kv_head)
        start = tl.where(i == 0, first_tile - first_t, end_tile - t)
        if (first_tile < end_tile) & ((i == 0) | ((t > 0) & (start > first_tile))):
            _join(
                line,
                row,
                start,
                share,
                window,
                (out_ptr, parts_ptr, log_sums_ptr),
                NUM_KV_HEADS,
                BLOCK_N,
                GROUP,
                PADDED_GROUP,
                HEAD_DIM,
                BLOCK_D,
                MERGE,
            )


@triton.jit
def _find(starts_ptr, tile, num_requests, NUM_KV_HEADS: tl.constexpr, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """The record, key head and tile within them of a place on the line."""
    ids = tl.arange(0, BLOCK_B)
    ends = tl.load(starts_ptr + 1 + ids, ids < num_requests, other=2**30)
    r = tl.sum((ends <= tile // NUM_KV_HEADS).to(tl.int32), axis=0)
    start = tl.load(starts_ptr + r)
    length = tl.maximum(tl.load(starts_ptr + r + 1) - start, 1)  # none beyond the last
    t = tile - start * NUM_KV_HEADS
    return r, t // length, t % length


@triton.jit
def _end_range(plan_ptr, first_tile, t, length, num_tiles):  # type: ignore[no-untyped-def]
    """Where the range that begins at ``first_tile`` has no more to do.

    Aligned ranges may have nothing at their end: a stretch is rounded up to whole ones then.
    """
    end_tile = tl.minimum(first_tile + tl.load(plan_ptr), tl.load(plan_ptr + 1))
    return tl.where(length > num_tiles, tl.minimum(end_tile, first_tile - t + num_tiles), end_tile)


@triton.jit
def _step_on(r, kv_head, t, length, NUM_KV_HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The place of tile t, which may be that after a stretch's last."""
    is_end = (t == length).to(tl.int32)
    kv_head += is_end
    is_over = (kv_head == NUM_KV_HEADS).to(tl.int32)
    return r + is_over, kv_head * (1 - is_over), t * (1 - is_end)


@triton.jit
def _look_up(  # type: ignore[no-untyped-def]
    line,  # pointer to the records, and how many places each of their columns has
    r,
    t,
    table,  # pointer, and stride of a request
    window,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of a stretch, keys and token of a record; positions and block ids of its tile t."""
    column_ptr = line[0] + r
    length = tl.load(column_ptr + 1) - tl.load(column_ptr)
    request = tl.load(column_ptr + line[1])
    seq_len = tl.load(column_ptr + 2 * line[1])
    token = tl.load(column_ptr + 3 * line[1])
    positions = _first_key(seq_len, window) + t * BLOCK_N + tl.arange(0, BLOCK_N)
    ids_ptr = table[0] + request.to(tl.int64) * table[1]
    block_ids = tl.load(ids_ptr + positions // BLOCK_SIZE, positions < seq_len, other=0)
    return length, seq_len, token, positions, block_ids


@triton.jit
def _first_key(seq_len, window):  # type: ignore[no-untyped-def]
    return tl.maximum(seq_len - window[0], 0) if window[1] else 0


@triton.jit
def _num_tiles(seq_len, window, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.maximum(tl.cdiv(seq_len - _first_key(seq_len, window), BLOCK_N), 1)


@triton.jit
def _load_queries(  # type: ignore[no-untyped-def]
    q_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    q = tl.load(q_ptr + rows * HEAD_DIM + cols, (rows < GROUP) & (cols < HEAD_DIM), other=0.0)
    if INTERPRET:
        q = q.to(tl.float32)
    return q


@triton.jit
def _store_result(  # type: ignore[no-untyped-def]
    state,
    targets,  # pointers: the stretch's result, all parts, all logs of sums
    place,
    is_whole,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a stretch's result, or a part of it with its sum of exponentials."""
    largest, total, out = state
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < GROUP)[:, None] & (cols < HEAD_DIM)[None, :]
    at = rows[:, None] * HEAD_DIM + cols[None, :]
    # Without any key nothing was added, and what is there belongs to the stretch before.
    out = tl.where((total > 0.0)[:, None], out / tl.maximum(total, 1e-30)[:, None], 0.0)
    if is_whole:
        tl.store(targets[0] + at, out, mask)
    else:
        log_sum = tl.where(total > 0.0, largest + tl.log2(tl.maximum(total, 1e-30)), -1e30)
        tl.store(targets[1] + place * GROUP * HEAD_DIM + at, out, mask)
        tl.store(targets[2] + place * GROUP + rows, log_sum, rows < GROUP)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    line,
    row,
    start,
    share,
    window,
    targets,  # pointers: the result, all parts, all logs of sums
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Count this program's part of a stretch as done; merge them all if it was the last."""
    column_ptr = line[0] + row // NUM_KV_HEADS
    last = start + _num_tiles(tl.load(column_ptr + 2 * line[1]), window, BLOCK_N) - 1
    first_program = start // share
    num_parts = last // share - first_program + 1
    if num_parts > 1:
        counter_ptr = line[0] + 4 * line[1] + row
        num_done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
        if num_done == num_parts - 1:
            tl.store(counter_ptr, 0)  # for the next layer
            token = tl.load(column_ptr + 3 * line[1]).to(tl.int64)
            head = token * NUM_KV_HEADS + row % NUM_KV_HEADS
            _merge_parts(
                (targets[0] + head * GROUP * HEAD_DIM, targets[1], targets[2]),
                first_program,
                num_parts,
                GROUP,
                PADDED_GROUP,
                HEAD_DIM,
                BLOCK_D,
                MERGE,
            )


@triton.jit
def _merge_parts(  # type: ignore[no-untyped-def]
    targets,  # pointers: the stretch's result, all parts, all logs of sums
    first_program,
    num_parts,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Write the mean of the parts, weighted by their sums of exponentials, in a fixed order."""
    heads = tl.arange(0, PADDED_GROUP)
    cols = tl.arange(0, BLOCK_D)
    is_value = (heads < GROUP)[:, None] & (cols < HEAD_DIM)[None, :]
    largest = tl.full((PADDED_GROUP,), -1e30, tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    out = tl.zeros((PADDED_GROUP, BLOCK_D), tl.float32)
    for done in range(0, num_parts, MERGE):
        part = done + tl.arange(0, MERGE)
        is_part = part < num_parts
        places = (first_program + part) * 2 + (part == 0).to(tl.int32)
        part_rows = places[:, None] * GROUP + heads[None, :]  # [MERGE, PADDED_GROUP]
        is_row = is_part[:, None] & (heads < GROUP)[None, :]
        # From L2: other programs have just written them.
        log_sums = tl.load(targets[2] + part_rows, is_row, other=-1e30, cache_modifier=".cg")
        values = tl.load(
            targets[1] + part_rows[:, :, None] * HEAD_DIM + cols[None, None, :],
            is_part[:, None, None] & is_value[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, tl.max(log_sums, axis=0))
        decay = tl.exp2(largest - new_largest)
        weights = tl.where(is_row, tl.exp2(log_sums - new_largest[None, :]), 0.0)
        total = total * decay + tl.sum(weights, axis=0)
        out = out * decay[:, None] + tl.sum(values * weights[:, :, None], axis=0)
        largest = new_largest
    out = out / tl.maximum(total, 1e-30)[:, None]
    out_at = heads[:, None] * HEAD_DIM + cols[None, :]
    tl.store(targets[0] + out_at, out, is_value)
