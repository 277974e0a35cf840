"""A plan in the making."""

from engine_core.kv_cache_manager import Transfers
from engine_core.request import Request, UserLogits
from engine_core.step_builder import StepBuilder
from tests.engine_core.test_kv_cache_manager import make_requests


def make_request(row: int) -> Request:
    (request,) = make_requests(4)
    request.row = row
    return request


def make_step() -> StepBuilder:
    return StepBuilder(7, max_tokens=32, now_s=1.5)


def test_decodes_stand_before_prefills_in_every_list() -> None:
    step = make_step()
    prefill, decode, chunk = (make_request(row) for row in (3, 1, 2))
    step.add(prefill, 4, num_owed=4)
    step.add(decode, 1, num_owed=1)
    step.add(chunk, 5, num_owed=9)
    assert step.token_budget == 22
    plan, _, in_flight = step.build([9], Transfers())
    assert (plan.rows, plan.num_new_tokens, plan.freed_rows) == ([1, 3, 2], [1, 4, 5], [9])
    assert in_flight.sampling == [decode, prefill]
    assert in_flight.requests_by_row() == {1: decode, 3: prefill, 2: chunk}
    assert in_flight.num_tokens == 10


def test_a_last_chunk_of_one_token_needs_no_counts() -> None:
    step = make_step()
    chunk, decode = make_request(0), make_request(1)
    step.add(chunk, 1, num_owed=2)
    step.add(decode, 1, num_owed=1)
    plan, _, in_flight = step.build([], Transfers())
    assert (plan.rows, plan.num_new_tokens) == ([1, 0], [])
    assert in_flight.sampling == [decode]


def test_rows_sampled_from_the_users_logits_stand_last_and_bring_their_frames() -> None:
    step = make_step()
    users, other, sampled = (make_request(row) for row in (0, 1, 2))
    users.user_logits = UserLogits()
    step.add(users, 1, num_owed=1)  # computes, but its logits travel
    step.add(other, 1, num_owed=1)
    step.add_sample(sampled, b"logits", vocab_size=5)
    plan, frames, in_flight = step.build([], Transfers())
    assert plan.rows == [0, 1]
    assert [sample.row for sample in plan.sample_rows] == [2]
    assert frames[plan.sample_rows[0].logits.frame] == b"logits"
    assert in_flight.sampling == [other, sampled]
    assert in_flight.requests_by_row() == {0: users, 1: other, 2: sampled}


def test_a_step_is_empty_until_something_computes_or_samples() -> None:
    step = make_step()
    assert step.is_empty
    step.add_sample(make_request(0), b"", vocab_size=5)
    assert not step.is_empty
