"""The CPU path of ``paged_attention``, which holds the definition that this is tested against.

A request attends to exactly the keys that it sees. Where one query is left, the keys are padded to
a width that depends on their number alone, so that requests of the same width share a call, and a
result still does not depend on batch mates. The padding repeats a key of the request itself, with
no weight, so whatever an earlier owner left in a block cannot spread. What all layers of a step
need to know is worked out once.

bfloat16 is the fast form. Keys are gathered by whole blocks, which takes half as long as key by
key; so what lies beside a request's own keys must be finite there, which the cache's owner sees to
(a row with NaN is scrubbed when it leaves; overflow needs 3e38 in bfloat16). And requests of
different widths share a call where that is cheaper than two: there, unlike in float32, a wider
padding was never seen to change a bit of the result.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_step import Options, Step, StepMemo

# Of keys, and as much of values, gathered at a time: so they are still in a core's cache when used.
_GATHER_BYTES = 1 << 20
# So many more padded keys cost as much as one more call (50 us against 0.08 us a key, two heads).
_KEYS_PER_CALL = 512

_Caches = tuple[Tensor, Tensor]
_Ints = NDArray[np.int64]


class _Run(NamedTuple):
    """Decoding requests that attend in one call, their keys padded to the same width."""

    places: Tensor  # int64: the keys' slots [R * width], or their blocks [R * width / block_size]
    block_size: int  # keys at a place: 1, or the cache's block size
    mask: Tensor  # [R, 1, 1, width] in the queries' dtype: 0, or -inf for padding


class _Decoding(NamedTuple):
    """Requests with one query, sorted by padded width; all [R]."""

    requests: _Ints  # rows of the block table
    hidden: _Ints  # keys gathered before the first that is seen
    seen: _Ints  # keys gathered up to the last that is seen
    starts_at: _Ints  # position of the first key that is gathered


class _Prefill(NamedTuple):
    """A request with several queries."""

    request: int
    rows: slice
    seq_len: int


class _Plan(NamedTuple):
    """How a step's requests attend, the same in all layers of one window."""

    runs: list[_Run]
    rows: Tensor | None  # [R]: the queries of all runs; None where they are all, in order
    prefills: list[_Prefill]


def paged_attention_cpu(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    options: Options,
    memo: StepMemo | None = None,
) -> Tensor:
    """Return [T, N, D]; rows of no request are zeros."""
    caches = (key_cache, value_cache)
    plan = _plan_of(q, key_cache, step, options.sliding_window, memo)
    if plan.runs and plan.rows is None:
        return _decode(q, caches, plan.runs, options)
    out = torch.zeros(q.shape, dtype=q.dtype)
    for request, rows, seq_len in plan.prefills:
        out[rows] = _prefill(q[rows], caches, step.block_table[request], seq_len, options)
    if plan.rows is not None:
        decoded = _decode(q.index_select(0, plan.rows), caches, plan.runs, options)
        out.index_copy_(0, plan.rows, decoded)
    return out


