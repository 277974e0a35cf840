"""What attention must know about a step, and where a layer's keys and values live.

Records only. The input batch makes one ``AttentionMetadata`` per step; the KV cache owner makes one
``LayerKVCache`` per layer; models pass both down as arguments, so there is no forward context.
Shapes: T packed tokens, B requests, M blocks per request, K key/value heads here, D head size.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kernels.attention_step import StepMemo


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's packing. The tensors are on the model's device; padding is at the end.

    The queries of request b are rows ``query_start_loc[b]`` to ``query_start_loc[b + 1]``; the last
    of them sits at position ``seq_lens[b] - 1``. Padded tokens carry a slot of the null block 0.
    """

    slot_mapping: Tensor  # [T] int64: block_id * block_size + offset, where each token's KV goes
    block_table: Tensor  # [B, M] int32; entries past a request's length are never read
    query_start_loc: Tensor  # [B + 1] int32: prefix sums of new tokens
    seq_lens: Tensor  # [B] int32: total length after this step
    max_query_len: int
    max_seq_len: int
    memo: StepMemo = field(default_factory=StepMemo)  # what the layers share


class LayerKVCache(NamedTuple):
    """One layer's blocks, written in place by that layer."""

    key: Tensor  # [num_blocks, block_size, K, D]
    value: Tensor  # [num_blocks, block_size, K, D]


class KVCacheSpec(NamedTuple):
    """What one layer keeps per token on this rank."""

    num_kv_heads: int
    head_dim: int
