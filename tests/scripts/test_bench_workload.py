"""The suite's inputs are those that other engines were given: known sums and known first ids."""

import bench_workload
import pytest
from bench_workload import FULL

IDS = (1000, 100_000)


def test_chat_like_requests_are_the_ones_that_the_peer_was_measured_with() -> None:
    work = bench_workload.sharegpt_like(FULL.sharegpt_requests, IDS)
    assert (work.num_input_tokens, work.num_output_tokens) == (226_171, 201_317)
    assert all(4 <= len(prompt) <= 1024 for prompt in work.prompts)


@pytest.mark.parametrize(
    ("rate", "num_requests", "num_input", "num_output"),
    [(10, 640, 150_935, 119_098), (40, 2463, 579_796, 497_616)],
    ids=["10 per second", "40 per second"],
)
def test_a_minute_of_arrivals_is_the_one_that_the_peer_was_measured_with(
    rate: float, num_requests: int, num_input: int, num_output: int
) -> None:
    arrivals_s = bench_workload.poisson_arrivals_s(rate, FULL.serve_s)
    assert len(arrivals_s) == num_requests
    assert arrivals_s == sorted(arrivals_s)
    work = bench_workload.sharegpt_like(num_requests, IDS)
    assert (work.num_input_tokens, work.num_output_tokens) == (num_input, num_output)


def test_prompts_depend_on_the_seed_alone() -> None:
    one = bench_workload.fixed(3, 128, 256, IDS)
    assert one == bench_workload.fixed(3, 128, 256, IDS)
    assert one.prompts[0][:4] == [47845, 51670, 75761, 95095]
    assert one.prompts[0] != one.prompts[1]


def test_requests_with_a_common_prefix_differ_behind_it() -> None:
    def make(seed: int) -> list[list[int]]:
        lens = (32, 8, 4)
        return bench_workload.shared_prefix(3, lens, IDS, prefix_seed=10, seed=seed).prompts

    first, second = make(11), make(12)
    assert len({tuple(prompt[:32]) for prompt in first + second}) == 1
    assert len({tuple(prompt[32:]) for prompt in first + second}) == 6
    assert {len(prompt) for prompt in first} == {40}


def test_scaling_shrinks_lengths_and_leaves_at_least_four_tokens() -> None:
    work = bench_workload.sharegpt_like(50, (300, 8000), scale=0.05)
    assert min(map(len, work.prompts)) == 4
    assert max(map(len, work.prompts)) <= 51
    assert all(300 <= token_id < 8000 for prompt in work.prompts for token_id in prompt)
