"""Allocation, block copies and the swap pool. CPU only."""

import pytest
import torch

from executor.attention_metadata import KVCacheSpec
from executor.kv_cache import KVCache, bytes_per_block
from tests.executor.builders import CPU

SMALL, WIDE = KVCacheSpec(1, 4), KVCacheSpec(2, 8)


def make_cache(*specs: KVCacheSpec, num_blocks: int = 12, num_swap_blocks: int = 6) -> KVCache:
    return KVCache(
        specs or (SMALL, WIDE, SMALL),
        num_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
        block_size=8,
        dtype=torch.bfloat16,
        device=CPU,
    )


def fill(cache: KVCache) -> None:
    """Give every block of every layer values of its own."""
    for number, layer in enumerate(cache.layers):
        for block in range(cache.num_blocks):
            layer.key[block] = float(10 * block + number)
            layer.value[block] = float(-10 * block - number)


def contents(cache: KVCache, block: int) -> list[tuple[float, float]]:
    """The block's value in each layer; all its elements must be equal."""
    found = []
    for layer in cache.layers:
        assert layer.key[block].unique().numel() == layer.value[block].unique().numel() == 1
        found.append((float(layer.key[block].flatten()[0]), float(layer.value[block].flatten()[0])))
    return found


def test_every_layer_gets_blocks_of_its_own_shape() -> None:
    cache = make_cache()

    assert [tuple(layer.key.shape) for layer in cache.layers] == [
        (12, 8, 1, 4),
        (12, 8, 2, 8),
        (12, 8, 1, 4),
    ]
    fill(cache)  # no layer's writes reach another's
    assert contents(cache, 3) == [(30.0, -30.0), (31.0, -31.0), (32.0, -32.0)]
    assert all(layer.key.is_contiguous() for layer in cache.layers)


def test_bytes_are_those_of_the_tensors() -> None:
    cache = make_cache()

    tensors = sum(t.numel() * t.element_size() for layer in cache.layers for t in layer)
    assert cache.num_bytes == tensors
    assert bytes_per_block([SMALL, WIDE, SMALL], 8, torch.bfloat16) * 12 == tensors


def test_a_new_cache_is_zero() -> None:
    cache = make_cache()

    assert not any(tensor.any() for layer in cache.layers for tensor in layer)


def test_copies_reach_every_layer() -> None:
    cache = make_cache()
    fill(cache)
    before = [contents(cache, block) for block in range(12)]

    cache.copy_blocks([(1, 7), (2, 8), (1, 9)])

    after = [contents(cache, block) for block in range(12)]
    assert [after[7], after[8], after[9]] == [before[1], before[2], before[1]]
    assert after[:7] + after[10:] == before[:7] + before[10:]


def test_a_chain_of_copies_is_done_in_order() -> None:
    cache = make_cache()
    fill(cache)
    first = contents(cache, 1)

    cache.copy_blocks([(1, 2), (2, 3)])

    assert contents(cache, 3) == first


def test_blocks_come_back_from_the_swap_pool_to_other_places() -> None:
    cache = make_cache()
    fill(cache)
    before = [contents(cache, block) for block in range(12)]

    cache.swap_out([(4, 0), (5, 5)])
    cache.copy_blocks([(1, 4), (1, 5)])  # someone else's now
    cache.swap_in([(5, 9), (0, 10)])

    assert contents(cache, 9) == before[5]
    assert contents(cache, 10) == before[4]
    assert contents(cache, 4) == before[1]


def test_the_swap_pool_has_an_end() -> None:
    cache = make_cache(num_swap_blocks=6)

    with pytest.raises(ValueError, match="swap block 6 is outside a pool of 6"):
        cache.swap_out([(1, 6)])


def test_scrubbing_keeps_what_is_finite() -> None:
    cache = make_cache()
    fill(cache)
    cache.layers[1].value[4, 2, 0, 3] = torch.nan
    cache.layers[2].key[4, 0, 0, 0] = -torch.inf

    cache.scrub([4, 0, 4])

    assert float(cache.layers[1].value[4, 2, 0, 3]) == 0.0
    assert float(cache.layers[2].key[4, 0, 0, 0]) == 0.0
    assert float(cache.layers[1].value[4, 2, 0, 2]) == -41.0