def _plan_of(
    q: Tensor, key_cache: Tensor, step: Step, window: int | None, memo: StepMemo | None
) -> _Plan:
    """The plan that another layer of the step made, or a new one."""
    block_size, K, D = key_cache.shape[1:]
    max_keys = max(1, _GATHER_BYTES // (K * D * q.element_size()))
    if memo is None:
        return _make_plan(q, step, window, block_size, max_keys)
    key = (window, block_size, max_keys)
    plan = memo.entries.get(key)
    if plan is None:
        plan = memo.entries[key] = _make_plan(q, step, window, block_size, max_keys)
    return plan


def _make_plan(q: Tensor, step: Step, window: int | None, block_size: int, max_keys: int) -> _Plan:
    starts, lens = step.query_start_loc.numpy().astype(np.int64), step.seq_lens.numpy()
    num_queries = np.where(lens > 0, np.diff(starts), 0)
    prefills = [
        _Prefill(b, slice(int(starts[b]), int(starts[b + 1])), int(lens[b]))
        for b in np.flatnonzero(num_queries > 1).tolist()
    ]
    decoding = np.flatnonzero(num_queries == 1)
    if not decoding.size:
        return _Plan([], None, prefills)
    by_block = q.dtype == torch.bfloat16
    seen = lens[decoding].astype(np.int64)
    firsts = np.zeros_like(seen) if window is None else np.maximum(seen - window, 0)
    starts_at = firsts - firsts % block_size if by_block else firsts
    seen -= starts_at
    widths = _pad_widths(seen)
    order = np.argsort(widths, kind="stable")
    decoding, widths = decoding[order], widths[order]
    requests = _Decoding(decoding, firsts[order] - starts_at[order], seen[order], starts_at[order])
    block_table = step.block_table.numpy()
    runs = []
    for start, end in _cut_runs(_merge_widths(widths) if by_block else widths, max_keys):
        few = _Decoding(*(column[start:end] for column in requests))
        width = int(widths[end - 1])
        find = _blocks_of if by_block else _slots_of
        places = torch.from_numpy(find(few, width, block_table, block_size).reshape(-1))
        mask = torch.from_numpy(_mask_of(few, width))[:, None, None].to(q.dtype)
        runs.append(_Run(places, block_size if by_block else 1, mask))
    rows = starts[decoding]
    in_order = rows.size == q.shape[0] and bool((rows == np.arange(rows.size)).all())
    return _Plan(runs, None if in_order else torch.from_numpy(rows), prefills)


def _slots_of(few: _Decoding, width: int, block_table: _Ints, block_size: int) -> _Ints:
    """[R, width]: the slot of each key; padding repeats the last."""
    positions = few.starts_at[:, None] + np.minimum(np.arange(width), few.seen[:, None] - 1)
    slots: _Ints = block_table[few.requests[:, None], positions // block_size] * np.int64(
        block_size
    )
    return slots + positions % block_size


def _blocks_of(few: _Decoding, width: int, block_table: _Ints, block_size: int) -> _Ints:
    """[R, width / block_size]: the block of so many keys; padding repeats the last."""
    lasts = (few.seen[:, None] - 1) // block_size
    numbers = np.minimum(np.arange(width // block_size), lasts)
    first_numbers = few.starts_at[:, None] // block_size
    return block_table[few.requests[:, None], first_numbers + numbers].astype(np.int64)


def _mask_of(few: _Decoding, width: int) -> NDArray[np.float32]:
    """[R, width]: 0 where a request sees the key, else -inf."""
    places = np.arange(width)
    is_seen = (places < few.seen[:, None]) & (places >= few.hidden[:, None])
    return np.where(is_seen, np.float32(0), np.float32(-np.inf))


def _pad_widths(seen: _Ints) -> _Ints:
    """Few widths, so that many requests share one, and at most an eighth more from 512 keys on."""
    unit = np.where(seen <= 512, 64, np.where(seen <= 1024, 128, 256))
    return -(-seen // unit) * unit


def _merge_widths(widths: _Ints) -> _Ints:
    """Raise sorted widths to a wider one where the padding costs less than a call of their own."""
    merged = widths.copy()
    values, firsts, counts = np.unique(widths, return_index=True, return_counts=True)
    target = values[-1]
    for value, first, count in list(zip(values, firsts, counts, strict=True))[-2::-1]:
        if (target - value) * count <= _KEYS_PER_CALL:
            merged[first : first + count] = target
        else:
            target = value
    return merged


def _cut_runs(widths: _Ints, max_keys: int) -> Iterator[tuple[int, int]]:
    """Cut sorted widths into runs [start, end) of one width and at most ``max_keys`` in all."""
    for width in np.unique(widths).tolist():
        first, last = np.searchsorted(widths, (width, width + 1)).tolist()
        count = max(1, max_keys // width)
        for start in range(first, last, count):
            yield start, min(start + count, last)


def _decode(q: Tensor, caches: _Caches, runs: list[_Run], options: Options) -> Tensor:
    """Attend one query of each request, in the order of the runs: q and the result are [R, N, D].

    The query heads of one key head stand as so many queries: the fused kernel is slow with one.
    """
    K, D = caches[0].shape[2:]
    queries = q.view(q.shape[0], K, -1, D)
    outs = []
    start = 0
    for places, block_size, mask in runs:
        shape = (mask.shape[0], mask.shape[-1], K, D)
        keys, values = (cache.view(-1, block_size * K * D) for cache in caches)
        k = keys.index_select(0, places).view(shape).transpose(1, 2)
        v = values.index_select(0, places).view(shape).transpose(1, 2)
        end = start + shape[0]
        outs.append(_weigh_run(queries[start:end], k, v, mask, options))
        start = end
    return (torch.cat(outs) if len(outs) > 1 else outs[0]).view(q.shape)


def _weigh_run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: Options) -> Tensor:
    """Attention of q [R, K, G, D] to k and v [R, K, width, D]."""
    if options.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
    seen = mask == 0
    outs = [  # products of a batch may round by its size, so each request has its own
        _weigh(q[i : i + 1], k[i : i + 1], v[i : i + 1], seen[i], is_causal=False, options=options)
        for i in range(q.shape[0])
    ]
    return torch.cat(outs)


def _prefill(
    q: Tensor, caches: _Caches, block_ids: Tensor, seq_len: int, options: Options
) -> Tensor:
    """Attend one request's queries [Q, N, D], Q > 1."""
    Q = q.shape[0]
    block_size, K, D = caches[0].shape[1:]
    window = options.sliding_window
    first = 0 if window is None else max(0, seq_len - Q - window + 1)
    first_block = first // block_size
    ids = block_ids[first_block : -(-seq_len // block_size)]
    skipped = first_block * block_size
    k, v = (
        cache.index_select(0, ids)
        .view(1, -1, K, D)[:, first - skipped : seq_len - skipped]
        .transpose(1, 2)
        for cache in caches
    )  # [1, K, L, D]
    L = seq_len - first
    seen = None
    if Q < L or (window is not None and window < L):
        positions = torch.arange(L)
        own = positions[L - Q :].unsqueeze(1)
        seen = positions <= own
        if window is not None:
            seen.logical_and_(positions > own - window)
    heads = q.transpose(0, 1).unsqueeze(0)  # [1, N, Q, D]
    return _weigh(heads, k, v, seen, is_causal=seen is None, options=options)[0].transpose(0, 1)


def _weigh(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, is_causal: bool, options: Options
) -> Tensor:
    """Attention of q [B, n, Q, D] to k and v [B, K, L, D], n a multiple of K."""
    if options.soft_cap is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=is_causal,
            scale=options.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    if is_causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril_()
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    scores = (q.float() * options.scale) @ k.transpose(2, 3)
    scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    return (scores.softmax(dim=-1) @ v).to(q.dtype)
