"""Grouped-query self-attention over the paged KV cache, heads split across ranks.

Shapes: T tokens in the step (all requests packed, no padding between them), H hidden size,
N query heads and K key/value heads *on this rank*, D head size.
"""

from torch import Tensor, nn

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.layers.layernorm import RMSNorm
from executor.layers.linear import LayerFactory, QKVParallelLinear, RowParallelLinear
from executor.layers.rotary import RotaryStep
from executor.model_config import ModelShape
from kernels.paged_attention import paged_attention
from kernels.qkv_rope_store import HeadNorm, PagedCache, qkv_rope_store
from kernels.qkv_rope_store_cpu import can_serve, qkv_rope_store_cpu
from kernels.store_kv_cache import store_kv_cache


class PagedAttention(nn.Module):
    """Store this step's keys and values, then attend to each request's own past."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        self.deterministic = deterministic

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache: LayerKVCache, meta: AttentionMetadata
    ) -> Tensor:
        """``q`` [T, N, D], ``k`` and ``v`` [T, K, D] -> [T, N * D].

        Args:
            kv_cache: this layer's blocks, written in place at ``meta.slot_mapping``.
        """
        store_kv_cache(k, v, kv_cache.key, kv_cache.value, meta.slot_mapping)
        return self.attend_stored(q, kv_cache, meta)

    def attend_stored(self, q: Tensor, kv_cache: LayerKVCache, meta: AttentionMetadata) -> Tensor:
        """The same where this step's keys and values are in ``kv_cache`` already."""
        out = paged_attention(
            q,
            kv_cache.key,
            kv_cache.value,
            block_table=meta.block_table,
            query_start_loc=meta.query_start_loc,
            seq_lens=meta.seq_lens,
            max_query_len=meta.max_query_len,
            max_seq_len=meta.max_seq_len,
            scale=self.scale,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            memo=meta.memo,
            batch_invariant=self.deterministic,
        )
        return out.flatten(1)

    @property
    def kv_cache_spec(self) -> KVCacheSpec:
        """What this layer keeps per token."""
        return KVCacheSpec(self.num_kv_heads, self.head_dim)


class Attention(nn.Module):
    """One attention layer. Communicates once: the all-reduce inside ``o_proj``."""

    def __init__(
        self,
        shape: ModelShape,
        layer: int,
        factory: LayerFactory,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
        norm_weight_offset: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        tp, head_dim = factory.tp, shape.head_dim
        num_heads, num_kv_heads = tp.split(shape.num_heads), tp.split_kv_heads(shape.num_kv_heads)
        self.head_dim = head_dim
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size, shape.num_heads, shape.num_kv_heads, head_dim, factory, bias=qkv_bias
        )
        self.o_proj = RowParallelLinear(
            shape.num_heads * head_dim, shape.hidden_size, factory, bias=output_bias
        )
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = RMSNorm(
                head_dim, shape.norm_eps, factory, weight_offset=norm_weight_offset
            )
            self.k_norm = RMSNorm(
                head_dim, shape.norm_eps, factory, weight_offset=norm_weight_offset
            )
        self.attend = PagedAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=shape.attention_scale if scale is None else scale,
            sliding_window=shape.sliding_windows[layer],
            soft_cap=shape.attention_soft_cap,
            deterministic=factory.deterministic,
        )

    def forward(
        self,
        hidden: Tensor,
        rotary: RotaryStep | None,
        kv_cache: LayerKVCache,
        meta: AttentionMetadata,
    ) -> Tensor:
        """[T, H] -> [T, H], already summed over the tensor-parallel group.

        Args:
            rotary: None where positions are learned, and already added to ``hidden``.
        """
        qkv = self.qkv_proj.forward(hidden)
        cache = PagedCache(kv_cache.key, kv_cache.value, meta.slot_mapping)
        q = self._store(qkv, rotary, cache)
        return self.o_proj.forward(self.attend.attend_stored(q, kv_cache, meta))

    def _store(self, qkv: Tensor, rotary: RotaryStep | None, cache: PagedCache) -> Tensor:
        """Norm, rotation and store, in one call where there is one; the queries [T, N, D]."""
        if qkv.is_cuda:
            return self._store_by_kernel(qkv, rotary, cache)
        norm = self._head_norm()
        if can_serve(qkv, cache, norm):
            rows = {} if rotary is None else {"cos": rotary.cos, "sin": rotary.sin}
            return qkv_rope_store_cpu(qkv, self.attend.num_heads, cache, norm=norm, **rows)
        return self._store_by_parts(qkv, rotary, cache)

    def _store_by_kernel(self, qkv: Tensor, rotary: RotaryStep | None, cache: PagedCache) -> Tensor:
        rotation = None if rotary is None else rotary.rotation
        num_heads, norm = self.attend.num_heads, self._head_norm()
        return qkv_rope_store(qkv, num_heads, cache, norm=norm, rotation=rotation)

    def _store_by_parts(self, qkv: Tensor, rotary: RotaryStep | None, cache: PagedCache) -> Tensor:
        """The same by one call after the other: a CPU's way for all but bfloat16."""
        qkv = qkv.view(qkv.shape[0], -1, self.head_dim)
        num_heads, num_kv_heads = self.attend.num_heads, self.attend.num_kv_heads
        qk, v = qkv[:, : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
        q, k = qk[:, :num_heads], qk[:, num_heads:]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.forward(q), self.k_norm.forward(k)
            if rotary is not None:
                q, k = rotary.rotate_pair(q, k)
        elif rotary is not None:
            q, k = rotary.rotate(qk, num_heads)
        store_kv_cache(k, v, *cache)
        return q

    def _head_norm(self) -> HeadNorm | None:
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is None or k_norm is None:
            return None
        return HeadNorm(q_norm.weight, k_norm.weight, q_norm.eps, q_norm.weight_offset)
