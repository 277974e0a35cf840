"""The threshold of a row's filters, found by reading the whole row again and again.

For rows whose filters keep too many tokens to look at them one by one; see ``sampling_filters``.
Every threshold is the smallest value whose larger ones are fewer than k, or weigh less than a
wanted mass. The search is on the bits of floats, which as integers have the floats' order: three
values are tried in each reading, so one in four of the candidates is left.
Shapes: V vocabulary.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.0e38)  # stands for +inf where that would make inf - inf


@triton.jit
def key_of(x):  # type: ignore[no-untyped-def]
    """Integers in the order of floats; the two zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):  # type: ignore[no-untyped-def]
    """The float of a key, which may come as int64."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _amounts_above(  # type: ignore[no-untyped-def]
    row_ptr, V, scale, largest, first, second, third, BY_WEIGHT: tl.constexpr, LANES: tl.constexpr
):
    """How many x of a row exceed each of three values, or the sum of their exp(x - largest)."""
    # A thread loads 8 times before it needs the first: one program must read a row fast.
    cols = tl.arange(0, 8)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    above_first = tl.zeros((LANES,), tl.float32)
    above_second = tl.zeros((LANES,), tl.float32)
    above_third = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, 8 * LANES):
        x = tl.load(row_ptr + start + cols, start + cols < V, other=float("-inf")) * scale
        amount = tl.exp(x - largest) if BY_WEIGHT else tl.full((8, LANES), 1.0, tl.float32)
        above_first += tl.sum(tl.where(x > first, amount, 0.0), axis=0)
        above_second += tl.sum(tl.where(x > second, amount, 0.0), axis=0)
        above_third += tl.sum(tl.where(x > third, amount, 0.0), axis=0)
    return (
        tl.sum(above_first.to(tl.float64), axis=0),
        tl.sum(above_second.to(tl.float64), axis=0),
        tl.sum(above_third.to(tl.float64), axis=0),
    )


@triton.jit
def _smallest_kept(  # type: ignore[no-untyped-def]
    row_ptr, V, scale, lowest, largest, wanted, BY_WEIGHT: tl.constexpr, LANES: tl.constexpr
):
    """The smallest value, from ``lowest`` to ``largest``, above which is less than ``wanted``."""
    low = key_of(lowest).to(tl.int64)
    high = key_of(largest).to(tl.int64)
    while low < high:
        width = high - low
        first = low + (width >> 2)
        second = low + (width >> 1)
        third = high - 1 - (width >> 2)
        third = tl.maximum(third, second)
        amounts = _amounts_above(
            row_ptr,
            V,
            scale,
            largest,
            value_of(first),
            value_of(second),
            value_of(third),
            BY_WEIGHT,
            LANES,
        )
        if amounts[0] < wanted:
            high = first
        elif amounts[1] < wanted:
            low = first + 1
            high = second
        elif amounts[2] < wanted:
            low = second + 1
            high = third
        else:
            low = third + 1
    return value_of(low)


@triton.jit
def row_threshold(  # type: ignore[no-untyped-def]
    row_ptr,
    V,
    scale,
    least,
    largest,
    mass,
    by_count,
    by_mass,
    top_k,
    top_p,
    LANES: tl.constexpr,
):
    """The smallest x that a row's filters keep.

    Args:
        row_ptr: logits; x is their product with ``scale``.
        least: what min-p keeps, -inf without it.
        largest: the largest x.
        mass: the sum of exp(x - largest).
    """
    largest = tl.minimum(largest, LARGEST)
    threshold = least
    if by_count:
        threshold = _smallest_kept(
            row_ptr, V, scale, least, largest, top_k.to(tl.float64), False, LANES
        )
        threshold = tl.maximum(threshold, least)
    if by_mass:
        if threshold > float("-inf"):
            below = value_of(key_of(threshold) - 1)
            mass, _, _ = _amounts_above(
                row_ptr, V, scale, largest, below, below, below, True, LANES
            )
        # What lies below this cannot make up for what top-p leaves out, were it all of V.
        spared = tl.log(tl.maximum((1.0 - top_p) * (mass / V).to(tl.float32), 1e-37))
        lowest = tl.maximum(threshold, largest + spared - 0.01)
        threshold = _smallest_kept(
            row_ptr, V, scale, tl.minimum(lowest, largest), largest, top_p * mass, True, LANES
        )
    return tl.minimum(threshold, LARGEST)
