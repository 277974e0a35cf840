"""From rows to one step's packed inputs, on the device: tokens, positions, slots, block table.

A step names its requests by their rows in two tables, of token ids and of block ids. Request b
computes the last query_len[b] = query_start_loc[b + 1] - query_start_loc[b] of its first
seq_lens[b] tokens. Tokens past query_start_loc[B] are padding: token 0 at position 0, in slot 0 of
the null block. For a step that draws one token for each request, the rows' sampling parameters are
gathered as well, and the place of the new token is seq_lens[b].
Shapes: T packed tokens, B requests, R rows of the tables, W tokens and M blocks that a row holds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


class Requests(NamedTuple):
    """Which rows compute what."""

    rows: Tensor  # [B] int32, each within R
    seq_lens: Tensor  # [B] int32, this step's tokens included; at most W
    query_start_loc: Tensor  # [B + 1] int32, prefix sums of the query counts; the last is <= T


class PackedInputs(NamedTuple):
    """What is written."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: block_id * block_size + offset
    block_table: Tensor  # [B, m] int32; only the blocks that a request's length uses


class DrawTables(NamedTuple):
    """Every row's sampling parameters."""

    floats: Tensor  # [F, R] float32: temperature, top_p, min_p, and whatever follows
    whole: Tensor  # [2, R] int64: top_k, seeds


class Draws(NamedTuple):
    """The parameters of this step's draws; see ``kernels.sampling``."""

    temperature: Tensor  # [B] float32
    top_p: Tensor  # [B] float32
    min_p: Tensor  # [B] float32
    top_k: Tensor  # [B] int32
    seeds: Tensor  # [B] int64
    positions: Tensor  # [B] int64: of the token that is drawn


