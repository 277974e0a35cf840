"""Workers' rows."""

from engine_core.row_pool import RowPool


def test_low_rows_are_handed_out_first() -> None:
    pool = RowPool(3)
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    pool.give_back(2)
    pool.give_back(0)
    assert pool.take() == 0
    assert pool.num_free == 1


def test_freed_rows_are_declared_once() -> None:
    pool = RowPool(3)
    pool.give_back(pool.take())
    assert pool.take_freed() == [0]
    assert pool.take_freed() == []
