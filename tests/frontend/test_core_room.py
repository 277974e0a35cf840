"""How much of a batch the core's queue takes."""

from frontend.core_room import CoreRoom
from ipc.messages import Limits


def make_room(max_waiting_tokens: int = 100) -> CoreRoom:
    return CoreRoom(Limits(128, 4, 8, 40, 0, 60, 6, 128, max_waiting_tokens))


def test_tokens_of_what_has_begun_make_room() -> None:
    room = make_room()
    room.add("a", 60)
    assert room.has_room(40)
    assert not room.has_room(41)
    room.note_started("a")
    room.note_started("a")
    assert room.has_room(100)
    assert "a" in room


def test_one_prompt_above_the_bound_goes_alone() -> None:
    room = make_room()
    assert room.has_room(500)
    room.add("a", 500)
    assert not room.has_room(1)


def test_no_more_are_sent_than_may_be_open_in_the_core() -> None:
    room = make_room(0)
    for i in range(10):
        assert room.has_room(10**6)
        room.add(f"r{i}", 10**6)
        room.note_started(f"r{i}")
    assert not room.has_room(1)
    room.remove("r0")
    assert room.has_room(1)
    room.clear()
    assert "r1" not in room
