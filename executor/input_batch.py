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


def build_input_batch(plan: SchedulerOutput, states: RequestStates) -> InputBatch:
    """Pack the scheduled rows, which must not be empty. Reads the rows; changes nothing."""
    rows = np.array(plan.rows, dtype=np.int64)
    num_computed = states.num_computed_tokens[rows]
    num_new_tokens: Array | int = 1
    if plan.num_new_tokens:
        num_new_tokens = np.array(plan.num_new_tokens, dtype=np.int64)
        query_start_loc = np.zeros(rows.size + 1, dtype=np.int64)
        np.cumsum(num_new_tokens, out=query_start_loc[1:])
        row_of_token = np.repeat(rows, num_new_tokens)
        first_minus_start = np.repeat(num_computed - query_start_loc[:-1], num_new_tokens)
        positions = np.arange(row_of_token.size) + first_minus_start
        max_query_len = int(num_new_tokens.max())
    else:  # one token for each row: the common case
        query_start_loc = np.arange(rows.size + 1)
        row_of_token, positions = rows, num_computed
        max_query_len = 1
    seq_lens = num_computed + num_new_tokens
    is_sampled = seq_lens == states.num_tokens[rows]
    tokens, blocks, block_size = states.tokens, states.blocks, states.block_size
    sample_rows, sample_positions, logit_indices = rows, seq_lens, query_start_loc[:0]
    if not (max_query_len == 1 and is_sampled.all()):
        sample_rows, sample_positions = rows[is_sampled], seq_lens[is_sampled]
        logit_indices = query_start_loc[1:][is_sampled] - 1
    (
        on_device_rows,
        on_device_positions,
        token_places,
        block_places,
        offsets,
        on_device_logit_indices,
        on_device_sample_rows,
        on_device_sample_positions,
        sample_places,
        on_device_query_start_loc,
        on_device_seq_lens,
    ) = upload_all(
        [
            rows,
            positions,
            row_of_token * tokens.width + positions,
            row_of_token * blocks.width + positions // block_size,
            positions % block_size,
            logit_indices,
            sample_rows,
            sample_positions,
            sample_rows * tokens.width + sample_positions,
            query_start_loc.astype(np.int32),
            seq_lens.astype(np.int32),
        ],
        states.device,
    )
    max_seq_len = int(seq_lens.max())
    max_num_blocks = -(-max_seq_len // block_size)
    wishes = states.sampling.union(rows)
    samples = None
    if sample_rows.size:
        samples = SamplePlaces(
            rows=sample_rows,
            wishes=wishes if sample_rows is rows else states.sampling.union(sample_rows),
            rows_on_device=on_device_sample_rows,
            positions=on_device_sample_positions,
            places=sample_places,
        )
    return InputBatch(
        rows=rows,
        wishes=wishes,
        num_new_tokens=num_new_tokens,
        query_start_loc=query_start_loc,
        token_ids=tokens.flat.index_select(0, token_places),
        positions=on_device_positions,
        meta=AttentionMetadata(
            slot_mapping=blocks.flat.index_select(0, block_places) * block_size + offsets,
            block_table=blocks.tensor[:, :max_num_blocks].index_select(0, on_device_rows),
            query_start_loc=on_device_query_start_loc,
            seq_lens=on_device_seq_lens,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
        ),
        logit_indices=on_device_logit_indices if logit_indices.size else None,
        samples=samples,
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
