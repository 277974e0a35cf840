"""From a plan and the rows to one step's packed inputs.

Index arithmetic is numpy over small vectors; everything travels in one copy, and only what sits in
the tables (token ids, block ids) is looked up on the device. Nothing here runs once per token in
Python, and nothing once per request.
Shapes: T packed tokens, B scheduled rows, S rows that sample, M blocks per request.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor.attention_metadata import AttentionMetadata
from executor.request_states import RequestStates
from executor.transfer import Array, upload_all
from ipc.messages import SchedulerOutput
from kernels.attention_step import StepLengths, StepMemo
from kernels.prepare_inputs import PackedInputs, Requests, prepare_inputs

_TABLE_COLUMNS = 16  # on a GPU a block table's width is a multiple of it
_TILE = 128  # queries; more make no difference to a kernel's variant


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A step as the host sees it; complete before anything is on the device."""

    rows: Array  # [B], in plan order
    wishes: int  # every ``Wish`` that one of them has
    num_new_tokens: Array | int  # [B]; 1 when every row owes one token
    query_start_loc: Array  # [B + 1]
    seq_lens: Array  # [B]
    sampling: Array | None  # places of the rows that compute their last token; None: all of them
    max_query_len: int
    max_seq_len: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.query_start_loc[-1])

    @property
    def num_samples(self) -> int:
        """S."""
        return self.rows.size if self.sampling is None else self.sampling.size

    @property
    def is_decode(self) -> bool:
        """Whether every row owes one token and samples the next."""
        return self.max_query_len == 1 and self.sampling is None

    def samples(self) -> tuple[Array, Array, Array]:
        """The rows that sample, the positions of their new tokens, the indices of their last."""
        rows, positions, last = self.rows, self.seq_lens, self.query_start_loc[1:] - 1
        if self.sampling is not None:
            rows, positions, last = (
                rows[self.sampling],
                positions[self.sampling],
                last[self.sampling],
            )
        return rows, positions, last


@dataclass(frozen=True, slots=True)
class SamplePlaces:
    """The rows that sample in a step, and where their new tokens belong."""

    rows: Array  # [S], on the host
    wishes: int  # every ``Wish`` that one of them has
    rows_on_device: Tensor  # [S] int64
    positions: Tensor  # [S] int64: index of the token to be sampled, prompt included
    places: Tensor  # [S] int64: the same place in the flat token table
    logit_indices: Tensor | None = None  # [S] of the T tokens; None: all, or there was no pass


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One forward pass."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    meta: AttentionMetadata


def pack_rows(plan: SchedulerOutput, states: RequestStates) -> PackedRows:
    """The scheduled rows, which must not be none. Reads the rows; changes nothing."""
    rows = np.array(plan.rows, dtype=np.int64)
    num_computed = states.num_computed_tokens[rows]
    num_new_tokens: Array | int = 1
    if not plan.num_new_tokens:  # one token for each row: the common case
        query_start_loc = np.arange(rows.size + 1)
        max_query_len = 1
    else:
        num_new_tokens = np.array(plan.num_new_tokens, dtype=np.int64)
        query_start_loc = np.zeros(rows.size + 1, dtype=np.int64)
        np.cumsum(num_new_tokens, out=query_start_loc[1:])
        max_query_len = int(num_new_tokens.max())
    seq_lens = num_computed + num_new_tokens
    is_sampled = seq_lens == states.num_tokens[rows]
    return PackedRows(
        rows=rows,
        wishes=states.sampling.union(rows),
        num_new_tokens=num_new_tokens,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        sampling=None if is_sampled.all() else np.flatnonzero(is_sampled),
        max_query_len=max_query_len,
        max_seq_len=int(seq_lens.max()),
    )


def build_input_batch(packed: PackedRows, states: RequestStates) -> InputBatch:
    """The packed inputs on the device. Reads the rows; changes nothing."""
    build = _look_up if states.device.type == "cpu" else _prepare
    return build(packed, states)


def locate_samples(packed: PackedRows, states: RequestStates) -> SamplePlaces | None:
    """Where the rows that sample stand among the step's tokens, and where their tokens go.

    None when no row computes its last token.
    """
    rows, positions, indices = packed.samples()
    if not rows.size:
        return None
    wishes = packed.wishes if packed.sampling is None else states.sampling.union(rows)
    arrays = [rows, positions, rows * states.tokens.width + positions]
    if not packed.is_decode:
        arrays.append(indices)
    return SamplePlaces(rows, wishes, *upload_all(arrays, states.device))


