"""The CPU path of ``paged_attention``, which holds the definition that this is tested against.

A request attends to exactly the keys that it sees. Where one query is left, the keys are padded to
a width that depends on their number alone, so that requests of the same width share a call, and a
result still does not depend on batch mates. The padding repeats a key of the request itself, with
no weight, so whatever an earlier owner left in a block cannot spread. What all layers of a step
need to know is worked out once.

bfloat16 is the fast form. Requests with one query attend in one compiled call, key after key, which
reads nothing but a request's own keys. Where that is not to be had, keys are gathered by whole
blocks, which takes half as long as key by key; so what lies beside a request's own keys must be
finite there, which the cache's owner sees to (a row with NaN is scrubbed when it leaves; overflow
needs 3e38 in bfloat16). And requests of different widths share a call where that is cheaper than
two: there, unlike in float32, a wider padding was never seen to change a bit of the result.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels import cpu_library
from kernels.attention_step import Options, Step, StepMemo

# Of keys, and as much of values, gathered at a time: so they are still in a core's cache when used.
_GATHER_BYTES = 1 << 20
# So many more padded keys cost as much as one more call (50 us against 0.08 us a key, two heads).
_KEYS_PER_CALL = 512

_Caches = tuple[Tensor, Tensor]
_Ints = NDArray[np.int64]


class _Run(NamedTuple):
    """Decoding requests that attend in one call, their keys padded to the same width."""

    places: Tensor  # [R * width / unit] int64: the keys' slots or blocks in the cache
    unit: int  # keys at a place: 1, or the cache's block size
    mask: Tensor  # [R, 1, 1, width] in the queries' dtype: 0, or -inf for padding


class _Reach(NamedTuple):
    """The keys of a request with one query."""

    request: int  # row of the block table
    starts_at: int  # position of the first key that is gathered
    hidden: int  # keys gathered before the first that is seen
    seen: int  # keys gathered up to the last that is seen


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
    if _is_compiled(q, key_cache):
        return _attend_compiled(q, caches, step, options)
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


def _is_compiled(q: Tensor, key_cache: Tensor) -> bool:
    K, D = key_cache.shape[2:]
    fits = D <= cpu_library.MAX_HEAD_DIM and q.shape[1] <= cpu_library.MAX_GROUP * K
    return fits and cpu_library.library_for(q) is not None


def _attend_compiled(q: Tensor, caches: _Caches, step: Step, options: Options) -> Tensor:
    """All requests of one query in a call, those of several by torch's attention."""
    block_table, query_start_loc, seq_lens, max_query_len, _ = step
    library = cpu_library.load()
    assert library is not None, "_is_compiled said so"
    _, block_size, K, D = caches[0].shape
    N, B = q.shape[1], seq_lens.shape[0]
    out = torch.zeros(q.shape, dtype=q.dtype)  # rows of no request, or of one without keys
    library.decode_attention(
        q.data_ptr(),
        q.stride(0),
        caches[0].data_ptr(),
        caches[1].data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        out.data_ptr(),
        B,
        N,
        K,
        D,
        block_size,
        options.sliding_window or 0,
        options.scale,
        options.soft_cap or 0.0,
        torch.get_num_threads(),
    )
    if max_query_len > 1:
        starts, lens = query_start_loc.tolist(), seq_lens.tolist()
        for b, (start, end) in enumerate(pairwise(starts)):
            if end - start > 1 and lens[b] > 0:
                out[start:end] = _prefill(q[start:end], caches, block_table[b], lens[b], options)
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
    """Plain Python: a batch has few requests, and a call of numpy costs as much as ten of them."""
    starts, lens = step.query_start_loc.tolist(), step.seq_lens.tolist()
    decoding: list[int] = []
    prefills = []
    for b, seq_len in enumerate(lens):
        num_queries = starts[b + 1] - starts[b] if seq_len > 0 else 0
        if num_queries == 1:
            decoding.append(b)
        elif num_queries > 1:
            prefills.append(_Prefill(b, slice(starts[b], starts[b + 1]), seq_len))
    if not decoding:
        return _Plan([], None, prefills)
    unit = block_size if q.dtype == torch.bfloat16 else 1  # keys gathered together
    reaches = [_reach(b, lens[b], window, unit) for b in decoding]
    widths = [_pad_width(reach.seen) for reach in reaches]
    if unit > 1:
        widths = _merge_widths(widths)
    order = sorted(range(len(widths)), key=widths.__getitem__)
    block_table = step.block_table.numpy()
    runs = []
    for width, few in _cut_runs([widths[i] for i in order], [reaches[i] for i in order], max_keys):
        places, mask = _place_keys(few, width, block_table, block_size, unit)
        runs.append(_Run(torch.from_numpy(places), unit, torch.from_numpy(mask).to(q.dtype)))
    rows = [starts[decoding[i]] for i in order]
    in_order = rows == list(range(q.shape[0]))
    return _Plan(runs, None if in_order else torch.tensor(rows), prefills)


