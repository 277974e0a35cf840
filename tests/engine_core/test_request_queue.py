"""The order in which requests wait."""

from engine_core.request import Request, RequestGroup
from engine_core.request_queue import RequestQueue
from ipc.messages import RowParams
from ipc.sampling_params import SamplingParams

GROUP = RequestGroup(b"c", "r", [1], SamplingParams(seed=1), frozenset(), 0.0, b"root")


def make(priority: int, arrival: int, index: int = 0) -> Request:
    return Request(GROUP, index, RowParams(1, 1.0), 4, order=(priority, arrival, index))


def test_lower_priority_values_go_first_then_arrival_then_branch() -> None:
    queue = RequestQueue()
    expected = [make(-1, 9), make(0, 1, 0), make(0, 1, 1), make(0, 2), make(3, 0)]
    for request in reversed(expected):
        queue.add(request)
    assert list(queue) == expected


def test_a_preempted_request_gets_its_place_back() -> None:
    queue = RequestQueue()
    first, second = make(0, 1), make(0, 2)
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    assert first not in queue
    queue.add(first)
    assert list(queue) == [first, second]


def test_removing_a_stranger_changes_nothing() -> None:
    queue = RequestQueue()
    queue.add(make(0, 1))
    queue.remove(make(0, 1))
    queue.remove(make(0, 5))
    assert len(queue) == 1


def test_while_holding_newcomers_are_set_aside() -> None:
    queue = RequestQueue()
    early, late, gone = make(0, 5), make(0, 1), make(0, 2)
    queue.join(early)
    queue.hold()
    queue.join(late)
    queue.join(gone)
    assert list(queue) == [early]
    assert queue.num_held == 2
    assert queue.has_set_aside(late)
    queue.remove(gone)
    queue.release()
    assert list(queue) == [late, early]
    assert queue.num_held == 0
