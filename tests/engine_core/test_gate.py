"""What is let in, and when requests are overdue."""

import pytest

from engine_core.gate import Gate
from engine_core.request import Request, RequestGroup
from engine_core.waiting_room import WaitingRoom
from ipc.errors import DeadlineExceededError, EngineDrainingError, EngineOverloadedError
from ipc.messages import FinishReason, Limits, ResumedBranch, RowParams
from ipc.sampling_params import SamplingParams
from tests.engine_core.builders import make_request

LIMITS = Limits(128, 4, 8, 40, 0, 60, 6, 128, max_waiting_tokens=100)


def make_group(num_tokens: int = 10, deadline_s: float | None = None) -> RequestGroup:
    group = RequestGroup(
        b"c", "r", [1] * num_tokens, SamplingParams(seed=1), frozenset(), 0.0, b"root"
    )
    group.deadline_s = deadline_s
    group.branches.append(Request(group, 0, RowParams(1, 1.0), 4))
    return group


def check(
    gate: Gate, room: WaitingRoom, num_open: int = 0, prompt: int = 4, **fields: object
) -> None:
    gate.check(make_request("r", prompt, **fields), room, num_open=num_open, now_s=100.0)


def test_more_requests_than_may_run_and_wait_are_refused_with_advice() -> None:
    gate, room = Gate(LIMITS), WaitingRoom()
    check(gate, room, num_open=9)
    with pytest.raises(EngineOverloadedError, match="10 requests are in flight, at most 10") as err:
        check(gate, room, num_open=10)
    assert 1.0 <= err.value.retry_after_s <= 60.0


def test_more_tokens_than_may_wait_are_refused() -> None:
    gate, room = Gate(LIMITS), WaitingRoom()
    room.enter(make_group(90))
    check(gate, room, prompt=10)
    with pytest.raises(EngineOverloadedError, match="90 prompt tokens wait, at most 100"):
        check(gate, room, prompt=11)


def test_a_prompt_above_the_bound_may_wait_alone() -> None:
    check(Gate(LIMITS), WaitingRoom(), prompt=101)


def test_what_was_admitted_before_comes_in_again_whatever_waits() -> None:
    gate, room = Gate(LIMITS), WaitingRoom()
    gate.is_draining = True
    check(gate, room, num_open=50, num_attempts=2)
    check(gate, room, num_open=50, resumed=[ResumedBranch(0, [1])])


def test_nothing_new_is_let_in_while_draining() -> None:
    gate = Gate(LIMITS)
    gate.is_draining = True
    with pytest.raises(EngineDrainingError):
        check(gate, WaitingRoom())


@pytest.mark.parametrize("fields", [{"deadline_s": 99.9}, {"timeout_s": -0.1}], ids=str)
def test_what_comes_too_late_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(DeadlineExceededError):
        check(Gate(LIMITS), WaitingRoom(), **fields)


def test_each_overdue_request_is_named_once_in_order() -> None:
    gate = Gate(LIMITS)
    groups = [make_group(deadline_s=deadline_s) for deadline_s in (5.0, 3.0, 9.0)]
    for group in (*groups, make_group()):
        gate.watch(group)
    assert gate.next_deadline_s == 3.0
    assert [group for group, _ in gate.take_overdue(5.0)] == [groups[1], groups[0]]
    assert not list(gate.take_overdue(5.0))
    assert gate.next_deadline_s == 9.0


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    gate = Gate(LIMITS)
    for i in range(1000):
        group = make_group(deadline_s=1e6 + i)
        gate.watch(group)
        group.branches[0].finish(FinishReason.STOP)
    assert len(gate._deadlines) < 130
