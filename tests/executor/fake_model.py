"""A model small enough to be computed by hand, with the interface of a real one.

Its hidden state at a position is the token there and the sum of all tokens up to it, read back
from the paged cache: so a wrong slot, position or block table changes the output. The next token
is ``(7 * token + sum + position) % vocab_size``.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.models.interface import CheckpointNames, PackedModules
from tests.executor.configs import VOCAB_SIZE


def next_token(token_ids: list[int], vocab_size: int = VOCAB_SIZE) -> int:
    """What the fake model's greedy choice is after these tokens."""
    return (7 * token_ids[-1] + sum(token_ids) + len(token_ids) - 1) % vocab_size


class FakeModel(nn.Module):
    """Keys hold the token ids, values their positions; logits peak at ``next_token``."""

    packed_modules: ClassVar[PackedModules] = {}
    checkpoint_names: ClassVar[CheckpointNames] = CheckpointNames()

    def __init__(self, vocab_size: int = VOCAB_SIZE, nan_token: int | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.nan_token = nan_token  # a row that ends with it gets NaN logits
        self.weight = nn.Parameter(torch.ones(8))

    def kv_cache_specs(self) -> list[KVCacheSpec]:
        return [KVCacheSpec(num_kv_heads=1, head_dim=2), KVCacheSpec(num_kv_heads=1, head_dim=2)]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: list[LayerKVCache],
        meta: AttentionMetadata,
    ) -> Tensor:
        for layer in kv_caches:
            for cache, values in ((layer.key, token_ids), (layer.value, positions)):
                cache.view(-1, 1, 2)[meta.slot_mapping] = values.view(-1, 1, 1).to(cache.dtype)
        hidden = torch.zeros(token_ids.shape[0], 3)
        starts = meta.query_start_loc.tolist()
        for b, seq_len in enumerate(meta.seq_lens.tolist()):
            last = kv_caches[-1]
            blocks = meta.block_table[b].long()
            keys = last.key[blocks].flatten(0, 1)[:seq_len, 0, 1]
            stored = last.value[blocks].flatten(0, 1)[:seq_len, 0, 1]
            if blocks.any():  # else a warm-up row: all its slots are the null block's
                assert stored.tolist() == list(range(seq_len)), "the cache holds other positions"
            sums = keys.cumsum(0)
            first = seq_len - (starts[b + 1] - starts[b])
            rows = slice(starts[b], starts[b + 1])
            hidden[rows, 0] = token_ids[rows].float()
            hidden[rows, 1] = sums[first:]
            hidden[rows, 2] = positions[rows].float()
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        peaks = (7 * hidden[:, 0] + hidden[:, 1] + hidden[:, 2]).long() % self.vocab_size
        distance = (torch.arange(self.vocab_size) - peaks.unsqueeze(1)).abs()
        logits = 5.0 - 0.1 * distance.float()
        if self.nan_token is not None:
            logits[hidden[:, 0] == self.nan_token, 3] = torch.nan
        return logits
