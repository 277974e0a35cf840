"""Per-request rows that live across steps, and how a plan's difference changes them.

The tables (token ids, block ids) are on the device, one row per request; the counts are on the
host. Counts advance without reading the device: a row that samples gains exactly one token, whose
id the device writes into its own table, so the next step needs no ids from anyone.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor.sampling_states import SamplingStates
from executor.transfer import Array, upload_all
from ipc.messages import NewRow, SchedulerOutput

# Tokens beyond max_model_len that a row can hold: with several steps in flight a finished row
# may be planned a few more times before the core learns of its end.
SLACK_TOKENS = 32


class RowTable:
    """A table [rows, width] of int32 on the device, written from the host.

    On a GPU writes are collected and travel together with ``flush``; the places written between
    two flushes must differ.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.tensor = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        self.flat = self.tensor.view(-1)
        self.width = width
        self._array: Array | None = self.tensor.numpy() if device.type == "cpu" else None
        self._places: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.int32]] = []

    def write(self, row: int, start: int, values: Sequence[int]) -> None:
        """Put ``values`` into a row from column ``start`` on; after ``flush`` they are there."""
        end = start + len(values)
        if end > self.width:
            raise ValueError(f"row {row} would need {end} columns, there are {self.width}")
        if self._array is not None:
            self._array[row, start:end] = values
        elif values:
            first = row * self.width + start
            self._places.append(np.arange(first, first + len(values), dtype=np.int64))
            self._values.append(np.array(values, dtype=np.int32))

    def append(self, rows: Array, starts: Array, counts: Array, values: Array) -> None:
        """Put ``counts[i]`` of the values into row ``rows[i]`` from column ``starts[i]`` on.

        Args:
            rows: all different.
            values: one row's after the other's.
        """
        if (starts + counts).max() > self.width:
            row = rows[(starts + counts).argmax()]
            raise ValueError(f"row {row} would need more than {self.width} columns")
        firsts = rows * self.width + starts - (np.cumsum(counts) - counts)
        places = np.repeat(firsts, counts) + np.arange(values.size)
        if self._array is not None:
            self._array.reshape(-1)[places] = values
        else:
            self._places.append(places)
            self._values.append(values.astype(np.int32))

    def flush(self) -> None:
        """Send what was written."""
        if self._places:
            arrays: list[Array] = [np.concatenate(self._places), np.concatenate(self._values)]
            places, values = upload_all(arrays, self.tensor.device)
            self.flat.index_copy_(0, places, values)
            self._places, self._values = [], []


class RequestStates:
    """Owns the rows.

    ``num_computed_tokens <= num_tokens`` for every row in use, counting the steps already
    launched; the tables hold at least that many tokens, and blocks for them. ``padding_row`` is
    never anybody's: greedy, in the null block, for the places of a step that nobody fills.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        width = -(-(max_model_len + SLACK_TOKENS) // block_size) * block_size
        self.block_size = block_size
        self.device = device
        self.padding_row = max_num_seqs
        self.tokens = RowTable(max_num_seqs + 1, width, device)
        self.blocks = RowTable(max_num_seqs + 1, width // block_size, device)
        self.num_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_blocks: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        # Prompt positions whose log-probabilities were reported before a preemption.
        self.num_prompt_logprobs_sent: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        self.sampling = SamplingStates(max_num_seqs + 1, vocab_size, device)

    def apply(self, plan: SchedulerOutput) -> None:
        """Change the rows as the plan says, in its documented order."""
        for row in plan.freed_rows:
            self.num_tokens[row] = self.num_computed_tokens[row] = 0
            self.sampling.free(row)
        for new_row in plan.new_rows:
            self._add(new_row)
        self.tokens.flush()
        self.blocks.flush()
        if plan.new_block_ids:
            self._append_blocks(plan.new_block_ids)
            self.blocks.flush()
        if plan.released_block_ids:
            for row, num_released in plan.released_block_ids:
                self.blocks.write(row, 0, [0] * num_released)
            self.blocks.flush()

    def advance(self, rows: Array, num_new_tokens: Array | int) -> None:
        """A forward pass over these tokens was launched."""
        self.num_computed_tokens[rows] += num_new_tokens

    def append(self, rows: Array, places: Tensor, token_ids: Tensor) -> None:
        """Each row gained the token sampled for it; the ids stay on the device.

        Args:
            rows: [S], all different.
            places: [S] int64 on the device: where in the flat token table each id goes.
            token_ids: [S] int64 on the device.
        """
        self.tokens.flat.index_copy_(0, places, token_ids.to(torch.int32))
        self.num_tokens[rows] += 1

    def block_ids(self, row: int) -> list[int]:
        """A row's blocks, read from the device: slow, for the rare case."""
        ids: list[int] = self.blocks.tensor[row, : int(self.num_blocks[row])].tolist()
        return ids

    def _append_blocks(self, new_block_ids: Sequence[tuple[int, list[int]]]) -> None:
        rows_of_plan, block_ids = zip(*new_block_ids, strict=True)
        if len(set(rows_of_plan)) < len(rows_of_plan):  # a row twice: one after the other
            for one in new_block_ids:
                self._append_blocks([one])
            return
        rows = np.array(rows_of_plan)
        counts = np.fromiter(map(len, block_ids), dtype=np.int64, count=rows.size)
        values = np.fromiter(chain.from_iterable(block_ids), dtype=np.int64, count=counts.sum())
        self.blocks.append(rows, self.num_blocks[rows], counts, values)
        self.num_blocks[rows] += counts

    def _add(self, new: NewRow) -> None:
        row = new.row
        self.tokens.write(row, 0, new.token_ids)
        # The row's former owner may have had more blocks: entries past the end are the null block.
        num_stale = max(0, int(self.num_blocks[row]) - len(new.block_ids))
        self.blocks.write(row, 0, new.block_ids + [0] * num_stale)
        self.num_blocks[row] = len(new.block_ids)
        self.num_tokens[row] = len(new.token_ids)
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.num_computed_tokens[row] = new.num_computed_tokens
        self.num_prompt_logprobs_sent[row] = new.num_prompt_logprobs_sent
        self.sampling.add(row, new.params)
