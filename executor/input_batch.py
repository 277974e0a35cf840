"""From a plan and the rows to one step's packed inputs.

Index arithmetic is numpy over small vectors; everything travels in one copy, and only what sits in
the tables (token ids, block ids) is looked up on the device. Nothing here runs once per token in
Python, and nothing once per request.
Shapes: T packed tokens, B scheduled rows, S rows that sample, M blocks per request.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from executor.attention_metadata import AttentionMetadata
from executor.request_states import RequestStates
from executor.transfer import Array, upload_all
from ipc.messages import SchedulerOutput


@dataclass(frozen=True, slots=True)
class SamplePlaces:
    """The rows that sample in a step, and where their new tokens belong."""

    rows: Array  # [S], on the host
    wishes: int  # every ``Wish`` that one of them has
    rows_on_device: Tensor  # [S] int64
    positions: Tensor  # [S] int64: index of the token to be sampled, prompt included
    places: Tensor  # [S] int64: the same place in the flat token table


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One forward pass."""

    rows: Array  # [B], in plan order
    wishes: int  # every ``Wish`` that one of them has
    num_new_tokens: Array | int  # [B]; 1 when every row owes one token
    query_start_loc: Array  # [B + 1], on the host
    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    meta: AttentionMetadata
    logit_indices: Tensor | None  # [S] of the T tokens; None: all of them, in order
    samples: SamplePlaces | None  # None: no row computes its last token


@dataclass(frozen=True, slots=True)
class _PackedRows:
    """The scheduled rows' vectors, on the host."""

    rows: Array  # [B]
    num_new_tokens: Array | int
    query_start_loc: Array  # [B + 1]
    seq_lens: Array  # [B]
    row_of_token: Array  # [T]
    positions: Array  # [T]
    max_query_len: int


def build_input_batch(plan: SchedulerOutput, states: RequestStates) -> InputBatch:
    """Pack the scheduled rows, which must not be empty. Reads the rows; changes nothing."""
    packed = _pack_rows(plan, states)
    rows, positions, seq_lens = packed.rows, packed.positions, packed.seq_lens
    is_sampled = seq_lens == states.num_tokens[rows]
    sample_rows, sample_positions, logit_indices = rows, seq_lens, rows[:0]
    if not (packed.max_query_len == 1 and is_sampled.all()):
        sample_rows, sample_positions = rows[is_sampled], seq_lens[is_sampled]
        logit_indices = packed.query_start_loc[1:][is_sampled] - 1
    tokens, blocks, block_size = states.tokens, states.blocks, states.block_size
    on_device = upload_all(
        [
            rows,
            positions,
            packed.row_of_token * tokens.width + positions,
            packed.row_of_token * blocks.width + positions // block_size,
            positions % block_size,
            logit_indices,
            sample_rows,
            sample_positions,
            sample_rows * tokens.width + sample_positions,
            packed.query_start_loc.astype(np.int32),
            seq_lens.astype(np.int32),
        ],
        states.device,
    )
    token_places, block_places, offsets = on_device[2:5]
    wishes = states.sampling.union(rows)
    samples = None
    if sample_rows.size:
        sample_wishes = wishes if sample_rows is rows else states.sampling.union(sample_rows)
        samples = SamplePlaces(sample_rows, sample_wishes, *on_device[6:9])
    max_seq_len = int(seq_lens.max())
    max_num_blocks = -(-max_seq_len // block_size)
    return InputBatch(
        rows=rows,
        wishes=wishes,
        num_new_tokens=packed.num_new_tokens,
        query_start_loc=packed.query_start_loc,
        token_ids=tokens.flat.index_select(0, token_places),
        positions=on_device[1],
        meta=AttentionMetadata(
            slot_mapping=blocks.flat.index_select(0, block_places) * block_size + offsets,
            block_table=blocks.tensor[:, :max_num_blocks].index_select(0, on_device[0]),
            query_start_loc=on_device[9],
            seq_lens=on_device[10],
            max_query_len=packed.max_query_len,
            max_seq_len=max_seq_len,
        ),
        logit_indices=on_device[5] if logit_indices.size else None,
        samples=samples,
    )


def _pack_rows(plan: SchedulerOutput, states: RequestStates) -> _PackedRows:
    rows = np.array(plan.rows, dtype=np.int64)
    num_computed = states.num_computed_tokens[rows]
    if not plan.num_new_tokens:  # one token for each row: the common case
        return _PackedRows(
            rows=rows,
            num_new_tokens=1,
            query_start_loc=np.arange(rows.size + 1),
            seq_lens=num_computed + 1,
            row_of_token=rows,
            positions=num_computed,
            max_query_len=1,
        )
    num_new_tokens = np.array(plan.num_new_tokens, dtype=np.int64)
    query_start_loc = np.zeros(rows.size + 1, dtype=np.int64)
    np.cumsum(num_new_tokens, out=query_start_loc[1:])
    row_of_token = np.repeat(rows, num_new_tokens)
    first_minus_start = np.repeat(num_computed - query_start_loc[:-1], num_new_tokens)
    return _PackedRows(
        rows=rows,
        num_new_tokens=num_new_tokens,
        query_start_loc=query_start_loc,
        seq_lens=num_computed + num_new_tokens,
        row_of_token=row_of_token,
        positions=np.arange(row_of_token.size) + first_minus_start,
        max_query_len=int(num_new_tokens.max()),
    )


def place_samples(rows: Array, states: RequestStates) -> SamplePlaces:
    """Where the next tokens of these rows belong, without a forward pass."""
    positions = states.num_tokens[rows]
    on_device_rows, on_device_positions, places = upload_all(
        [rows, positions, rows * states.tokens.width + positions], states.device
    )
    return SamplePlaces(
        rows, states.sampling.union(rows), on_device_rows, on_device_positions, places
    )
