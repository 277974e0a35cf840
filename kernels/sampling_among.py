"""The draw of a filtered row from the tokens that may pass its filters, listed in any order.

The list has everything that top-k keeps, or of top-p alone at least its mass; then what is kept
follows from the list. ``sampling_filters`` makes it.
"""

import triton
import triton.language as tl

from kernels.gumbel import noise_bits, noise_keys, noise_of
from kernels.sampling_threshold import key_of


@triton.jit
def _kth_key(keys, k, low, high):  # type: ignore[no-untyped-def]
    """The k-th largest of ``keys``, which lies within [low, high]; these are int64."""
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        is_low = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0) >= k
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle - 1)
    return low


@triton.jit
def _mass_key(keys, weights, wanted, low, high):  # type: ignore[no-untyped-def]
    """The smallest key whose larger ones weigh less than ``wanted``, within [low, high]."""
    while low < high:
        middle = low + ((high - low) >> 1)
        larger = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0.0), axis=0)
        is_kept = larger < wanted
        high = tl.where(is_kept, middle, high)
        low = tl.where(is_kept, low, middle + 1)
    return low


@triton.jit
def _draw_kept(x, is_kept, token_ids, seed, position):  # type: ignore[no-untyped-def]
    """The draw among tokens in any order."""
    key_a, key_b = noise_keys(seed, position)
    noisy = x + noise_of(noise_bits(key_a, key_b, token_ids))
    noisy = tl.where(is_kept, noisy, float("-inf"))
    winners = tl.where(noisy == tl.max(noisy, axis=0), token_ids, 0x7FFFFFFF)
    return tl.min(winners, axis=0)


@triton.jit
def draw_of_few(  # type: ignore[no-untyped-def]
    found_ptr,
    found_ids_ptr,
    num_found,
    seed,
    position,
    largest,
    mass,
    by_count,
    by_mass,
    needs_mass,
    top_k,
    top_p,
    FEW: tl.constexpr,
):
    """The draw, and whether there were enough tokens to know; each is compared with each."""
    i = tl.arange(0, FEW)
    x = tl.load(found_ptr + i, i < num_found, other=float("-inf"))
    token_ids = tl.load(found_ids_ptr + i, i < num_found, other=0)
    num_larger = tl.zeros((FEW,), tl.int32)
    mass_larger = tl.zeros((FEW,), tl.float64)
    for start in range(0, num_found, 16):
        j = start + tl.arange(0, 16)
        other = tl.load(found_ptr + j, j < num_found, other=float("-inf"))
        weights = tl.exp(other - largest).to(tl.float64)
        is_larger = other[None, :] > x[:, None]
        num_larger += tl.sum(is_larger.to(tl.int32), axis=1)
        mass_larger += tl.sum(tl.where(is_larger, weights[None, :], 0.0), axis=1)
    is_kept = i < num_found
    if by_count:
        is_kept = is_kept & (num_larger < top_k)
    weights = tl.where(is_kept, tl.exp(x - largest), 0.0).to(tl.float64)
    found_mass = tl.sum(weights, axis=0)
    if not needs_mass:
        mass = found_mass
    if by_mass:
        is_kept = is_kept & ((mass_larger < top_p * mass) | (num_larger == 0))
    token_id = _draw_kept(x, is_kept, token_ids, seed, position)
    return token_id, (not needs_mass) | (found_mass >= top_p * mass)


@triton.jit
def draw_of_many(  # type: ignore[no-untyped-def]
    found_ptr,
    found_ids_ptr,
    num_found,
    seed,
    position,
    largest,
    mass,
    by_count,
    by_mass,
    needs_mass,
    top_k,
    top_p,
    MAX_FOUND: tl.constexpr,
):
    """The same, by bisection on the bits of the threshold."""
    i = tl.arange(0, MAX_FOUND)
    x = tl.load(found_ptr + i, i < num_found, other=float("-inf"))
    token_ids = tl.load(found_ids_ptr + i, i < num_found, other=0)
    keys = key_of(x)
    low = tl.min(tl.where(i < num_found, keys, 0x7FFFFFFF), axis=0).to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64)
    if by_count & (top_k < num_found):
        low = _kth_key(keys, top_k, low, high)
    weights = tl.where(keys >= low.to(tl.int32), tl.exp(x - largest), 0.0).to(tl.float64)
    found_mass = tl.sum(weights, axis=0)
    if not needs_mass:
        mass = found_mass
    is_enough = (not needs_mass) | (found_mass >= top_p * mass)
    if by_mass & is_enough:
        low = _mass_key(keys, weights, top_p * mass, low, high)
    is_kept = (i < num_found) & (keys >= low.to(tl.int32))
    return _draw_kept(x, is_kept, token_ids, seed, position), is_enough
