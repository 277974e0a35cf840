"""What the scheduler learns of steps' times, and what follows for a step's prompt tokens."""

from collections.abc import Callable

import pytest

from engine_core.step_cost import StepCost

DECODE_S = 0.005


def reads_or_multiplies(num_prompt_tokens: int) -> float:
    """A GPU: weights are read, or products computed, whichever takes longer."""
    return max(DECODE_S, num_prompt_tokens * 0.00002)


def reads_and_multiplies(num_prompt_tokens: int) -> float:
    """One after the other."""
    return DECODE_S + num_prompt_tokens * 0.00002


def learnt(max_slowdown: float = 3.0) -> StepCost:
    """A decode takes 5 ms, as long as 250 prompt tokens."""
    cost = StepCost(max_slowdown)
    for _ in range(50):
        cost.note(0, DECODE_S)
        cost.note(500, reads_or_multiplies(500))
    return cost


def test_nothing_is_limited_before_both_costs_are_known() -> None:
    cost = StepCost(3.0)
    assert cost.max_prompt_tokens(100) is None
    cost.note(400, 0.010)
    assert cost.max_prompt_tokens(100) is None
    assert cost.expected_s(0) is None
    cost.note(0, 0.005)
    assert cost.max_prompt_tokens(100) == 600


def test_a_step_may_take_so_many_times_a_decode() -> None:
    assert learnt(3.0).max_prompt_tokens(100) == pytest.approx(750, abs=2)
    assert learnt(2.0).max_prompt_tokens(100) == pytest.approx(500, abs=2)


@pytest.mark.parametrize("lasts_s", [reads_or_multiplies, reads_and_multiplies])
@pytest.mark.parametrize("first", [40, 5000])
@pytest.mark.parametrize("max_slowdown", [1.5, 2.0, 4.0])
def test_chunks_come_to_take_the_time_that_is_allowed(
    max_slowdown: float, first: int, lasts_s: Callable[[int], float]
) -> None:
    cost = StepCost(max_slowdown)
    cost.note(first, lasts_s(first))
    for _ in range(200):
        cost.note(0, DECODE_S)
        chunk = cost.max_prompt_tokens(0)
        assert chunk is not None
        cost.note(chunk, lasts_s(chunk))
        cost.note(50, lasts_s(50))  # short prompts come in between, and say less
    assert lasts_s(chunk) == pytest.approx(max_slowdown * DECODE_S, rel=0.1)


def test_a_step_is_expected_to_last_as_those_before_it() -> None:
    cost = learnt()
    assert cost.expected_s(0) == cost.expected_s(100) == pytest.approx(DECODE_S)
    assert cost.expected_s(1000) == pytest.approx(0.020)


def test_chunks_grow_with_what_waits() -> None:
    assert learnt().max_prompt_tokens(8000) == 1000


def test_zero_limits_nothing() -> None:
    assert learnt(0.0).max_prompt_tokens(100) is None


def test_chunks_have_a_least_size() -> None:
    cost = StepCost(2.0)
    cost.note(0, 0.001)
    cost.note(500, 0.050)
    assert cost.max_prompt_tokens(10) == 64  # 2 ms would be 20


def test_an_outlier_moves_the_estimate_by_little() -> None:
    cost = learnt()
    before = cost.max_prompt_tokens(0)
    assert before is not None
    cost.note(0, 10.0)
    after = cost.max_prompt_tokens(0)
    assert after is not None
    assert before < after < 1.5 * before


def test_answers_that_say_nothing_teach_nothing() -> None:
    cost = learnt()
    before = cost.max_prompt_tokens(0)
    cost.note(0, 0.0)
    cost.note(8, 1.0)  # a few tokens of a prompt say little about one
    assert cost.max_prompt_tokens(0) == before


def test_short_steps_are_known_by_their_decodes() -> None:
    assert not StepCost(0.0).decodes_within(1.0)
    assert learnt().decodes_within(0.006)
    assert not learnt().decodes_within(0.004)
