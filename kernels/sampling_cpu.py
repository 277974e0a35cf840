"""The CPU path of ``sampling``, which holds the definitions that this is tested against.

Nothing is computed that no row asked for: greedy rows cost an argmax, only rows with top-k or
top-p are sorted, and noise is made for the tokens that can still win. All in numpy, whose
32-bit integers wrap as the definition of the noise wants, and whose sort of plain values is
many times quicker than a sort that must carry the token ids along.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature under this is argmax
_LONG_LIST = 512  # tokens of one row
_CHUNK = 1 << 20  # logits taken at a time, so that their copies stay in a cache

# Noise is made of u in [2**-24, 1 - 2**-24], so it lies between these two, rounded outwards. A
# token further below the likeliest than their difference cannot win.
_LEAST_NOISE, _MOST_NOISE = -math.log(24 * math.log(2)) - 0.01, 24 * math.log(2) + 0.01

_Words = npt.NDArray[np.uint32]
_Floats = npt.NDArray[np.float32]


class Rows(NamedTuple):
    """How each row is drawn, [B] each; see ``sample``."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor


class _Draws(NamedTuple):
    """The same for some of the rows, as arrays."""

    temperature: _Floats
    top_k: npt.NDArray[np.int32]
    top_p: _Floats
    min_p: _Floats
    keys: _Words  # [2, R]

    def select(self, rows: npt.NDArray[np.int64] | slice) -> "_Draws":
        """Return these rows."""
        return _Draws(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.keys[:, rows],
        )


def greedy_cpu(logits: Tensor) -> Tensor:
    """The largest of each row; numpy's search is several times quicker than torch's."""
    return torch.from_numpy(logits.numpy().argmax(axis=1))


