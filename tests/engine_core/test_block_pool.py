"""The books of the KV blocks."""

import random

import pytest

from engine_core.block_pool import BlockPool
from ipc.errors import OutOfBlocksError


def test_allocate_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    with pytest.raises(OutOfBlocksError, match="4 blocks wanted, 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3
    assert sorted(pool.allocate(3)) == [1, 2, 3]


def test_the_null_block_is_never_handed_out_held_or_freed() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert 0 not in blocks
    pool.hold([0, 0])
    pool.free([0])
    assert pool.ref_count(0) == 0
    assert pool.num_held == 2


def test_a_free_block_is_found_by_its_prefix_until_it_is_handed_out() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.remember(block, b"prefix")
    pool.free([block])
    assert pool.num_free_cached == 1
    assert pool.find(b"prefix") == block

    pool.hold([block])
    assert pool.num_free_cached == 0
    pool.free([block])
    pool.allocate(2)
    assert pool.find(b"prefix") is None


def test_blocks_that_remember_nothing_go_first_then_least_recently_freed() -> None:
    pool = BlockPool(5)
    a, b, c, d = pool.allocate(4)
    for block, name in ((a, b"a"), (b, b"b"), (d, b"d")):
        pool.remember(block, name)
    pool.free([b, a, c, d])
    assert pool.allocate(4) == [c, b, a, d]


def test_a_shared_block_is_free_only_when_nobody_holds_it() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.hold([block])
    pool.free([block])
    assert pool.num_free == 0
    pool.free([block])
    assert pool.num_free == 1


def test_the_first_block_with_a_hash_keeps_it() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.remember(first, b"same")
    pool.remember(second, b"same")
    assert pool.find(b"same") == first
    pool.check_invariants([[first, second]])


def test_forgotten_blocks_are_found_no_more() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.remember(first, b"1")
    pool.remember(second, b"2")
    pool.free([second])
    pool.forget([first, second])
    assert pool.find(b"1") is None
    assert pool.find(b"2") is None
    assert pool.num_free_cached == 0
    pool.check_invariants([[first]])


def test_books_agree_after_a_thousand_random_operations() -> None:
    rng, pool = random.Random(3), BlockPool(20)
    tables: list[list[int]] = []
    for i in range(1000):
        action = rng.choice(["allocate", "free", "share", "remember", "forget", "forget_all"])
        if action == "allocate":
            tables.append(pool.allocate(rng.randint(0, min(4, pool.num_free))))
        elif action == "forget_all" and i % 10 == 0:
            pool.forget_all()
        elif tables:
            table = rng.choice(tables)
            if action == "free":
                tables.remove(table)
                pool.free(reversed(table))
            elif action == "share":
                pool.hold(table)
                tables.append(list(table))
            elif action == "remember" and table:
                pool.remember(rng.choice(table), rng.randbytes(1))
            elif action == "forget":
                pool.forget(table[:1])
        pool.check_invariants(tables)