def _reach(request: int, seq_len: int, window: int | None, unit: int) -> _Reach:
    """Which keys to gather for one query, from a multiple of ``unit`` on."""
    first = 0 if window is None else max(0, seq_len - window)
    starts_at = first - first % unit
    return _Reach(request, starts_at, first - starts_at, seq_len - starts_at)


def _place_keys(
    few: list[_Reach], width: int, block_table: _Ints, block_size: int, unit: int
) -> tuple[_Ints, NDArray[np.float32]]:
    """Where the keys of a run are, in units [R * width / unit], and their mask [R, 1, 1, width].

    Padding repeats the last unit.
    """
    request, starts_at, hidden, seen = np.array(few, dtype=np.int64).T[:, :, None]
    numbers = np.minimum(np.arange(width // unit), (seen - 1) // unit) + starts_at // unit
    if unit == 1:
        slots = block_table[request, numbers // block_size] * np.int64(block_size)
        places = slots + numbers % block_size
    else:
        places = block_table[request, numbers].astype(np.int64)
    columns = np.arange(width)
    is_seen = (columns < seen) & (columns >= hidden)
    mask = np.where(is_seen, np.float32(0), np.float32(-np.inf))
    return places.reshape(-1), mask[:, None, None]


def _pad_width(seen: int) -> int:
    """Few widths, so that many requests share one, and at most an eighth more from 512 keys on."""
    unit = 64 if seen <= 512 else 128 if seen <= 1024 else 256
    return -(-seen // unit) * unit


def _merge_widths(widths: list[int]) -> list[int]:
    """Raise widths to a wider one where the padding costs less than a call of their own."""
    distinct = sorted(set(widths), reverse=True)
    if len(distinct) == 1:
        return widths
    target = distinct[0]
    targets = {target: target}
    for width in distinct[1:]:
        if (target - width) * widths.count(width) > _KEYS_PER_CALL:
            target = width
        targets[width] = target
    return [targets[width] for width in widths]


def _cut_runs(
    widths: list[int], reaches: list[_Reach], max_keys: int
) -> Iterator[tuple[int, list[_Reach]]]:
    """Cut requests, sorted by width, into runs of one width and at most ``max_keys`` in all."""
    start = 0
    while start < len(widths):
        width = widths[start]
        end = min(bisect_right(widths, width), start + max(1, max_keys // width))
        yield width, reaches[start:end]
        start = end


def _decode(q: Tensor, caches: _Caches, runs: list[_Run], options: Options) -> Tensor:
    """Attend one query of each request, in the order of the runs: q and the result are [R, N, D].

    The query heads of one key head stand as so many queries: the fused kernel is slow with one.
    """
    K, D = caches[0].shape[2:]
    queries = q.view(q.shape[0], K, -1, D)
    outs = []
    start = 0
    keys, values = caches
    for places, unit, mask in runs:
        shape = (mask.shape[0], mask.shape[-1], K, D)
        if unit == 1:
            keys, values = keys.view(-1, K, D), values.view(-1, K, D)
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
