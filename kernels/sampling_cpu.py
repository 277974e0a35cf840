"""The CPU path of ``sampling``, which holds the definitions that this is tested against.

Nothing is computed that no row asked for: greedy rows cost an argmax, and a row with a filter
sorts, weighs and draws among its likeliest tokens only, if these can be shown to be enough.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature under this is argmax
_FIRST_CANDIDATES = 256
_NOISE_CHUNK = 1 << 15  # values of noise made at a time, to stay in a core's cache

Words = npt.NDArray[np.uint32]


class Rows(NamedTuple):
    """How each row is drawn, [B] each; see ``sample``."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor

    def select(self, rows: Tensor) -> "Rows":
        """Return the parameters of these rows."""
        return Rows(*(values.index_select(0, rows) for values in self))


def sample_cpu(logits: Tensor, rows: Rows, any_filter: bool) -> Tensor:
    """Split rows by what they ask for: argmax, a draw from everything, a draw after filters."""
    V = logits.shape[1]
    is_random = rows.temperature >= GREEDY_BELOW
    if not any_filter:
        is_filtered = torch.zeros_like(is_random)
    else:
        by_count = (rows.top_k > 0) & (rows.top_k < V)
        is_filtered = is_random & (by_count | (rows.top_p < 1.0) | (rows.min_p > 0.0))
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64)
    for wanted, draw in (
        (~is_random, _argmax),
        (is_random & ~is_filtered, _draw),
        (is_filtered, _draw_filtered),
    ):
        chosen = wanted.nonzero().squeeze(1)
        if len(chosen) == len(token_ids):
            return draw(logits, rows)
        if len(chosen):
            token_ids[chosen] = draw(logits.index_select(0, chosen), rows.select(chosen))
    return token_ids


def _argmax(logits: Tensor, rows: Rows) -> Tensor:
    return logits.argmax(dim=1)


def _draw(logits: Tensor, rows: Rows) -> Tensor:
    """Draw from the whole vocabulary."""
    x = logits * (1.0 / rows.temperature).unsqueeze(1)
    x += gumbel_noise_cpu(rows.seeds, rows.positions, logits.shape[1])
    return x.argmax(dim=1)


def _draw_filtered(logits: Tensor, rows: Rows) -> Tensor:
    """Draw among the likeliest tokens; rows that need more of them get more."""
    V = logits.shape[1]
    x = logits * (1.0 / rows.temperature).unsqueeze(1)
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64)
    pending = torch.arange(logits.shape[0])
    wanted = int(torch.where(rows.top_k < V, rows.top_k, 0).max())
    num_candidates = max(_FIRST_CANDIDATES, wanted + 1)
    while len(pending):
        num_candidates = V if num_candidates * 4 > V else num_candidates
        drawn, is_settled = _draw_among(x, rows, num_candidates)
        token_ids[pending[is_settled]] = drawn[is_settled]
        left = (~is_settled).nonzero().squeeze(1)
        pending, x, rows = pending[left], x.index_select(0, left), rows.select(left)
        num_candidates *= 16
    return token_ids


def _draw_among(x: Tensor, rows: Rows, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Draw from the ``num_candidates`` likeliest: the tokens, and which rows are settled.

    A row is settled when its filters drop a candidate, as everything behind is dropped too.
    """
    V = x.shape[1]
    values, ids = torch.topk(x, num_candidates, dim=1)  # likeliest first
    largest = values[:, :1]
    floor = largest + torch.log(rows.min_p).unsqueeze(1)
    by_count = (rows.top_k > 0) & (rows.top_k < V)
    if bool(by_count.any()):
        places = torch.where(by_count, rows.top_k - 1, 0).long().unsqueeze(1)
        kth = values.gather(1, places)
        floor = torch.where(by_count.unsqueeze(1), torch.maximum(floor, kth), floor)
    if bool((rows.top_p < 1.0).any()):
        floor = torch.maximum(floor, _top_p_floor(x, values, floor, rows.top_p.unsqueeze(1)))
    noise = _noise_of(_keys(rows.seeds, rows.positions), ids.numpy().astype(np.uint32))
    noisy = torch.where(values >= floor, values + noise, -torch.inf)
    drawn = ids.gather(1, noisy.argmax(dim=1, keepdim=True)).squeeze(1)
    drawn = torch.where(largest.squeeze(1) == -torch.inf, 0, drawn)  # nothing may be drawn
    is_settled = values[:, -1] < floor.squeeze(1)
    return drawn, is_settled if num_candidates < V else torch.ones_like(is_settled)


def _top_p_floor(x: Tensor, values: Tensor, floor: Tensor, top_p: Tensor) -> Tensor:
    """Return [B, 1]: the smallest value that top-p keeps, -inf where it is off.

    Sums are float64, so that how many candidates there are does not show in the result.
    """
    largest = values[:, :1]
    weights = torch.where(values >= floor, torch.exp(values - largest), 0.0).double()
    sums = weights.cumsum(dim=1)
    if bool((values[:, -1:] < floor).all()):
        total = sums[:, -1:]
    else:  # some survivors are not among the candidates
        everything = torch.where(x >= floor, torch.exp(x - largest), 0.0)
        total = everything.sum(dim=1, keepdim=True, dtype=torch.float64)
    num_kept = (sums - weights < top_p * total).sum(dim=1, keepdim=True).clamp(min=1)
    smallest = values.gather(1, num_kept - 1)
    return torch.where(top_p < 1.0, smallest, -torch.inf)


def gumbel_noise_cpu(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The CPU path of the noise: numpy's 32-bit integers wrap as the definition wants."""
    B = seeds.shape[0]
    key_a, key_b = _keys(seeds, positions)
    token_ids = np.arange(vocab_size, dtype=np.uint32)
    noise = torch.empty((B, vocab_size), dtype=torch.float32)
    step = max(1, _NOISE_CHUNK // vocab_size)
    for start in range(0, B, step):
        rows = slice(start, start + step)
        noise[rows] = _noise_of((key_a[rows], key_b[rows]), token_ids)
    return noise


def _mix(x: Words) -> Words:
    """Mix in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def _keys(seeds: Tensor, positions: Tensor) -> tuple[Words, Words]:
    """The two keys of each draw, [B, 1]; see ``noise_bits_reference``."""
    bits = seeds.numpy().view(np.uint64)
    low, high = bits.astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32)
    place = positions.numpy().astype(np.uint32)
    key_a = _mix(_mix(_mix(place ^ np.uint32(0x3C6EF372)) ^ low) ^ high)
    key_b = _mix(_mix(_mix(low ^ np.uint32(0xA54FF53A)) + high) + place)
    return key_a[:, None], key_b[:, None]


def _noise_of(keys: tuple[Words, Words], token_ids: Words) -> Tensor:
    x = token_ids * np.uint32(0x9E3779B9) + keys[0]
    x = _mix(_mix(x) ^ keys[1])
    x >>= np.uint32(8)
    x |= np.uint32(1)
    u = torch.from_numpy(x.view(np.int32)).to(torch.float32).mul_(2.0**-24)
    return u.log_().neg_().log_().neg_()
