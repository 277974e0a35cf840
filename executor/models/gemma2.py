"""Gemma 2: norms on both sides of each branch, soft caps, every other layer with a window.

Shapes: T packed tokens, S rows whose logits are wanted, H hidden size, V vocabulary.
Source: Gemma team, arXiv:2408.00118.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.layers.attention import Attention
from executor.layers.decoder import SandwichNormBlock
from executor.layers.embedding import LMHead, VocabParallelEmbedding
from executor.layers.layernorm import RMSNorm
from executor.layers.linear import LayerFactory
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import LayerRotary
from executor.model_config import ModelShape
from executor.models.interface import QKV_AND_GATE_UP, CheckpointNames, PackedModules, specs_of
from ipc.errors import ConfigError


class Gemma2ForCausalLM(nn.Module):
    """Sandwich-norm decoder with soft-capped attention and logits."""

    packed_modules: ClassVar[PackedModules] = QKV_AND_GATE_UP
    checkpoint_names: ClassVar[CheckpointNames] = CheckpointNames()

    def __init__(self, shape: ModelShape, factory: LayerFactory) -> None:
        super().__init__()
        if shape.hf_config.get("use_bidirectional_attention"):
            raise ConfigError("Gemma with use_bidirectional_attention is not supported")
        self.embed_tokens = VocabParallelEmbedding(shape.vocab_size, shape.hidden_size, factory)
        # Rounded to the model's dtype first, as the reference does: in bfloat16 it matters.
        self.embed_scale = float(
            torch.tensor(shape.hidden_size**0.5, device="cpu").to(factory.dtype)
        )
        self.layers = nn.ModuleList(
            _block(shape, layer, factory) for layer in range(shape.num_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps, factory, weight_offset=1.0)
        tied = self.embed_tokens if shape.tie_word_embeddings else None
        self.lm_head = LMHead(shape.vocab_size, shape.hidden_size, factory, tied_to=tied)
        self.final_soft_cap = shape.final_soft_cap
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
        stream = (self.embed_tokens(token_ids) * self.embed_scale, None)
        for layer, layer_rotary, kv_cache in zip(self.layers, rotary, kv_caches, strict=True):
            stream = layer(stream, layer_rotary, kv_cache, meta)
        return self.norm.add(*stream)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32, bent into (-cap, cap) where the config has a cap."""
        logits = self.lm_head(hidden)
        if self.final_soft_cap is None:
            return logits
        return torch.tanh(logits / self.final_soft_cap) * self.final_soft_cap

    def kv_cache_specs(self) -> list[KVCacheSpec]:
        """What each layer keeps per token on this rank."""
        return specs_of(self)


def _block(shape: ModelShape, layer: int, factory: LayerFactory) -> SandwichNormBlock:
    bias = shape.attention_bias
    attention = Attention(shape, layer, factory, qkv_bias=bias, output_bias=bias)
    mlp = GatedMLP(shape.hidden_size, shape.intermediate_size, shape.activation, factory)
    return SandwichNormBlock(shape, attention, mlp, factory)
