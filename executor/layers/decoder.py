"""The two usual decoder blocks around attention and feed-forward, for models with RMSNorm.

The residual stream is kept apart from the branch output, so that each add runs fused with the norm
that follows it. A block takes and returns the pair ``(hidden, residual)``: their sum is the stream.
Inside a block ``forward`` is called by name: the hooks that a module's call looks for are not used
here, and on a CPU the look-ups cost a decode step several percent.
Shapes: T packed tokens, H hidden size.
"""

from torch import Tensor, nn

from executor.attention_metadata import AttentionMetadata, LayerKVCache
from executor.layers.attention import Attention
from executor.layers.layernorm import RMSNorm
from executor.layers.linear import LayerFactory
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import RotaryStep
from executor.model_config import ModelShape


class PreNormBlock(nn.Module):
    """Norm, attention, add; norm, feed-forward, add (Llama and most others)."""

    def __init__(
        self, shape: ModelShape, self_attn: Attention, mlp: GatedMLP, factory: LayerFactory
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps, factory)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps, factory)

    def forward(
        self,
        stream: tuple[Tensor, Tensor | None],
        rotary: RotaryStep,
        kv_cache: LayerKVCache,
        meta: AttentionMetadata,
    ) -> tuple[Tensor, Tensor | None]:
        """``(hidden, residual)`` [T, H] each, in and out; no residual before the first block."""
        hidden, residual = self.input_layernorm.add(*stream)
        hidden = self.self_attn.forward(hidden, rotary, kv_cache, meta)
        hidden, residual = self.post_attention_layernorm.add(hidden, residual)
        return self.mlp.forward(hidden), residual


class SandwichNormBlock(nn.Module):
    """Norms before *and* after attention and feed-forward, weights counted from one (Gemma)."""

    def __init__(
        self, shape: ModelShape, self_attn: Attention, mlp: GatedMLP, factory: LayerFactory
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp

        def norm() -> RMSNorm:
            return RMSNorm(shape.hidden_size, shape.norm_eps, factory, weight_offset=1.0)

        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()

    def forward(
        self,
        stream: tuple[Tensor, Tensor | None],
        rotary: RotaryStep,
        kv_cache: LayerKVCache,
        meta: AttentionMetadata,
    ) -> tuple[Tensor, Tensor | None]:
        """``(hidden, residual)`` [T, H] each, in and out; no residual before the first block."""
        hidden, residual = self.input_layernorm.add(*stream)
        hidden = self.self_attn(hidden, rotary, kv_cache, meta)
        hidden = self.post_attention_layernorm(hidden)
        hidden, residual = self.pre_feedforward_layernorm.add(hidden, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden)), residual
