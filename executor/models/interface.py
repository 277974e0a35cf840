"""What every causal language model offers to the runner, the loader and the adapters.

Shapes: T packed tokens, S rows whose logits are wanted, H hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.layers.attention import PagedAttention

# Fused module -> the checkpoint's modules that lie in it, in order.
PackedModules = Mapping[str, tuple[str, ...]]

QKV_AND_GATE_UP: PackedModules = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """How a checkpoint's names become a model's. Packing is separate: see ``packed_modules``."""

    prefixes: tuple[str, ...] = ("model.",)  # the first that fits is cut off
    renamed: tuple[tuple[str, str], ...] = ()  # substrings, applied in order
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # substrings of tensors without a place
    transposed: tuple[str, ...] = ()  # endings of weights stored [in, out]

    def local_name(self, name: str) -> str | None:
        """The model's own name of a checkpoint tensor; None when the model has no use for it."""
        if any(part in name for part in self.ignored):
            return None
        prefix = next((p for p in self.prefixes if name.startswith(p)), "")
        local = name[len(prefix) :]
        for old, new in self.renamed:
            local = local.replace(old, new)
        return local


class CausalLM(Protocol):
    """A decoder-only model over the paged KV cache. Implementations are also ``nn.Module``."""

    packed_modules: ClassVar[PackedModules]
    checkpoint_names: ClassVar[CheckpointNames]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: list[LayerKVCache],
        meta: AttentionMetadata,
    ) -> Tensor:
        """[T] and [T] -> final hidden states [T, H]; keys and values go into ``kv_caches``."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32, the same on every rank."""

    def kv_cache_specs(self) -> list[KVCacheSpec]:
        """What each layer keeps per token on this rank."""


def specs_of(model: nn.Module) -> list[KVCacheSpec]:
    """One spec per attention layer, in the order of the layers."""
    return [m.kv_cache_spec for m in model.modules() if isinstance(m, PagedAttention)]
