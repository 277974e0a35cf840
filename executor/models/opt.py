"""OPT: learned positions, LayerNorm, ReLU, biases everywhere.

The 350M model normalises after each branch instead of before and embeds in a smaller space
(``word_embed_proj_dim``); both are switches of the config.
Shapes: T packed tokens, S rows whose logits are wanted, H hidden size, V vocabulary.
Source: Zhang et al., "OPT", arXiv:2205.01068.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.layers.attention import Attention
from executor.layers.embedding import LMHead, VocabParallelEmbedding
from executor.layers.layernorm import LayerNorm
from executor.layers.linear import LayerFactory, ReplicatedLinear
from executor.layers.mlp import MLP
from executor.model_config import ModelShape
from executor.models.interface import CheckpointNames, PackedModules, specs_of

_POSITION_OFFSET = 2  # the first two rows of the position table are never used
_NORM_EPS = 1e-5


class OPTForCausalLM(nn.Module):
    """Decoder with learned positions; pre-norm or post-norm by the config."""

    packed_modules: ClassVar[PackedModules] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[CheckpointNames] = CheckpointNames(
        prefixes=("model.decoder.", "decoder."),
        renamed=(
            (".out_proj.", ".o_proj."),
            (".fc1.", ".mlp.up_proj."),
            (".fc2.", ".mlp.down_proj."),
        ),
        ignored=("decoder.version",),
    )

    def __init__(self, shape: ModelShape, factory: LayerFactory) -> None:
        super().__init__()
        config, hidden_size = shape.hf_config, shape.hidden_size
        embedded = int(config.get("word_embed_proj_dim") or hidden_size)
        self.embed_tokens = VocabParallelEmbedding(shape.vocab_size, embedded, factory)
        rows = shape.max_position_embeddings + _POSITION_OFFSET
        self.embed_positions = nn.Embedding(rows, hidden_size, dtype=factory.dtype)
        self.project_in = self.project_out = self.final_layer_norm = None
        if embedded != hidden_size:
            self.project_in = ReplicatedLinear(embedded, hidden_size, factory)
            self.project_out = ReplicatedLinear(hidden_size, embedded, factory)
        self.layers = nn.ModuleList(
            OPTBlock(shape, layer, factory) for layer in range(shape.num_layers)
        )
        if _is_pre_norm(shape) and not config.get("_remove_final_layer_norm", False):
            self.final_layer_norm = _norm(shape, factory)
        tied = self.embed_tokens if shape.tie_word_embeddings else None
        self.lm_head = LMHead(shape.vocab_size, embedded, factory, tied_to=tied)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: list[LayerKVCache],
        meta: AttentionMetadata,
    ) -> Tensor:
        """[T] and [T] -> final hidden states [T, H]."""
        hidden = self.embed_tokens(token_ids)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        hidden = hidden + F.embedding(positions + _POSITION_OFFSET, self.embed_positions.weight)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden = layer(hidden, kv_cache, meta)
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        return hidden if self.project_out is None else self.project_out(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32."""
        return self.lm_head(hidden)

    def kv_cache_specs(self) -> list[KVCacheSpec]:
        """What each layer keeps per token on this rank."""
        return specs_of(self)


class OPTBlock(nn.Module):
    """Attention and feed-forward, each with its norm before or after."""

    def __init__(self, shape: ModelShape, layer: int, factory: LayerFactory) -> None:
        super().__init__()
        bias = bool(shape.hf_config.get("enable_bias", True))
        self.is_pre_norm = _is_pre_norm(shape)
        self.self_attn = Attention(shape, layer, factory, qkv_bias=bias, output_bias=bias)
        self.self_attn_layer_norm = _norm(shape, factory)
        self.mlp = MLP(
            shape.hidden_size, shape.intermediate_size, shape.activation, factory, bias=bias
        )
        self.final_layer_norm = _norm(shape, factory)

    def forward(self, hidden: Tensor, kv_cache: LayerKVCache, meta: AttentionMetadata) -> Tensor:
        """[T, H] -> [T, H]."""
        if self.is_pre_norm:
            normed = self.self_attn_layer_norm(hidden)
            hidden = hidden + self.self_attn(normed, None, kv_cache, meta)
            return hidden + self.mlp(self.final_layer_norm(hidden))
        hidden = self.self_attn_layer_norm(hidden + self.self_attn(hidden, None, kv_cache, meta))
        return self.final_layer_norm(hidden + self.mlp(hidden))


def _is_pre_norm(shape: ModelShape) -> bool:
    return bool(shape.hf_config.get("do_layer_norm_before", True))


def _norm(shape: ModelShape, factory: LayerFactory) -> LayerNorm:
    affine = bool(shape.hf_config.get("layer_norm_elementwise_affine", True))
    return LayerNorm(shape.hidden_size, _NORM_EPS, factory, elementwise_affine=affine)
