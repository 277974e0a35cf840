"""The core under more than it can do: bounds, deadlines and shares, over a simulated executor."""

import time

import pytest

from ipc.errors import DeadlineExceededError
from ipc.messages import EngineOutput, FinishReason
from ipc.operations import PauseGeneration
from tests.engine_core.builders import CLIENT, Rig, make_request

PAST = 1e-9


def overdue(rig: Rig, req_id: str) -> None:
    """Let a request's deadline come now."""
    group = rig.core._groups[CLIENT][req_id]
    group.deadline_s = PAST
    rig.core.gate.watch(group)


def test_several_frontends_together_do_not_exceed_the_bound() -> None:
    rig = Rig(max_num_seqs=4, max_waiting_requests=6)
    refused: list[EngineOutput] = []
    for i in range(30):
        rig.core.add_request(b"frontend%d" % (i % 3), make_request(f"r{i}", 4))
    for _, message, _ in rig.core.drain_outputs():
        refused += message.outputs
    assert rig.core.num_open == 10
    assert len(refused) == 20
    assert {output.error_kind for output in refused} == {"EngineOverloadedError"}


def test_tokens_that_wait_are_bounded_and_counted() -> None:
    rig = Rig(max_num_seqs=2, max_waiting_tokens=100, num_gpu_blocks=100)
    for i in range(6):
        rig.add(make_request(f"r{i}", 40, max_tokens=2))
    assert rig.core.stats().num_waiting_tokens == 80
    rig.run()
    ends = [rig.branch(f"r{i}").finish_reason for i in range(6)]
    assert ends.count(FinishReason.ERROR) == 4
    assert rig.core.stats().num_waiting_tokens == 0


def test_a_request_that_expires_in_the_queue_is_never_computed() -> None:
    rig = Rig(max_num_seqs=1)
    rig.add(make_request("runs", 8, max_tokens=40))
    rig.add(make_request("waits", 8))
    rig.step()
    before = rig.core.stats().prompt_tokens
    overdue(rig, "waits")
    rig.run()
    rig.check_solo("runs")
    assert rig.branch("waits").finish_reason is FinishReason.ERROR
    assert "while waiting" in (rig.branch("waits").error or "")
    assert rig.core.stats().prompt_tokens == before == 8


def test_a_request_that_expires_while_it_answers_keeps_what_it_has() -> None:
    rig = Rig()
    rig.add(make_request("long", 8, max_tokens=60))
    rig.add(make_request("other", 8, max_tokens=30))
    while len(rig.branch("long").token_ids) < 5:
        rig.step()
    overdue(rig, "long")
    rig.run()
    branch = rig.branch("long")
    assert branch.finish_reason is FinishReason.TIMEOUT
    assert 5 <= len(branch.token_ids) < 60
    rig.check_solo("other")


def test_a_deadline_that_has_passed_on_arrival_is_refused() -> None:
    rig = Rig()
    rig.core.add_request(CLIENT, make_request("late", deadline_s=time.monotonic() - 1.0))
    (output,) = [o for _, message, _ in rig.core.drain_outputs() for o in message.outputs]
    assert output.error_kind == DeadlineExceededError.__name__


def test_deadlines_hold_while_generation_is_paused() -> None:
    rig = Rig()
    rig.core.call(PauseGeneration("keep"))
    rig.add(make_request("r", 8, timeout_s=1e-6))
    while rig.branch("r").finish_reason is None:
        rig.deliver(rig.core.step())
    assert rig.core.num_open == 0


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_a_flood_of_one_tenant_does_not_starve_another(weight: float) -> None:
    rig = Rig(max_num_seqs=2, num_gpu_blocks=100)
    for i in range(60):
        rig.add(make_request(f"flood{i}", 16, max_tokens=4, tenant=1))
    for _ in range(4):
        rig.step()
    for i in range(20):
        rig.add(make_request(f"few{i}", 16, max_tokens=4, tenant=2, tenant_weight=weight))
    done: list[str] = []
    while rig.core.has_unfinished:
        rig.step()
        for (req_id, _), branch in rig.client.branches.items():
            if branch.finish_reason is not None and req_id not in done:
                done.append(req_id)
    last = max(done.index(f"few{i}") for i in range(20))
    num_before = sum(req_id.startswith("flood") for req_id in done[:last])
    assert num_before <= (20 / weight) + 8


def test_without_tenants_the_order_of_arrival_holds() -> None:
    rig = Rig(max_num_seqs=1)
    for i in range(8):
        rig.add(make_request(f"r{i}", 16 - i, max_tokens=2))
    rig.run()
    began = [rig.branch(f"r{i}").first_scheduled_time_s or 0.0 for i in range(8)]
    assert began == sorted(began)


def test_advice_follows_the_queue() -> None:
    rig = Rig(max_num_seqs=1)
    for i in range(8):
        rig.add(make_request(f"r{i}", 16))
    assert 1.0 <= rig.core.stats().retry_after_s <= 60.0
