"""The CPU path of ``paged_attention``, which holds the definition that this is tested against.

Each request attends alone, over exactly the keys that it sees: nothing is padded or masked that
need not be, so a result does not depend on batch mates, and whatever an earlier owner left in a
block cannot spread. What is shared between decoding requests is the bookkeeping: their keys are
gathered many at a time, as many as stay in a core's cache until they are used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_step import Options, Step

_GATHER_BYTES = 1 << 18  # of keys, and as much of values: half of a typical second-level cache

_Caches = tuple[Tensor, Tensor]


def paged_attention_cpu(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, step: Step, options: Options
) -> Tensor:
    """Return [T, N, D]; rows of no request are zeros."""
    caches = (key_cache, value_cache)
    starts, lens = step.query_start_loc.tolist(), step.seq_lens.tolist()
    if step.max_query_len == 1 and 0 < starts[-1] == len(lens) == len(q) and 0 not in lens:
        return _decode(q, caches, step.block_table, lens, options)
    out = torch.zeros(q.shape, dtype=q.dtype)
    decoding = []
    for b, seq_len in enumerate(lens):
        row, end = starts[b], starts[b + 1]
        if end == row or seq_len == 0:
            continue
        if end == row + 1:
            decoding.append(b)
        else:
            out[row:end] = _prefill(q[row:end], caches, step.block_table[b], seq_len, options)
    if decoding:
        requests = torch.tensor(decoding)
        rows = step.query_start_loc.index_select(0, requests)
        block_table = step.block_table.index_select(0, requests)
        decode_lens = [lens[b] for b in decoding]
        out[rows] = _decode(q.index_select(0, rows), caches, block_table, decode_lens, options)
    return out


def _decode(
    q: Tensor, caches: _Caches, block_table: Tensor, lens: list[int], options: Options
) -> Tensor:
    """Attend one query of each request: q and the result are [R, N, D], ``lens`` has no 0."""
    block_size, K, D = caches[0].shape[1:]
    window = options.sliding_window
    firsts = [0] * len(lens) if window is None else [max(0, n - window) for n in lens]
    # Each request's blocks from that of its first key to that of its last.
    spans = [(f // block_size, -(-n // block_size)) for f, n in zip(firsts, lens, strict=True)]
    block_ids = _pick_blocks(block_table, spans)
    max_blocks = max(1, _GATHER_BYTES // (block_size * K * D * q.element_size()))
    queries = q.view(len(lens), 1, K, -1, D).unbind(0)
    outs: list[Tensor] = []
    num_gathered = 0
    for start, end in _gathers(spans, max_blocks):
        sizes: list[int] = []  # of the pieces that a gather falls into: skipped, seen, unused
        for r in range(start, end):
            skipped = firsts[r] - spans[r][0] * block_size
            sizes += (skipped, lens[r] - firsts[r], spans[r][1] * block_size - lens[r])
        num_blocks = sum(sizes) // block_size
        ids = block_ids.narrow(0, num_gathered, num_blocks)
        num_gathered += num_blocks
        keys, values = (
            cache.index_select(0, ids).view(1, -1, K, D).transpose(1, 2).split_with_sizes(sizes, 2)
            for cache in caches
        )
        for i, r in enumerate(range(start, end)):
            k, v = keys[3 * i + 1], values[3 * i + 1]  # [1, K, seen, D]
            outs.append(_weigh(queries[r], k, v, None, is_causal=False, options=options))
    return (torch.cat(outs) if len(outs) > 1 else outs[0]).view(q.shape)


def _pick_blocks(block_table: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """The block ids of all spans, one request after the other."""
    if len(spans) == 1:
        return block_table[0, spans[0][0] : spans[0][1]]
    bounds = torch.tensor(spans)
    places = torch.arange(max(end for _, end in spans))
    wanted = (places >= bounds[:, :1]).logical_and_(places < bounds[:, 1:])
    return block_table[:, : len(places)].masked_select(wanted)


def _gathers(spans: list[tuple[int, int]], max_blocks: int) -> list[tuple[int, int]]:
    """Cut the requests into runs [start, end) of at most ``max_blocks``, or of one request."""
    cuts, held = [0], 0
    for r, (first, end) in enumerate(spans):
        if held and held + end - first > max_blocks:
            cuts.append(r)
            held = 0
        held += end - first
    return list(zip(cuts, [*cuts[1:], len(spans)], strict=True))


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
