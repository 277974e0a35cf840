"""GPT-2: learned positions, LayerNorm, tanh GELU, and weights stored [in, out].

Shapes: T packed tokens, S rows whose logits are wanted, H hidden size, V vocabulary.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.layers.attention import Attention
from executor.layers.embedding import LMHead, VocabParallelEmbedding
from executor.layers.layernorm import LayerNorm
from executor.layers.linear import LayerFactory
from executor.layers.mlp import MLP
from executor.model_config import ModelShape
from executor.models.interface import CheckpointNames, PackedModules, specs_of
from ipc.errors import ConfigError


class GPT2LMHeadModel(nn.Module):
    """Pre-norm decoder with learned positions and a tied head."""

    packed_modules: ClassVar[PackedModules] = {}  # c_attn holds q, k and v in our order
    checkpoint_names: ClassVar[CheckpointNames] = CheckpointNames(
        prefixes=("transformer.",),
        renamed=(
            ("attn.c_attn.", "attn.qkv_proj."),
            ("attn.c_proj.", "attn.o_proj."),
            ("mlp.c_fc.", "mlp.up_proj."),
            ("mlp.c_proj.", "mlp.down_proj."),
        ),
        # Causal masks that older checkpoints carry along.
        ignored=(".attn.bias", ".attn.masked_bias"),
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    )

    def __init__(self, shape: ModelShape, factory: LayerFactory) -> None:
        super().__init__()
        if shape.hf_config.get("add_cross_attention"):
            raise ConfigError("GPT-2 with cross-attention (an encoder-decoder) is not supported")
        self.wte = VocabParallelEmbedding(shape.vocab_size, shape.hidden_size, factory)
        self.wpe = nn.Embedding(
            shape.max_position_embeddings, shape.hidden_size, dtype=factory.dtype
        )
        self.h = nn.ModuleList(
            GPT2Block(shape, layer, factory) for layer in range(shape.num_layers)
        )
        self.ln_f = LayerNorm(shape.hidden_size, shape.norm_eps, factory)
        tied = self.wte if shape.tie_word_embeddings else None
        self.lm_head = LMHead(shape.vocab_size, shape.hidden_size, factory, tied_to=tied)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: list[LayerKVCache],
        meta: AttentionMetadata,
    ) -> Tensor:
        """[T] and [T] -> final hidden states [T, H]."""
        hidden = self.wte(token_ids) + F.embedding(positions, self.wpe.weight)
        for layer, kv_cache in zip(self.h, kv_caches, strict=True):
            hidden = layer(hidden, kv_cache, meta)
        return self.ln_f(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32."""
        return self.lm_head(hidden)

    def kv_cache_specs(self) -> list[KVCacheSpec]:
        """What each layer keeps per token on this rank."""
        return specs_of(self)


class GPT2Block(nn.Module):
    """Norm, attention, add; norm, feed-forward, add."""

    def __init__(self, shape: ModelShape, layer: int, factory: LayerFactory) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.hidden_size, shape.norm_eps, factory)
        self.attn = Attention(
            shape, layer, factory, qkv_bias=True, output_bias=True, scale=_scale(shape, layer)
        )
        self.ln_2 = LayerNorm(shape.hidden_size, shape.norm_eps, factory)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size, shape.activation, factory)

    def forward(self, hidden: Tensor, kv_cache: LayerKVCache, meta: AttentionMetadata) -> Tensor:
        """[T, H] -> [T, H]."""
        hidden = hidden + self.attn(self.ln_1(hidden), None, kv_cache, meta)
        return hidden + self.mlp(self.ln_2(hidden))


def _scale(shape: ModelShape, layer: int) -> float:
    config = shape.hf_config
    scale = shape.attention_scale if config.get("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if config.get("scale_attn_by_inverse_layer_idx", False) else scale
