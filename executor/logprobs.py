"""Log-probabilities of the model's own distribution, from raw logits to messages.

They are computed on the device before anything changes the logits, travel beside the sampled ids,
and become messages only when the step is answered. Prompts are done in slices, so that a long one
never needs its whole [T, V] at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.input_batch import PackedRows
from executor.request_states import RequestStates
from executor.sampling_states import Wish
from executor.transfer import download
from ipc.messages import TokenLogprobs
from kernels.logprobs import token_logprobs

MAX_SLICE_BYTES = 64 * 2**20  # of float32 logits at once


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host; read once the step's event has come."""

    token_ids: Tensor  # [N]
    chosen: Tensor  # [N]
    rank: Tensor  # [N]
    top_ids: Tensor  # [N, k]
    top_logprobs: Tensor  # [N, k]
    wanted: list[int]  # [N]: how many of the k each position gets

    def unpack(self) -> list[TokenLogprobs]:
        """One message part per position."""
        columns = zip(
            self.token_ids.tolist(),
            self.chosen.tolist(),
            self.rank.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
            self.wanted,
            strict=True,
        )
        return [
            TokenLogprobs([token_id, *ids[:k]], [chosen, *logprobs[:k]], rank)
            for token_id, chosen, rank, ids, logprobs, k in columns
        ]


def compute_logprobs(logits: Tensor, token_ids: Tensor, wanted: list[int]) -> PendingLogprobs:
    """Start the look-up of tokens in raw logits.

    Args:
        logits: [N, V] float32, as the model made them.
        token_ids: [N] int64, the tokens chosen or given.
        wanted: [N], how many of the likeliest tokens to name; -1 for all.
    """
    vocab_size = logits.shape[1]
    wanted = [vocab_size if k < 0 else min(k, vocab_size) for k in wanted]
    result = token_logprobs(logits, token_ids, max(wanted))
    chosen, rank, top_ids, top_logprobs = (download(tensor) for tensor in result)
    return PendingLogprobs(download(token_ids), chosen, rank, top_ids, top_logprobs, wanted)


def prompt_logprobs(
    packed: PackedRows,
    states: RequestStates,
    hidden: Tensor,
    compute_logits: Callable[[Tensor], Tensor],
) -> list[tuple[int, list[PendingLogprobs]]]:
    """Per row that asks: the log-probabilities of the prompt positions that this step predicts.

    The hidden state at position p predicts position p + 1, so the first prompt token has none.
    Called before the rows advance.

    Args:
        hidden: [T, H], the model's output for the whole batch.
    """
    asking = states.sampling.rows_with(packed.rows, Wish.PROMPT_LOGPROBS)
    found = []
    for i in asking.tolist():
        row = int(packed.rows[i])
        start, end = (int(at) for at in packed.query_start_loc[i : i + 2])
        num_computed = int(states.num_computed_tokens[row])
        first = max(num_computed + 1, int(states.num_prompt_logprobs_sent[row]) + 1)
        last = min(num_computed + end - start, int(states.num_prompt_tokens[row]) - 1)
        if first > last:
            continue
        start += first - 1 - num_computed
        num_positions = last - first + 1
        params = states.sampling.of(row).params
        assert params.num_prompt_logprobs is not None
        given = states.tokens.tensor[row, first : last + 1].to(torch.int64)
        slices = []
        for low, high in _slices(num_positions, states.sampling.vocab_size):
            logits = compute_logits(hidden[start + low : start + high])
            wanted = [params.num_prompt_logprobs] * (high - low)
            slices.append(compute_logprobs(logits, given[low:high], wanted))
        found.append((row, slices))
    return found


def _slices(num_positions: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    size = max(1, MAX_SLICE_BYTES // (4 * vocab_size))
    for low in range(0, num_positions, size):
        yield low, min(low + size, num_positions)
