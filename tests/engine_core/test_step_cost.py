"""What the scheduler learns of steps' times, and what follows for a step's prompt tokens."""

import pytest

from engine_core.step_cost import StepCost


def learnt(max_slowdown: float = 3.0) -> StepCost:
    """Decodes take 5 ms, a prompt token adds 0.02 ms."""
    cost = StepCost(max_slowdown)
    for _ in range(50):
        cost.note(0, 8, 0.005)
        cost.note(500, 8, 0.005 + 500 * 0.00002)
    return cost


def test_nothing_is_limited_before_both_costs_are_known() -> None:
    cost = StepCost(3.0)
    assert cost.max_prompt_tokens(100) is None
    cost.note(400, 0, 0.010)
    assert cost.max_prompt_tokens(100) is None
    cost.note(0, 4, 0.005)
    assert cost.max_prompt_tokens(100) == 400


def test_a_step_may_take_so_many_times_a_decode() -> None:
    assert learnt(3.0).max_prompt_tokens(100) == pytest.approx(500, abs=2)
    assert learnt(2.0).max_prompt_tokens(100) == pytest.approx(250, abs=2)


def test_chunks_grow_with_what_waits() -> None:
    assert learnt().max_prompt_tokens(8000) == 1000


def test_zero_limits_nothing() -> None:
    assert learnt(0.0).max_prompt_tokens(100) is None


def test_chunks_have_a_least_size() -> None:
    assert learnt(1.01).max_prompt_tokens(10) == 64


def test_an_outlier_moves_the_estimate_by_little() -> None:
    cost = learnt()
    before = cost.max_prompt_tokens(0)
    assert before is not None
    cost.note(0, 8, 10.0)
    after = cost.max_prompt_tokens(0)
    assert after is not None
    assert before < after < 1.5 * before


def test_answers_that_say_nothing_teach_nothing() -> None:
    cost = learnt()
    before = cost.max_prompt_tokens(0)
    cost.note(0, 8, 0.0)
    cost.note(8, 8, 1.0)  # a few tokens of a prompt say little about one
    assert cost.max_prompt_tokens(0) == before


def test_short_steps_are_known_by_their_decodes() -> None:
    assert not StepCost(0.0).decodes_within(1.0)
    assert learnt().decodes_within(0.006)
    assert not learnt().decodes_within(0.004)
