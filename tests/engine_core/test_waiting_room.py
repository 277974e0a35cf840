"""Counts of those who wait to begin, and when others may come back."""

import pytest

from engine_core.request import RequestGroup
from engine_core.waiting_room import MAX_RETRY_S, MIN_RETRY_S, WaitingRoom
from ipc.sampling_params import SamplingParams


def make_group(num_tokens: int, arrival_s: float = 0.0) -> RequestGroup:
    return RequestGroup(
        b"c", "r", [1] * num_tokens, SamplingParams(seed=1), frozenset(), arrival_s, b"root"
    )


def test_whoever_begins_or_leaves_is_counted_no_more() -> None:
    room = WaitingRoom()
    first, second = make_group(10), make_group(20)
    room.enter(first)
    room.enter(second)
    assert (room.num_requests, room.num_tokens) == (2, 30)
    room.begin(first, 0, 1.0)
    room.begin(first, 0, 2.0)  # a second branch of it
    room.leave(second)
    room.leave(second)
    assert (room.num_requests, room.num_tokens) == (0, 0)


def test_advice_is_what_waits_over_the_rate_at_which_it_begins() -> None:
    room = WaitingRoom()
    groups = [make_group(100) for _ in range(20)]
    for group in groups:
        room.enter(group)
    for i, group in enumerate(groups[:10], start=1):
        room.begin(group, 0, 0.5 * i)  # 200 tokens a second
    assert room.num_tokens == 1000
    assert room.retry_after_s == pytest.approx(5.0, rel=0.3)


def test_idle_time_does_not_count_as_slowness() -> None:
    room = WaitingRoom()
    for start_s in (0.0, 1000.0):
        groups = [make_group(100, start_s) for _ in range(10)]
        for group in groups:
            room.enter(group)
        for i, group in enumerate(groups, start=1):
            room.begin(group, 0, start_s + 0.1 * i)  # 1000 tokens a second
    for _ in range(30):
        room.enter(make_group(100, 1001.0))
    assert room.retry_after_s == pytest.approx(3.0, rel=0.3)


def test_advice_stays_within_bounds() -> None:
    room = WaitingRoom()
    assert room.retry_after_s == MIN_RETRY_S  # nothing is known
    room.enter(make_group(1000))
    room.advance(5.0)
    assert room.retry_after_s == MAX_RETRY_S  # nobody begins at all
    small = make_group(1, 5.0)
    room.enter(small)
    room.begin(small, 0, 5.1)
    assert room.retry_after_s == MAX_RETRY_S
