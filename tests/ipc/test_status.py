"""Status pipes: whole lines arrive, and a reader that is gone or asleep holds nobody up."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ipc.messages import EngineFailed, LoadProgress
from ipc.status import Listening, StatusReader, StatusWriter


@contextmanager
def make_pipe() -> Iterator[tuple[StatusReader, StatusWriter, int]]:
    read_end, write_end = os.pipe()
    reader = StatusReader(read_end)
    try:
        yield reader, StatusWriter(write_end), write_end
    finally:
        reader.close()
        reader.close()  # harmless
        try:
            os.close(write_end)
        except OSError:
            assert reader.is_at_end  # the test closed it


def test_statuses_arrive_in_order_and_the_end_is_noticed() -> None:
    statuses = [
        LoadProgress(0, "loading weights", 1, 2, 0.5),
        Listening("ipc:///x", 7, 0),
        EngineFailed(0, "two\nlines", 4),
    ]
    with make_pipe() as (reader, writer, write_end):
        assert reader.read() == []
        for status in statuses:
            writer.write(status)
        assert reader.read() == statuses
        assert not reader.is_at_end

        os.close(write_end)
        assert reader.read() == []
        assert reader.is_at_end


def test_a_line_in_two_pieces_is_put_together() -> None:
    with make_pipe() as (reader, _, write_end):
        os.write(write_end, b'["Listening","ipc:')
        assert reader.read() == []
        os.write(write_end, b'///x",7,0]\n')

        assert reader.read() == [Listening("ipc:///x", 7, 0)]


def test_a_sleeping_reader_holds_nobody_up() -> None:
    progress = LoadProgress(0, "loading weights", 1, 2, 0.5)
    with make_pipe() as (reader, writer, _):
        for _ in range(10_000):
            writer.write(progress)

        assert 100 < len(reader.read()) < 10_000


def test_a_cause_of_any_length_arrives() -> None:
    with make_pipe() as (reader, writer, _):
        writer.write(EngineFailed(0, "x" * 10**6, 4))
        (failed,) = reader.read()

        assert isinstance(failed, EngineFailed)
        assert failed.reason.startswith("xxx")


def test_a_reader_that_is_gone_holds_nobody_up() -> None:
    read_end, write_end = os.pipe()
    writer = StatusWriter(write_end)
    os.close(read_end)
    writer.write(Listening("ipc:///x", 7, 0))
    os.close(write_end)
