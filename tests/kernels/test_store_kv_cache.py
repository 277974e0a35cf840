"""Cache writes: both paths against the definition, and nothing else touched."""

import pytest
import torch

from kernels import store_kv_cache as store
from tests.kernels.cases import DTYPES, packed_qkv, random


@pytest.mark.parametrize("run", [store.store_kv_cache_cpu, store.store_kv_cache_triton])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 80), (16, 5), (32, 700)])
def test_each_token_lands_in_its_slot(
    run, dtype: torch.dtype, block_size: int, head_dim: int
) -> None:
    _, k, v = packed_qkv(5, 3, 2, head_dim, dtype=dtype)
    caches = [random(4, block_size, 2, head_dim, dtype=dtype, seed=i) for i in (1, 2)]
    expected = [cache.clone() for cache in caches]
    slots = torch.tensor([block_size * 3 + 1, 1, block_size, 4 * block_size - 1, 0])

    run(k, v, *caches, slots)

    store.store_kv_cache_reference(k, v, *expected, slots)
    assert caches[0].equal(expected[0])
    assert caches[1].equal(expected[1])


@pytest.mark.parametrize("run", [store.store_kv_cache_cpu, store.store_kv_cache_triton])
def test_padded_tokens_share_a_slot_of_the_null_block(run) -> None:
    _, k, v = packed_qkv(3, 1, 1, 8, dtype=torch.float32)
    caches = [torch.zeros(3, 8, 1, 8) for _ in range(2)]

    run(k, v, *caches, torch.tensor([17, 0, 0]))

    assert caches[0][2, 1].equal(k[0])
    assert caches[1][2, 1].equal(v[0])
    assert not caches[0][1].any()


@pytest.mark.parametrize("run", [store.store_kv_cache_cpu, store.store_kv_cache_triton])
def test_no_tokens_change_nothing(run) -> None:
    cache = torch.ones(2, 8, 1, 4)
    empty = torch.zeros(0, 1, 4)

    run(empty, empty, cache, cache, torch.zeros(0, dtype=torch.int64))

    assert cache.eq(1).all()


def test_shapes_layouts_and_dtypes_that_do_not_fit_are_refused() -> None:
    k, cache, slots = random(3, 2, 4), torch.zeros(2, 8, 2, 4), torch.arange(3)
    with pytest.raises(ValueError, match="shapes differ"):
        store.store_kv_cache(k, k[:2], cache, cache, slots)
    with pytest.raises(ValueError, match="shapes differ"):
        store.store_kv_cache(k, k, cache, cache, slots[:2])
    with pytest.raises(ValueError, match="caches do not fit"):
        store.store_kv_cache(k, k, cache[:, :, :1], cache[:, :, :1], slots)
    with pytest.raises(ValueError, match="int64"):
        store.store_kv_cache(k, k, cache, cache, slots.int())
    with pytest.raises(ValueError, match="caches must be contiguous"):
        store.store_kv_cache(k, k, cache[:, ::2], cache[:, ::2], slots)
    with pytest.raises(ValueError, match="token's k and v"):
        store.store_kv_cache(k.transpose(0, 1).contiguous().transpose(0, 1), k, cache, cache, slots)
    store.store_kv_cache(k, k, cache, cache, slots)
    assert cache[0, :3].equal(k)
