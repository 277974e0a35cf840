"""Branches, groups and their moves."""

import pytest

from engine_core.request import Request, RequestGroup, RequestStatus, branch_seed, make_branch
from ipc.messages import FinishReason, RowParams
from ipc.sampling_params import SamplingParams


def make_group(num_branches: int = 1, prompt: tuple[int, ...] = (1, 2, 3)) -> RequestGroup:
    params = SamplingParams(n=num_branches, seed=1, stop_token_ids=[9])
    group = RequestGroup(b"c", "r", list(prompt), params, frozenset({0}), 0.0, b"root")
    for index in range(num_branches):
        make_branch(group, index, RowParams(1, 1.0), order=(0, 1, index), max_output_tokens=4)
    return group


def make_branch_with(output: list[int]) -> Request:
    branch = make_group().branches[0]
    branch.output_token_ids.extend(output)
    return branch


def test_branch_zero_keeps_the_seed_and_others_derive_theirs() -> None:
    assert branch_seed(42, 0) == 42
    seeds = {branch_seed(seed, index) for seed in (-(2**63), 0, 42) for index in range(128)}
    assert len(seeds) == 3 * 128
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_derived_seeds_never_change() -> None:
    # Resubmitted branches continue with them after a restart, maybe of another version.
    assert branch_seed(42, 1) == 6898827997664288301


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("end", range(6))
def test_a_slice_spans_prompt_and_output(start: int, end: int) -> None:
    branch = make_branch_with([4, 5])
    assert branch.token_slice(start, end) == [1, 2, 3, 4, 5][start:end]


def test_tokens_owed_count_placeholders() -> None:
    branch = make_branch_with([4])
    branch.num_output_placeholders = 2
    branch.num_computed_tokens = 4
    assert branch.num_tokens_owed == 2


def test_a_finished_branch_moves_no_more() -> None:
    branch = make_branch_with([])
    branch.finish(FinishReason.ABORT)
    for status in RequestStatus:
        with pytest.raises(AssertionError):
            branch.move_to(status)


def test_a_waiting_branch_cannot_be_preempted() -> None:
    with pytest.raises(AssertionError, match="WAITING -> SWAPPED"):
        make_branch_with([]).move_to(RequestStatus.SWAPPED)


def test_a_group_ends_with_its_last_branch() -> None:
    group = make_group(2)
    group.branches[0].finish(FinishReason.STOP)
    assert not group.is_finished
    group.branches[1].finish(FinishReason.ABORT)
    assert group.is_finished


def test_only_prompts_of_earlier_steps_can_be_forked_from() -> None:
    group = make_group(2)
    leader = group.branches[0]
    leader.move_to(RequestStatus.RUNNING)
    assert group.is_computing_prompt(step_id=5)
    leader.prompt_done_step_id = 5
    assert group.prompt_holder(before_step_id=5) is None
    assert group.is_computing_prompt(step_id=5)
    assert group.prompt_holder(before_step_id=6) is leader
    assert not group.is_computing_prompt(step_id=6)
