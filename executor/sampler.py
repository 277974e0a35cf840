"""From raw logits to token ids, for the rows of one step.

The order, which users can rely on: allowed ids, logit bias, bad words and min-tokens bans; then
penalties; then temperature, min-p, top-k, top-p and the draw (``kernels.sampling``). Greedy is
the argmax of the same processed logits. Nothing here has state: what a row has seen is counted
from its own tokens, and the draw's noise depends on its seed, position and token id alone.
Shapes: S rows that sample, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from executor.input_batch import SamplePlaces
from executor.request_states import RequestStates
from executor.sampling_states import DRAWN, EDITS, Wish
from executor.transfer import Array, upload_all
from kernels.logits import apply_bitmask, apply_penalties, apply_token_bias, has_nan
from kernels.prepare_inputs import Draws
from kernels.sampling import Sampled, sample


def sample_rows(logits: Tensor, places: SamplePlaces, states: RequestStates) -> Sampled:
    """Choose the next token of every row.

    Args:
        logits: [S, V] float32, raw; changed in place where rows ask for it.
    """
    wishes = places.wishes & DRAWN
    if not wishes:
        return _greedy(logits)
    if not wishes & EDITS:
        return _draw(logits, places, states)
    has_bad_logit = has_nan(logits)  # before a ban hides it
    process_logits(logits, places.rows, states)
    sampled = _draw(logits, places, states) if wishes & Wish.RANDOM else _greedy(logits)
    return sampled._replace(is_bad=sampled.is_bad | has_bad_logit)


def _draw(logits: Tensor, places: SamplePlaces, states: RequestStates) -> Sampled:
    params = states.sampling.gather(places.rows_on_device)
    return sample(
        logits,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seeds=params.seeds,
        positions=places.positions,
        any_filter=bool(places.wishes & Wish.FILTERS),
    )


def draw(logits: Tensor, draws: Draws) -> Sampled:
    """Choose by logits as they are and parameters on the device, which alone looks at them."""
    return sample(logits, **draws._asdict())


def _greedy(logits: Tensor) -> Sampled:
    """The best token of each row; a NaN counts as the maximum of its row."""
    if logits.is_cuda:
        best = logits.max(dim=-1)
        return Sampled(best.indices, ~(best.values > -torch.inf))
    # On a CPU numpy finds the place of a maximum some twenty times as fast as torch 2.13.
    token_ids = torch.from_numpy(logits.numpy().argmax(axis=-1))
    best_logits = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return Sampled(token_ids, ~(best_logits > -torch.inf))


def process_logits(logits: Tensor, rows: Array, states: RequestStates) -> None:
    """Apply every row's bans, biases and penalties, in place.

    Args:
        logits: [S, V] float32.
        rows: [S], on the host.
    """
    _apply_allowed(logits, rows, states)
    _apply_biases(logits, rows, states)
    _apply_bad_words(logits, rows, states)
    _apply_penalties(logits, rows, states)


def _apply_allowed(logits: Tensor, rows: Array, states: RequestStates) -> None:
    asking = states.sampling.rows_with(rows, Wish.ALLOWED)
    if not asking.size:
        return
    masks = [states.sampling.of(row).allowed for row in rows[asking].tolist()]
    (places,) = upload_all([asking], logits.device)
    apply_bitmask(logits, places, torch.stack([mask for mask in masks if mask is not None]))


def _apply_biases(logits: Tensor, rows: Array, states: RequestStates) -> None:
    """Logit bias, one-token bad words, and stop tokens that would come too early."""
    places, token_ids, values = [], [], []
    for i in states.sampling.rows_with(rows, Wish.BIAS).tolist():
        wishes = states.sampling.of(int(rows[i]))
        places.append(np.full(wishes.bias_ids.size, i, dtype=np.int64))
        token_ids.append(wishes.bias_ids)
        values.append(wishes.bias_values)
    for i in states.sampling.rows_with(rows, Wish.MIN_TOKENS).tolist():
        row = int(rows[i])
        wishes = states.sampling.of(row)
        if states.num_tokens[row] - states.num_prompt_tokens[row] >= wishes.params.min_tokens:
            states.sampling.flags[row] &= ~int(Wish.MIN_TOKENS)
            continue
        places.append(np.full(wishes.stop_ids.size, i, dtype=np.int64))
        token_ids.append(wishes.stop_ids)
        values.append(np.full(wishes.stop_ids.size, -np.inf, dtype=np.float32))
    if places:
        joined: list[Array] = [np.concatenate(part) for part in (places, token_ids, values)]
        apply_token_bias(logits, *upload_all(joined, logits.device))


def _apply_bad_words(logits: Tensor, rows: Array, states: RequestStates) -> None:
    """Ban the last token of each longer bad word where the row ends with the tokens before it."""
    places, heads, ends, lengths = [], [], [], []
    for i in states.sampling.rows_with(rows, Wish.BAD_WORDS).tolist():
        num_tokens = int(states.num_tokens[rows[i]])
        for word in states.sampling.of(int(rows[i])).bad_words:
            if word.size - 1 <= num_tokens:
                places.append(i)
                heads.append(word[:-1])
                ends.append(word[-1])
                lengths.append(num_tokens)
    if not places:
        return
    width = max(head.size for head in heads)
    # Heads are aligned at the row's end; -1 stands for "any" and before the row's first token.
    wanted = np.full((len(heads), width), -1, dtype=np.int64)
    for n, head in enumerate(heads):
        wanted[n, width - head.size :] = head
    at = np.array(lengths)[:, None] - width + np.arange(width)
    at = rows[places][:, None] * states.tokens.width + np.maximum(at, 0)
    on_device = upload_all(
        [
            np.array(places, dtype=np.int64),
            np.array(ends, dtype=np.int64),
            wanted.ravel(),
            at.ravel(),
        ],
        logits.device,
    )
    there = states.tokens.flat.index_select(0, on_device[3]).view(-1, width)
    expected = on_device[2].view(-1, width)
    matches = ((there == expected) | (expected < 0)).all(dim=1)
    values = torch.zeros(len(heads), device=logits.device).masked_fill_(matches, -torch.inf)
    apply_token_bias(logits, on_device[0], on_device[1], values)


def _apply_penalties(logits: Tensor, rows: Array, states: RequestStates) -> None:
    """Count the tokens of the rows that ask, and penalise those rows."""
    asking = states.sampling.rows_with(rows, Wish.PENALTIES)
    if not asking.size:
        return
    asking_rows = rows[asking]
    num_tokens = states.num_tokens[asking_rows]
    places, on_device_rows, ends, prompt_ends = upload_all(
        [asking, asking_rows, num_tokens, states.num_prompt_tokens[asking_rows]], logits.device
    )
    width = int(num_tokens.max())
    token_ids = states.tokens.tensor[:, :width].index_select(0, on_device_rows).to(torch.int64)
    columns = torch.arange(width, device=logits.device)
    is_prompt = columns < prompt_ends.unsqueeze(1)  # [P, width]
    is_output = (columns < ends.unsqueeze(1)) & ~is_prompt
    counts = torch.zeros((2, asking.size, logits.shape[1]), dtype=torch.int32, device=logits.device)
    counts[0].scatter_add_(1, token_ids, is_output.to(torch.int32))
    counts[1].scatter_add_(1, token_ids, is_prompt.to(torch.int32))
    params = states.sampling.gather(on_device_rows)
    is_whole_batch = asking.size == rows.size
    chosen = logits if is_whole_batch else logits.index_select(0, places)
    apply_penalties(
        chosen, counts[0], counts[1] > 0, params.presence, params.frequency, params.repetition
    )
    if not is_whole_batch:
        logits.index_copy_(0, places, chosen)