def place_samples(rows: Array, states: RequestStates) -> SamplePlaces:
    """Where the next tokens of these rows belong, without a forward pass."""
    positions = states.num_tokens[rows]
    arrays = [rows, positions, rows * states.tokens.width + positions]
    on_device_rows, on_device_positions, places = upload_all(arrays, states.device)
    return SamplePlaces(
        rows, states.sampling.union(rows), on_device_rows, on_device_positions, places
    )


def _look_up(packed: PackedRows, states: RequestStates) -> InputBatch:
    """With torch's own look-ups, a few for the whole step."""
    rows, seq_lens = packed.rows, packed.seq_lens
    row_of_token, positions = rows, seq_lens - 1
    if not isinstance(packed.num_new_tokens, int):
        row_of_token = np.repeat(rows, packed.num_new_tokens)
        first_minus_start = seq_lens - packed.query_start_loc[1:]
        positions = np.arange(row_of_token.size)
        positions += np.repeat(first_minus_start, packed.num_new_tokens)
    tokens, blocks, block_size = states.tokens, states.blocks, states.block_size
    on_device = upload_all(
        [
            rows,
            positions,
            row_of_token * tokens.width + positions,
            row_of_token * blocks.width + positions // block_size,
            positions % block_size,
            packed.query_start_loc.astype(np.int32),
            seq_lens.astype(np.int32),
        ],
        states.device,
    )
    token_places, block_places, offsets = on_device[2:5]
    max_num_blocks = -(-packed.max_seq_len // block_size)
    return InputBatch(
        token_ids=tokens.flat.index_select(0, token_places),
        positions=on_device[1],
        meta=AttentionMetadata(
            slot_mapping=blocks.flat.index_select(0, block_places) * block_size + offsets,
            block_table=blocks.tensor[:, :max_num_blocks].index_select(0, on_device[0]),
            query_start_loc=on_device[5],
            seq_lens=on_device[6],
            max_query_len=packed.max_query_len,
            max_seq_len=packed.max_seq_len,
        ),
    )


def _prepare(packed: PackedRows, states: RequestStates) -> InputBatch:
    """With one copy and one kernel.

    The step is told to have as many requests as it could have, and queries for whole tiles: kernels
    that are compiled for ranges of these are then compiled for one.
    """
    num_requests, num_rows = states.padding_row, packed.rows.size
    staged = np.zeros((3, num_requests + 1), dtype=np.int32)
    staged[0, :num_rows] = packed.rows
    staged[1, :num_rows] = packed.seq_lens
    staged[2, : num_rows + 1] = packed.query_start_loc
    staged[2, num_rows + 1 :] = packed.num_tokens  # no queries
    requests = Requests(
        *upload_all([staged[0, :num_requests], staged[1, :num_requests], staged[2]], states.device)
    )
    num_blocks = -(-packed.max_seq_len // states.block_size)
    num_columns = -(-num_blocks // _TABLE_COLUMNS) * _TABLE_COLUMNS
    inputs = empty_inputs(packed.num_tokens, num_requests, num_columns, states.device)
    prepare_inputs(
        requests,
        states.tokens.tensor,
        states.blocks.tensor,
        inputs,
        block_size=states.block_size,
    )
    max_query_len = packed.max_query_len
    lengths = StepLengths(packed.query_start_loc.tolist(), packed.seq_lens.tolist())
    return InputBatch(
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        meta=AttentionMetadata(
            slot_mapping=inputs.slot_mapping,
            block_table=inputs.block_table,
            query_start_loc=requests.query_start_loc,
            seq_lens=requests.seq_lens,
            max_query_len=max_query_len if max_query_len == 1 else max(max_query_len, _TILE),
            max_seq_len=packed.max_seq_len,
            memo=StepMemo(lengths=lengths),
        ),
    )


def empty_inputs(
    num_tokens: int, num_requests: int, num_columns: int, device: torch.device
) -> PackedInputs:
    """Room for a step's packed inputs."""
    return PackedInputs(
        torch.empty(num_tokens, dtype=torch.int32, device=device),
        torch.empty(num_tokens, dtype=torch.int64, device=device),
        torch.empty(num_tokens, dtype=torch.int64, device=device),
        torch.empty(num_requests, num_columns, dtype=torch.int32, device=device),
    )
