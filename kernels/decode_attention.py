"""Attention of requests that have one query each, with their keys shared out evenly.

The keys of all requests and key heads are laid end to end and cut into equal ranges, one for each
of a fixed number of programs, whatever the lengths are: so a captured launch serves any batch, and
no program waits for a longer one. A range may begin and end inside a request; the parts of such a
request meet in the program that finishes last. Where requests are few, each is cut by itself, so
that no program has two of them.

``plan_kernel`` lays out the line from the lengths alone, once for all layers of a step. A unit is
``UNIT`` keys of one key head. The plan, int32: units in a range; units in all; [B + 1] where each
request starts, counted for one head; [B * K] how many parts of a request and head are done.
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

from kernels.attend_keys import attend_keys, loop_constants, padded_batch
from kernels.attention_step import Options, Step, StepMemo

_UNIT = tl.constexpr(16)  # keys
_NUM_HEADER = tl.constexpr(2)  # places of a plan before its starts
_MIN_RANGE_UNITS = 4


class DecodeTiles(NamedTuple):
    """How a launch is cut. Measured on an H200; see ``tiles_for``."""

    num_keys: int  # in a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int


def tiles_for(head_dim: int, item_size: int) -> DecodeTiles:
    """The pinned choice for a head size and dtype."""
    row_bytes = max(16, triton.next_power_of_2(head_dim)) * item_size
    if item_size == 4:  # no tensor cores at full precision: large tiles only swell the code
        return DecodeTiles(32 if row_bytes <= 512 else 16, 4, 2, 2)
    if row_bytes > 256:
        return DecodeTiles(max(16, 16384 // row_bytes), 8 if row_bytes > 512 else 4, 2, 2)
    return DecodeTiles(64, 4, 4, 2)


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
    tiles = tiles or tiles_for(D, q.element_size())
    programs = num_programs or _num_multiprocessors(q.device) * tiles.programs_per_sm
    plan, is_first = _shared_plan(step, options, memo, num_kv_heads=K, num_programs=programs)
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
        step.query_start_loc,
        step.seq_lens,
        B,
        q.stride(0),
        step.block_table.stride(0),
        options.scale,
        options.soft_cap or 0.0,
        options.sliding_window or 0,
        ROWS=max(16, padded_group),
        PADDED_GROUP=padded_group,
        BLOCK_B=padded_batch(B),
        MERGE=max(1, min(64, 2048 * tiles.num_warps // (padded_group * block_d))),
        PDL=not interpret,
        **loop_constants(key_cache, group, options, block_d, tiles.num_keys),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        # A step's first launch waits for all before it, its plan included; see the kernel.
        launch_pdl=not (interpret or is_first),
    )
    return out


def _shared_plan(
    step: Step,
    options: Options,
    memo: StepMemo | None,
    *,
    num_kv_heads: int,
    num_programs: int,
) -> tuple[Tensor, bool]:
    """The plan, and whether it was made just now."""
    key = ("decode plan", num_kv_heads, num_programs, options.sliding_window)
    if memo is not None and key in memo.entries:
        return memo.entries[key], False
    plan = make_plan(
        step, options.sliding_window, num_kv_heads=num_kv_heads, num_programs=num_programs
    )
    if memo is not None:
        memo.entries[key] = plan
    return plan, True


def make_plan(
    step: Step, sliding_window: int | None, *, num_kv_heads: int, num_programs: int
) -> Tensor:
    """Lay out the line of keys and cut it; the module's docstring says what is in it."""
    B, K = step.seq_lens.shape[0], num_kv_heads
    plan = torch.empty(
        _NUM_HEADER.value + B + 1 + B * K, dtype=torch.int32, device=step.seq_lens.device
    )
    _plan_kernel[(1,)](
        plan,
        step.query_start_loc,
        step.seq_lens,
        B,
        B * K,
        num_programs,
        sliding_window or 0,
        NUM_KV_HEADS=K,
        MIN_RANGE=_MIN_RANGE_UNITS,
        HAS_WINDOW=sliding_window is not None,
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
    MIN_RANGE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.arange(0, BLOCK_B)
    mask = b < num_requests
    start = tl.load(query_start_loc_ptr + b, mask, other=0)
    num_queries = tl.load(query_start_loc_ptr + b + 1, mask, other=0) - start
    num_keys = tl.load(seq_lens_ptr + b, mask, other=0)
    if HAS_WINDOW:
        num_keys = tl.minimum(num_keys, sliding_window)
    # A request without keys still gets a unit, so that somebody writes its zeros.
    units = tl.maximum(tl.cdiv(num_keys, _UNIT), 1)
    units = tl.where(num_queries == 1, units, 0)
    even = tl.maximum(tl.cdiv(tl.sum(units, axis=0) * NUM_KV_HEADS, num_programs), MIN_RANGE)
    # Up to a quarter more for each program is a fair price for no request beginning mid-range.
    per_range = even
    is_aligned = even < 0
    for i in tl.static_range(5):
        longer = even + tl.cdiv(even * (4 - i), 16)
        fits = tl.sum(tl.cdiv(units, longer), axis=0) * NUM_KV_HEADS <= num_programs
        per_range = tl.where(fits, longer, per_range)
        is_aligned = is_aligned | fits
    length = tl.where(is_aligned, tl.cdiv(units, per_range) * per_range, units)
    ends = tl.cumsum(length, axis=0)
    tl.store(plan_ptr, per_range)
    tl.store(plan_ptr + 1, tl.sum(length, axis=0) * NUM_KV_HEADS)
    tl.store(plan_ptr + _NUM_HEADER, 0)
    tl.store(plan_ptr + _NUM_HEADER + 1 + b, ends, mask)
    counters_ptr = plan_ptr + _NUM_HEADER + num_requests + 1
    for first in range(0, num_counters, BLOCK_B):
        tl.store(counters_ptr + first + b, b * 0, first + b < num_counters)


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
    query_start_loc_ptr,
    seq_lens_ptr,
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
    starts_ptr = plan_ptr + _NUM_HEADER
    counters_ptr = starts_ptr + num_requests + 1
    per_range = tl.load(plan_ptr)
    ids = tl.arange(0, BLOCK_B)
    ends = tl.load(starts_ptr + 1 + ids, ids < num_requests, other=2**30)
    unit = tl.program_id(0) * per_range
    end_unit = tl.minimum(unit + per_range, tl.load(plan_ptr + 1))
    # What was read so far is older than the kernel before this one: the step's first launch
    # waited for the plan to be complete, and no later launch overtakes that one.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while unit < end_unit:
        b = tl.sum((ends <= unit // NUM_KV_HEADS).to(tl.int32), axis=0)
        start = tl.load(starts_ptr + b) * NUM_KV_HEADS
        length = tl.load(starts_ptr + b + 1) - start // NUM_KV_HEADS
        kv_head = (unit - start) // length
        head_start = start + kv_head * length
        next_unit = tl.minimum(head_start + length, end_unit)
        seq_len = tl.load(seq_lens_ptr + b)
        first = tl.maximum(seq_len - sliding_window, 0) if HAS_WINDOW else 0
        token = tl.load(query_start_loc_ptr + b).to(tl.int64)
        q_at = token * q_stride + kv_head * GROUP * HEAD_DIM
        q = _load_queries(q_ptr + q_at, GROUP, HEAD_DIM, ROWS, BLOCK_D, INTERPRET)
        largest, total, out = attend_keys(
            q,
            tl.arange(0, ROWS),
            first + (unit - head_start) * _UNIT,
            tl.minimum(first + (next_unit - head_start) * _UNIT, seq_len),
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
            False,
        )
        last_unit = head_start + tl.maximum(tl.cdiv(seq_len - first, _UNIT), 1) - 1
        first_program = head_start // per_range
        _finish(
            largest,
            total,
            out,
            out_ptr + (token * NUM_KV_HEADS + kv_head) * GROUP * HEAD_DIM,
            parts_ptr,
            log_sums_ptr,
            counters_ptr + b * NUM_KV_HEADS + kv_head,
            tl.program_id(0),
            first_program,
            last_unit // per_range - first_program + 1,
            GROUP,
            PADDED_GROUP,
            HEAD_DIM,
            BLOCK_D,
            ROWS,
            MERGE,
        )
        unit = next_unit


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
def _finish(  # type: ignore[no-untyped-def]
    largest,
    total,
    out,
    out_ptr,
    parts_ptr,
    log_sums_ptr,
    counter_ptr,
    program,
    first_program,
    num_parts,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Write the result; of a request in parts, this part, and the result if it is the last."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < GROUP)[:, None] & (cols < HEAD_DIM)[None, :]
    out = out / tl.maximum(total, 1e-30)[:, None]
    if num_parts == 1:
        tl.store(out_ptr + rows[:, None] * HEAD_DIM + cols[None, :], out, mask)
    else:
        log_sum = tl.where(total > 0.0, largest + tl.log2(tl.maximum(total, 1e-30)), -1e30)
        # Of a program's requests one at most goes on in the next program, and one at most began
        # in another.
        place = program * 2 + (program == first_program).to(tl.int32)
        part_rows = place * GROUP + rows
        tl.store(parts_ptr + part_rows[:, None] * HEAD_DIM + cols[None, :], out, mask)
        tl.store(log_sums_ptr + part_rows, log_sum, rows < GROUP)
        tl.debug_barrier()  # the count below must not be seen before all of the part
        num_done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
        if num_done == num_parts - 1:
            tl.store(counter_ptr, 0)  # for the next layer
            _merge_parts(
                out_ptr,
                parts_ptr,
                log_sums_ptr,
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
    out_ptr,
    parts_ptr,
    log_sums_ptr,
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
        log_sums = tl.load(log_sums_ptr + part_rows, is_row, other=-1e30, cache_modifier=".cg")
        values = tl.load(
            parts_ptr + part_rows[:, :, None] * HEAD_DIM + cols[None, None, :],
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
    tl.store(out_ptr + out_at, out, is_value)
