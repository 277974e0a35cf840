"""Phi-3 and Phi-4-mini: the Llama architecture, its checkpoints fused already.

qkv_proj and gate_up_proj arrive as one tensor each, in our order, so nothing is renamed. Rotation
may cover a part of a head, and long contexts use longrope (see layers/rotary.py).

Shapes: T packed tokens, S rows whose logits are wanted, H hidden size, V vocabulary.
Source: Abdin et al., arXiv:2404.14219.
"""

from typing import ClassVar

from torch import Tensor, nn

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.layers.attention import Attention
from executor.layers.decoder import PreNormBlock
from executor.layers.embedding import LMHead, VocabParallelEmbedding
from executor.layers.layernorm import RMSNorm
from executor.layers.linear import LayerFactory
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import LayerRotary
from executor.model_config import ModelShape
from executor.models.interface import (
    QKV_AND_GATE_UP,
    CheckpointNames,
    PackedModules,
    specs_of,
)


class Phi3ForCausalLM(nn.Module):
    """Pre-norm decoder without biases; partial rotary positions."""

    packed_modules: ClassVar[PackedModules] = QKV_AND_GATE_UP
    checkpoint_names: ClassVar[CheckpointNames] = CheckpointNames()

    def __init__(self, shape: ModelShape, factory: LayerFactory) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(shape.vocab_size, shape.hidden_size, factory)
        self.layers = nn.ModuleList(
            _block(shape, layer, factory) for layer in range(shape.num_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps, factory)
        self.lm_head = LMHead(
            shape.vocab_size,
            shape.hidden_size,
            factory,
            tied_to=self.embed_tokens if shape.tie_word_embeddings else None,
        )
        self.rotary = LayerRotary(shape.ropes, shape.max_model_len)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: list[LayerKVCache],
        meta: AttentionMetadata,
    ) -> Tensor:
        """[T] and [T] -> final hidden states [T, H]."""
        rotary = self.rotary(positions)
        stream = (self.embed_tokens(token_ids), None)
        for layer, layer_rotary, kv_cache in zip(self.layers, rotary, kv_caches, strict=True):
            stream = layer(stream, layer_rotary, kv_cache, meta)
        return self.norm.add(*stream)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32."""
        return self.lm_head(hidden)

    def kv_cache_specs(self) -> list[KVCacheSpec]:
        """What each layer keeps per token on this rank."""
        return specs_of(self)


def _block(shape: ModelShape, layer: int, factory: LayerFactory) -> PreNormBlock:
    attention = Attention(shape, layer, factory)
    mlp = GatedMLP(shape.hidden_size, shape.intermediate_size, shape.activation, factory)
    return PreNormBlock(shape, attention, mlp, factory)