def sample_cpu(logits: Tensor, rows: Rows, any_filter: bool) -> Tensor:
    """Take the largest of greedy rows, and draw the others, a chunk of rows at a time."""
    B, V = logits.shape
    values: _Floats = logits.numpy()
    temperature = rows.temperature.numpy()
    is_random = temperature >= GREEDY_BELOW
    token_ids = np.empty(B, dtype=np.int64)
    greedy, drawn = np.flatnonzero(~is_random), np.flatnonzero(is_random)
    if len(greedy):
        token_ids[greedy] = values[_as_slice(greedy, B)].argmax(axis=1)
    keys = noise_keys(rows.seeds, rows.positions) if len(drawn) else np.empty((2, B), np.uint32)
    draws = _Draws(temperature, rows.top_k.numpy(), rows.top_p.numpy(), rows.min_p.numpy(), keys)
    step = max(1, _CHUNK // V)
    with np.errstate(invalid="ignore", divide="ignore"):  # rows without a token, filters off
        for start in range(0, len(drawn), step):
            chosen = _as_slice(drawn[start : start + step], B)
            token_ids[chosen] = _draw(values[chosen], draws.select(chosen), any_filter)
    return torch.from_numpy(token_ids)


def _as_slice(rows: npt.NDArray[np.int64], B: int) -> npt.NDArray[np.int64] | slice:
    """All rows as a slice, which copies nothing."""
    return slice(None) if len(rows) == B else rows


def _draw(logits: _Floats, draws: _Draws, any_filter: bool) -> npt.NDArray[np.int64]:
    """Draw each row from the tokens that pass its filters and can still win."""
    x = logits * (np.float32(1) / draws.temperature)[:, None]
    largest = x.max(axis=1)
    floor = largest + np.float32(_LEAST_NOISE - _MOST_NOISE)
    if any_filter:
        floor = np.maximum(floor, _filter_floor(x, largest, draws))
    can_win = x >= floor[:, None]
    # A row's own loop is worth its overhead where a list of its tokens would be long.
    is_dense = can_win.sum(axis=1) > max(_LONG_LIST, x.shape[1] // 8)
    is_dense |= ~(largest > -np.inf)  # bad rows, as a list cannot be empty
    token_ids = np.empty(len(x), dtype=np.int64)
    for row in np.flatnonzero(is_dense):
        noisy = x[row] + _noise_of(draws.keys[:, [row]], np.arange(x.shape[1], dtype=np.uint32))
        token_ids[row] = np.where(can_win[row], noisy, -np.inf).argmax()
    sparse = np.flatnonzero(~is_dense)
    if len(sparse):
        chosen = _as_slice(sparse, len(x))
        token_ids[chosen] = _draw_sparse(x[chosen], can_win[chosen], draws.keys[:, chosen])
    return token_ids


def _draw_sparse(x: _Floats, can_win: npt.NDArray[np.bool_], keys: _Words) -> npt.NDArray[np.int64]:
    """Draw from the few tokens of each row that can win, all rows in one list."""
    R, V = x.shape
    place = np.flatnonzero(can_win)
    row, token_id = place // V, place % V
    noisy = x.reshape(-1)[place] + _noise_of(keys[:, row], token_id.astype(np.uint32))
    starts = np.searchsorted(row, np.arange(R))
    winner = np.flatnonzero(noisy == np.maximum.reduceat(noisy, starts)[row])
    token_ids = np.empty(R, dtype=np.int64)
    token_ids[row[winner][::-1]] = token_id[winner][::-1]  # the first of equals is written last
    return token_ids


def _filter_floor(x: _Floats, largest: _Floats, draws: _Draws) -> _Floats:
    """Return [R]: the smallest value that a row's filters keep, or less where they are off."""
    V = x.shape[1]
    floor: _Floats = largest + np.log(draws.min_p)
    by_count = (draws.top_k > 0) & (draws.top_k < V)
    sorting = np.flatnonzero(by_count | (draws.top_p < 1.0))
    if not len(sorting):
        return floor
    chosen = _as_slice(sorting, len(x))
    x, draws, by_count = x[chosen], draws.select(chosen), by_count[chosen]
    # Likeliest first. If every row has a top-k, what is behind the largest k needs no order.
    num_sorted = int(draws.top_k.max()) if by_count.all() else V
    if num_sorted < V:
        x = np.partition(x, V - num_sorted, axis=1)[:, V - num_sorted :]
    ordered = np.sort(x, axis=1)[:, ::-1]
    places = np.where(by_count, draws.top_k, num_sorted) - 1
    kth = ordered[np.arange(len(ordered)), places]
    kept = np.maximum(floor[chosen], np.where(by_count, kth, -np.inf))
    if (draws.top_p < 1.0).any():
        kept = np.maximum(kept, _top_p_floor(ordered, kept, draws.top_p))
    floor[chosen] = kept
    return floor


def _top_p_floor(ordered: _Floats, floor: _Floats, top_p: _Floats) -> _Floats:
    """Return [R]: the smallest value that top-p keeps of those from ``floor`` on."""
    weights = np.exp(ordered - ordered[:, :1])
    weights *= ordered >= floor[:, None]
    sums = np.cumsum(weights, axis=1, dtype=np.float64)
    likelier = sums - weights
    wanted = top_p.astype(np.float64) * sums[:, -1]
    num_kept = np.maximum((likelier < wanted[:, None]).sum(axis=1), 1)
    smallest = ordered[np.arange(len(ordered)), num_kept - 1]
    return np.where(top_p < 1.0, smallest, np.float32(-np.inf))


def gumbel_noise_cpu(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The CPU path of the noise."""
    keys = noise_keys(seeds, positions)
    token_ids = np.arange(vocab_size, dtype=np.uint32)
    noise = np.empty((len(seeds), vocab_size), dtype=np.float32)
    for row in range(len(noise)):
        noise[row] = _noise_of(keys[:, row : row + 1], token_ids)
    return torch.from_numpy(noise)


def noise_keys(seeds: Tensor, positions: Tensor) -> _Words:
    """The two keys of each draw, [2, B]; see ``noise_bits_reference``."""
    words = seeds.numpy().view(np.uint64)
    low, high = words.astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)
    place = positions.numpy().astype(np.uint32)
    keys = np.stack((place ^ np.uint32(0x3C6EF372), low ^ np.uint32(0xA54FF53A)))
    keys = _mix(keys)
    keys ^= np.stack((low, high))
    keys = _mix(keys)
    keys ^= np.stack((high, place))
    return _mix(keys)


def _mix(x: _Words) -> _Words:
    """Mix in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def _noise_of(keys: _Words, token_ids: _Words) -> _Floats:
    """The noise of each token id, under the keys [2, 1] or [2, len(token_ids)]."""
    x = token_ids * np.uint32(0x9E3779B9)
    x += keys[0]
    x = _mix(x)
    x ^= keys[1]
    x = _mix(x)
    x >>= np.uint32(8)
    x |= np.uint32(1)
    u = x.astype(np.float32)
    u *= np.float32(2.0**-24)
    np.log(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)
