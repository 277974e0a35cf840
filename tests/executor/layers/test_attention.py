"""The attention layer: its two ways to the cache, step by step and in one kernel, agree."""

import pytest
import torch

from executor.attention_metadata import AttentionMetadata, LayerKVCache
from executor.layers.attention import Attention
from executor.layers.linear import LayerFactory, UnquantizedLinearMethod
from executor.layers.rotary import LayerRotary, RotaryStep, make_tables
from executor.model_config import ModelShape
from executor.parallel import TensorParallel
from kernels.qkv_rope_store import PagedCache
from tests.kernels.cases import random

CPU = torch.device("cpu")
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def make_attention(shape: ModelShape, *, qk_norm: bool) -> Attention:
    factory = LayerFactory(
        TensorParallel(), torch.float32, UnquantizedLinearMethod(deterministic=True)
    )
    attention = Attention(shape, 0, factory, qk_norm=qk_norm, norm_weight_offset=1.0)
    for seed, parameter in enumerate(attention.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) * 0.2
    attention.qkv_proj.finish_loading(CPU)
    attention.o_proj.finish_loading(CPU)
    return attention


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("positions_are", ["learned", "rotary", "partly rotary"])
def test_the_fused_way_stores_and_attends_like_the_other(qk_norm: bool, positions_are: str) -> None:
    partial = {"partial_rotary_factor": 0.5} if positions_are == "partly rotary" else {}
    shape = ModelShape.from_hf(HF_CONFIG | partial)
    attention = make_attention(shape, qk_norm=qk_norm)
    hidden, positions = random(7, 48), torch.tensor([3, 4, 5, 0, 1, 2, 3])
    gathered = tables = None
    if positions_are != "learned":
        rotary = LayerRotary(shape.ropes, shape.max_model_len)
        for embedding in rotary.embeddings:
            embedding.finish_loading(CPU)
        gathered = rotary(positions)[0]
        tables = RotaryStep(*make_tables(shape.ropes[0], shape.max_model_len), positions)
    caches = [LayerKVCache(random(4, 8, 2, 16), random(4, 8, 2, 16)) for _ in range(2)]
    meta = AttentionMetadata(
        slot_mapping=torch.tensor([11, 12, 13, 24, 25, 26, 27]),
        block_table=torch.tensor([[1], [3]], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 3, 7], dtype=torch.int32),
        seq_lens=torch.tensor([6, 4], dtype=torch.int32),
        max_query_len=4,
        max_seq_len=6,
    )

    expected = attention(hidden, gathered, caches[0], meta)
    paged = PagedCache(*caches[1], meta.slot_mapping)
    q = attention._store_by_kernel(attention.qkv_proj(hidden), tables, paged)
    out = attention.o_proj(attention.attend.attend_stored(q, caches[1], meta))

    torch.testing.assert_close(caches[1], caches[0])
    torch.testing.assert_close(out, expected)
