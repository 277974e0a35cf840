"""The compiled path from the packed projection to queries and cache, against the definition."""

import shutil

import pytest
import torch

from kernels.qkv_rope_store import HeadNorm, qkv_rope_store_reference
from kernels.qkv_rope_store_cpu import can_serve, qkv_rope_store_cpu
from kernels.rotary import widen_tables
from tests.kernels.cases import (
    QKV_SHAPES,
    assert_close,
    make_cache,
    make_head_norm,
    make_rotation,
    random,
)

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
BF16 = torch.bfloat16


@pytest.mark.parametrize(("T", "N", "K", "D", "half"), QKV_SHAPES)
@pytest.mark.parametrize("has_norm", [False, True])
def test_it_equals_the_definition(
    T: int, N: int, K: int, D: int, half: int, has_norm: bool
) -> None:
    qkv = random(T, (N + 2 * K) * D + 8, dtype=BF16)[:, 8:]  # rows apart
    norm, turned, rotation = None, {}, None
    if has_norm:
        given = make_head_norm(D, torch.float32)
        offset = given.weight_offset  # a layer on a CPU has it in its weights
        norm = HeadNorm(given.q_weight + offset, given.k_weight + offset, given.eps, 0.0)
    if half:
        rotation = make_rotation(T, half)
        cos, sin = widen_tables(rotation.cos, rotation.sin)
        places = rotation.positions.long()
        turned = {"cos": cos[places], "sin": sin[places]}
    cache, expected_cache = (make_cache(T, K, D, BF16) for _ in range(2))
    assert can_serve(qkv, cache, norm)

    q = qkv_rope_store_cpu(qkv, N, cache, norm=norm, **turned)

    assert_close(q, qkv_rope_store_reference(qkv.contiguous(), N, expected_cache, norm, rotation))
    assert_close(cache.key, expected_cache.key)
    assert cache.value.equal(expected_cache.value)


def test_nan_stays_where_it_is() -> None:
    qkv, cache = random(2, 4 * 16, dtype=BF16), make_cache(2, 1, 16, BF16)
    qkv[0] = torch.nan

    q = qkv_rope_store_cpu(qkv, 2, cache)

    assert q[0].isnan().all()
    assert q[1].equal(qkv[1, :32].view(2, 16))


def test_what_does_not_fit_is_refused() -> None:
    qkv, cache = random(2, 4 * 16, dtype=BF16), make_cache(2, 1, 16, BF16)
    num_slots = cache.key.shape[0] * cache.key.shape[1]
    before = cache.key.clone()
    with pytest.raises(ValueError, match="shapes differ"):
        qkv_rope_store_cpu(qkv, 3, cache)
    with pytest.raises(ValueError, match=r"\[T, 1, R\]"):
        qkv_rope_store_cpu(qkv, 2, cache, cos=torch.zeros(1, 1, 8), sin=torch.zeros(1, 1, 8))
    for slot in (-1, num_slots):
        outside = cache._replace(slot_mapping=torch.tensor([0, slot]))
        with pytest.raises(ValueError, match="leaves the cache"):
            qkv_rope_store_cpu(qkv, 2, outside)
    assert cache.key.equal(before)
    assert not can_serve(qkv.float(), cache, None)
    assert not can_serve(qkv, cache, make_head_norm(16, BF16))
