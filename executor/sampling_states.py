"""How each row is sampled: parameters as tensors, and which rows ask for more than a plain draw.

The tensors are for the device, one entry per row. What needs work on the host (biases, bans,
log-probabilities, ...) is kept per row, and announced by one flag word per row, so that a batch
without such wishes costs one ``bitwise_or``.
"""

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor.transfer import Array, update, upload
from ipc.messages import RowParams
from ipc.sampling_params import GREEDY_BELOW
from kernels.prepare_inputs import DrawTables


class Wish(IntFlag):
    """What a row asks beside a greedy choice."""

    RANDOM = 1  # a temperature that is not greedy's
    PENALTIES = 2
    BIAS = 4  # logit bias and one-token bad words
    ALLOWED = 8
    BAD_WORDS = 16  # of two tokens and more
    MIN_TOKENS = 32  # cleared once enough tokens are out
    LOGPROBS = 64
    PROMPT_LOGPROBS = 128
    PROCESSORS = 256  # the user's own; the logits leave
    FILTERS = 512  # top-k, top-p or min-p, at a temperature above 0


# Wishes that change logits before the draw.
EDITS = Wish.PENALTIES | Wish.BIAS | Wish.ALLOWED | Wish.BAD_WORDS | Wish.MIN_TOKENS
# Without any of these a row is the argmax of its raw logits. A plain number: it is used per step.
DRAWN = int(EDITS | Wish.RANDOM | Wish.FILTERS)
# With any of these a row takes more than a forward pass and a draw.
MORE_THAN_DRAWN = int(EDITS | Wish.LOGPROBS | Wish.PROCESSORS)
# So many, or a multiple, bring the next parameter to an address of 16 bytes: kernels compiled for
# such addresses would be compiled once more for others.
_ALIGNED_ROWS = 4


@dataclass(frozen=True, slots=True)
class DrawParams:
    """Parameters of a draw for the rows of one step, on the device; all [S]."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    top_k: Tensor
    seeds: Tensor


@dataclass(frozen=True, slots=True)
class RowWishes:
    """The host's side of one row; ids beyond the vocabulary are left out."""

    params: RowParams
    bias_ids: NDArray[np.int64]
    bias_values: NDArray[np.float32]
    bad_words: list[NDArray[np.int64]]  # of two tokens and more
    stop_ids: NDArray[np.int64]  # banned while fewer than min_tokens are out
    allowed: Tensor | None  # [ceil(V / 32)] int32 on the device


class SamplingStates:
    """Owns every row's sampling parameters, on the host and on the device."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.flags: NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.wishes: list[RowWishes | None] = [None] * num_rows
        self._device = device
        self._floats: NDArray[np.float32] = np.zeros((6, num_rows), dtype=np.float32)
        self._whole: NDArray[np.int64] = np.zeros((2, num_rows), dtype=np.int64)
        # What kernels read; it stays at one address.
        self.tables = DrawTables(
            torch.zeros(self._floats.shape, device=device),
            torch.zeros(self._whole.shape, dtype=torch.int64, device=device),
        )
        self._is_stale = False  # the device lacks what the host knows

    def add(self, row: int, params: RowParams) -> None:
        """A row gets new parameters."""
        self._floats[:, row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        self._whole[0, row] = min(params.top_k, self.vocab_size)
        self._whole[1, row] = (params.seed + 2**63) % 2**64 - 2**63  # as a signed 64-bit number
        wishes = self._digest(params)
        self.flags[row] = _flags(wishes)
        self.wishes[row] = wishes
        self._is_stale = True

    def free(self, row: int) -> None:
        """The row is nobody's."""
        self.flags[row] = 0
        self.wishes[row] = None

    def of(self, row: int) -> RowWishes:
        """The wishes of a row in use."""
        wishes = self.wishes[row]
        assert wishes is not None, f"row {row} is nobody's"
        return wishes

    def union(self, rows: Array) -> int:
        """Every wish that one of these rows has."""
        return int(np.bitwise_or.reduce(self.flags[rows]))

    def rows_with(self, rows: Array, wishes: int) -> Array:
        """Which places of ``rows`` hold a row with any of these wishes."""
        return np.flatnonzero(self.flags[rows] & wishes)

    def flush(self) -> None:
        """Send what rows brought; until then the device has what it had."""
        if self._is_stale:
            update(self.tables.floats, self._floats)
            update(self.tables.whole, self._whole)
            self._is_stale = False

    def gather(self, rows: Tensor) -> DrawParams:
        """The parameters of these rows, in their order."""
        self.flush()
        num_rows = rows.shape[0]
        if rows.is_cuda and num_rows % _ALIGNED_ROWS:
            rows = torch.nn.functional.pad(rows, (0, -num_rows % _ALIGNED_ROWS))
        floats = self.tables.floats.index_select(1, rows)[:, :num_rows]
        top_k, seeds = self.tables.whole.index_select(1, rows)[:, :num_rows].unbind(0)
        temperature, top_p, min_p, presence, frequency, repetition = floats.unbind(0)
        return DrawParams(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            presence=presence,
            frequency=frequency,
            repetition=repetition,
            top_k=top_k.to(torch.int32),
            seeds=seeds,
        )

    def _digest(self, params: RowParams) -> RowWishes:
        """Split what the row asks into arrays that a step can join."""
        known = self._known
        bias = [(i, value) for i, value in params.logit_bias if 0 <= i < self.vocab_size]
        words = [word for word in params.bad_words_token_ids if word and known(word) == word]
        bias += [(word[0], -np.inf) for word in words if len(word) == 1]
        allowed = params.allowed_token_ids
        return RowWishes(
            params=params,
            bias_ids=np.array([i for i, _ in bias], dtype=np.int64),
            bias_values=np.array([value for _, value in bias], dtype=np.float32),
            bad_words=[np.array(word, dtype=np.int64) for word in words if len(word) > 1],
            stop_ids=np.array(known(params.stop_token_ids), dtype=np.int64),
            allowed=None if allowed is None else self._bitmask(known(allowed)),
        )

    def _known(self, token_ids: list[int]) -> list[int]:
        return [i for i in token_ids if 0 <= i < self.vocab_size]

    def _bitmask(self, token_ids: list[int]) -> Tensor:
        """[ceil(V / 32)] int32: bit i % 32 of word i // 32 is set when token i is allowed."""
        bits = np.zeros(-(-self.vocab_size // 32) * 32, dtype=np.uint8)
        bits[token_ids] = 1
        words = np.packbits(bits, bitorder="little").view(np.int32)
        return upload(words, self._device)


def _flags(wishes: RowWishes) -> int:
    params = wishes.params
    has_penalties = (
        params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
    )
    is_random = params.temperature >= GREEDY_BELOW
    has_filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    flags = Wish(0)
    for wish, is_set in (
        (Wish.RANDOM, is_random),
        (Wish.FILTERS, is_random and has_filters),
        (Wish.PENALTIES, has_penalties),
        (Wish.BIAS, wishes.bias_ids.size > 0),
        (Wish.ALLOWED, wishes.allowed is not None),
        (Wish.BAD_WORDS, bool(wishes.bad_words)),
        (Wish.MIN_TOKENS, params.min_tokens > 0 and wishes.stop_ids.size > 0),
        (Wish.LOGPROBS, params.num_logprobs is not None),
        (Wish.PROMPT_LOGPROBS, params.num_prompt_logprobs is not None),
        (Wish.PROCESSORS, params.has_logits_processors),
    ):
        if is_set:
            flags |= wish
    return int(flags)
