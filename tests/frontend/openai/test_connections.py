"""Places for connections, and who makes room."""

import resource

from frontend.openai.connections import ConnectionTable, raise_file_limit


class FakeConnection:
    """Notes whether it was asked to go."""

    def __init__(self) -> None:
        self.is_cut = False

    def cut(self) -> None:
        self.is_cut = True


def open_all(table: ConnectionTable, count: int) -> list[FakeConnection]:
    connections = [FakeConnection() for _ in range(count)]
    assert all(map(table.open, connections))
    return connections


def test_the_one_that_has_waited_longest_makes_room() -> None:
    table = ConnectionTable(3)
    first, second, third = open_all(table, 3)
    table.note_request(first)
    table.note_answered(first)  # it waits since now
    open_all(table, 2)
    assert [each.is_cut for each in (first, second, third)] == [False, True, True]
    assert len(table) == 3
    assert table.num_evicted == 2


def test_nobody_with_a_request_is_disturbed() -> None:
    table = ConnectionTable(2)
    for connection in open_all(table, 2):
        table.note_request(connection)
    assert not table.open(FakeConnection())
    assert len(table) == 2


def test_a_closed_connection_leaves_a_place_and_comes_back_never() -> None:
    table = ConnectionTable(1)
    (first,) = open_all(table, 1)
    table.note_request(first)
    table.close(first)
    table.close(first)
    table.note_answered(first)
    (second,) = open_all(table, 1)
    table.note_request(second)
    assert not table.open(FakeConnection())
    assert not first.is_cut


def test_the_limit_is_what_the_process_can_hold() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert raise_file_limit(10) == 10
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            assert raise_file_limit(hard + 1000) == hard - 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
