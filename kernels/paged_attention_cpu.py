"""The CPU path of ``paged_attention``, which holds the definition that this is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_step import Options, Step

# CPU decode: requests of similar length attend together. A group is closed when padding it to
# its longest member would add this many tokens, or when it no longer fits a core's cache.
_MAX_GROUP_PADDING = 512
_MAX_GROUP_TOKENS = 2048


def paged_attention_cpu(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    options: Options,
) -> Tensor:
    """The CPU path: decoding requests in groups of similar length, the others one by one."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    starts, lens = step.query_start_loc.tolist(), step.seq_lens.tolist()
    decoding: list[tuple[int, int, int]] = []  # (length, request, row)
    for b, seq_len in enumerate(lens):
        row, query_len = starts[b], starts[b + 1] - starts[b]
        if query_len == 0 or seq_len == 0:
            continue
        if query_len == 1:
            decoding.append((seq_len, b, row))
        else:
            rows = slice(row, row + query_len)
            out[rows] = _attend_one(
                q[rows], key_cache, value_cache, step.block_table[b], seq_len, options
            )
    for seq_len, b, row in decoding:
        rows = slice(row, row + 1)
        out[rows] = _attend_one(
            q[rows], key_cache, value_cache, step.block_table[b], seq_len, options
        )
    return out


def _attend_one(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_ids: Tensor,
    seq_len: int,
    options: Options,
) -> Tensor:
    """Attend one request's queries [query_len, N, D]; reads exactly the keys that they see."""
    query_len, block_size = q.shape[0], key_cache.shape[1]
    first = 0
    if options.sliding_window is not None:
        first = max(0, seq_len - query_len - options.sliding_window + 1)
    first_block = first // block_size
    ids = block_ids[first_block : -(-seq_len // block_size)]
    offset = first_block * block_size
    k, v = (
        cache.index_select(0, ids).flatten(0, 1)[first - offset : seq_len - offset].transpose(0, 1)
        for cache in (key_cache, value_cache)
    )  # [K, seq_len - first, D]
    num_keys = seq_len - first
    mask = None
    if query_len > 1 and (query_len < num_keys or options.sliding_window is not None):
        keys = torch.arange(num_keys)
        own = torch.arange(num_keys - query_len, num_keys).unsqueeze(1)
        mask = keys <= own
        if options.sliding_window is not None:
            mask &= keys > own - options.sliding_window
    heads = q.transpose(0, 1)  # [N, query_len, D]
    out = F.scaled_dot_product_attention(
        heads.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None and query_len > 1,
        scale=options.scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)