def prepare_inputs(
    requests: Requests,
    tokens: Tensor,
    blocks: Tensor,
    packed: PackedInputs,
    *,
    block_size: int,
    tables: DrawTables | None = None,
    draws: Draws | None = None,
) -> None:
    """Fill ``packed``, and ``draws`` from ``tables`` when they are given.

    Args:
        tokens: [R, W] int32.
        blocks: [R, M] int32.

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if (tables is None) != (draws is None):
        raise ValueError("draws are gathered from tables: give both or none")
    _check(requests, tokens, blocks, packed)
    if tables is not None and draws is not None:
        _check_draws(requests, tables, draws)
    run = prepare_inputs_triton if tokens.is_cuda else prepare_inputs_reference
    run(requests, tokens, blocks, packed, block_size, tables, draws)


def _check(requests: Requests, tokens: Tensor, blocks: Tensor, packed: PackedInputs) -> None:
    B, T = requests.rows.shape[0], packed.token_ids.shape[0]
    shapes = [tuple(t.shape) for t in (*requests, *packed[:3])]
    if shapes != [(B,), (B,), (B + 1,), (T,), (T,), (T,)]:
        raise ValueError(f"rows, lengths, starts and packed tokens do not fit: {shapes}")
    table = packed.block_table
    if tokens.ndim != 2 or blocks.shape[:1] != tokens.shape[:1] or table.shape[:1] != (B,):
        raise ValueError(f"tables do not fit: {tokens.shape}, {blocks.shape}, {table.shape}")
    i32 = (*requests, tokens, blocks, packed.token_ids, table)
    i64 = (packed.positions, packed.slot_mapping)
    if any(t.dtype != torch.int32 for t in i32) or any(t.dtype != torch.int64 for t in i64):
        raise ValueError("positions and slots are int64, everything else is int32")
    if not all(t.is_contiguous() and t.device == tokens.device for t in (*i32, *i64)):
        raise ValueError("all tensors must be contiguous and on one device")


def _check_draws(requests: Requests, tables: DrawTables, draws: Draws) -> None:
    B = requests.rows.shape[0]
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    for tensor, dtype in zip(draws, (f32, f32, f32, i32, i64, i64), strict=True):
        if tensor.shape != (B,) or tensor.dtype != dtype:
            raise ValueError(f"a draw's parameter must be [{B}] {dtype}, not {tensor.shape}")
    if tables.floats.dtype != f32 or tables.whole.dtype != i64 or len(tables.floats) < 3:
        raise ValueError("parameters are float32 [3 or more, R] and int64 [2, R]")
    if not all(t.is_contiguous() and t.device == requests.rows.device for t in (*tables, *draws)):
        raise ValueError("all tensors must be contiguous and on one device")


def prepare_inputs_reference(
    requests: Requests,
    tokens: Tensor,
    blocks: Tensor,
    packed: PackedInputs,
    block_size: int,
    tables: DrawTables | None,
    draws: Draws | None,
) -> None:
    """The definition: one request after the other."""
    starts = requests.query_start_loc.tolist()
    for tensor in packed[:3]:
        tensor[starts[-1] :] = 0
    lengths = zip(requests.rows.tolist(), requests.seq_lens.tolist(), strict=True)
    for b, (row, seq_len) in enumerate(lengths):
        num_blocks = -(-seq_len // block_size)
        packed.block_table[b, :num_blocks] = blocks[row, :num_blocks]
        here = slice(starts[b], starts[b + 1])
        positions = torch.arange(seq_len - (here.stop - here.start), seq_len, device=tokens.device)
        packed.token_ids[here] = tokens[row, positions]
        packed.positions[here] = positions
        block_ids = blocks[row, positions // block_size].long()
        packed.slot_mapping[here] = block_ids * block_size + positions % block_size
    if tables is not None and draws is not None:
        rows = requests.rows.long()
        for out, values in zip(draws[:3], tables.floats, strict=False):
            out.copy_(values[rows])
        draws.top_k.copy_(tables.whole[0, rows])
        draws.seeds.copy_(tables.whole[1, rows])
        draws.positions.copy_(requests.seq_lens)


def prepare_inputs_triton(
    requests: Requests,
    tokens: Tensor,
    blocks: Tensor,
    packed: PackedInputs,
    block_size: int,
    tables: DrawTables | None,
    draws: Draws | None,
) -> None:
    """Launch the kernel: a few programs a request, and as many for the padding."""
    B, m = packed.block_table.shape
    nothing = requests.rows  # stands for a pointer that is never followed
    _prepare_kernel[(B + 1, max(1, triton.cdiv(m, _BLOCK)))](
        *requests,
        tokens,
        blocks,
        *packed,
        *(tables or (nothing, nothing)),
        *(draws or (nothing,) * 6),
        B,
        packed.token_ids.shape[0],
        tokens.shape[0],
        tokens.shape[1],
        blocks.shape[1],
        m,
        HAS_DRAWS=draws is not None,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=2,
    )


@triton.jit(
    do_not_specialize=[
        "num_requests",
        "num_tokens",
        "num_rows",
        "tokens_width",
        "blocks_width",
        "table_width",
    ]
)
def _prepare_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    tokens_ptr,
    blocks_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    block_table_ptr,
    floats_ptr,
    whole_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    top_k_ptr,
    seeds_ptr,
    draw_positions_ptr,
    num_requests,
    num_tokens,
    num_rows,
    tokens_width,
    blocks_width,
    table_width,
    HAS_DRAWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    chunk = tl.program_id(1)
    offsets = tl.arange(0, BLOCK)
    first = chunk * BLOCK
    stride = tl.num_programs(1) * BLOCK
    if b < num_requests:
        row = tl.load(rows_ptr + b).to(tl.int64)  # int64: a table may hold 2**31 entries
        seq_len = tl.load(seq_lens_ptr + b)
        row_blocks_ptr = blocks_ptr + row * blocks_width
        columns = first + offsets
        used = columns < tl.minimum(tl.cdiv(seq_len, BLOCK_SIZE), table_width)
        block_ids = tl.load(row_blocks_ptr + columns, used, other=0)
        tl.store(block_table_ptr + b.to(tl.int64) * table_width + columns, block_ids, used)
        start = tl.load(query_start_loc_ptr + b)
        query_len = tl.load(query_start_loc_ptr + b + 1) - start
        for at in range(first, query_len, stride):
            inside = at + offsets < query_len
            positions = seq_len - query_len + at + offsets
            token_ids = tl.load(tokens_ptr + row * tokens_width + positions, inside, other=0)
            block_ids = tl.load(row_blocks_ptr + positions // BLOCK_SIZE, inside, other=0)
            slots = block_ids.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
            places = start + at + offsets
            tl.store(token_ids_ptr + places, token_ids, inside)
            tl.store(positions_ptr + places, positions.to(tl.int64), inside)
            tl.store(slot_mapping_ptr + places, slots, inside)
        if HAS_DRAWS:  # noqa: SIM102 - known when compiled, unlike the next
            if chunk == 0:
                tl.store(temperature_ptr + b, tl.load(floats_ptr + row))
                tl.store(top_p_ptr + b, tl.load(floats_ptr + num_rows + row))
                tl.store(min_p_ptr + b, tl.load(floats_ptr + 2 * num_rows + row))
                tl.store(top_k_ptr + b, tl.load(whole_ptr + row).to(tl.int32))
                tl.store(seeds_ptr + b, tl.load(whole_ptr + num_rows + row))
                tl.store(draw_positions_ptr + b, seq_len.to(tl.int64))
    else:
        total = tl.load(query_start_loc_ptr + num_requests)
        for at in range(total + first, num_tokens, stride):
            places = at + offsets
            inside = places < num_tokens
            zeros = tl.zeros((BLOCK,), tl.int64)
            tl.store(token_ids_ptr + places, zeros.to(tl.int32), inside)
            tl.store(positions_ptr + places, zeros, inside)
            tl.store(slot_mapping_ptr + places, zeros, inside)
