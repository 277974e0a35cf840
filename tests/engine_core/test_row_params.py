"""What workers are told of sampling parameters."""

from engine_core.request import branch_seed
from engine_core.row_params import make_row_params
from tests.engine_core.builders import make_request
from tests.engine_core.simulated_executor import VOCAB_SIZE


def test_greedy_is_temperature_zero_and_filters_that_do_nothing_are_off() -> None:
    params = make_row_params(make_request("a", temperature=1e-7, top_k=5), 0, VOCAB_SIZE)
    assert params.temperature == 0.0
    assert params.top_k == 0
    params = make_row_params(make_request("a", top_k=2**40), 0, VOCAB_SIZE)
    assert params.top_k == 0


def test_end_of_text_is_a_stop_unless_ignored() -> None:
    request = make_request("a", eos_token_ids=[3], stop_token_ids=[5, 2])
    assert make_row_params(request, 0, VOCAB_SIZE).stop_token_ids == [2, 3, 5]
    request = make_request("a", eos_token_ids=[3], stop_token_ids=[5], ignore_eos=True)
    assert make_row_params(request, 0, VOCAB_SIZE).stop_token_ids == [5]


def test_what_can_never_be_sampled_does_not_reach_the_worker() -> None:
    request = make_request(
        "a", stop_token_ids=[VOCAB_SIZE], bad_words_token_ids=[[1, VOCAB_SIZE], [2, 3], []]
    )
    params = make_row_params(request, 0, VOCAB_SIZE)
    assert params.stop_token_ids == []
    assert params.bad_words_token_ids == [[2, 3]]


def test_branches_differ_in_seed_and_only_the_first_reports_the_prompt() -> None:
    request = make_request("a", n=2, seed=5, prompt_logprobs=2, logprobs=-1)
    first, second = (make_row_params(request, i, VOCAB_SIZE) for i in range(2))
    assert (first.seed, second.seed) == (5, branch_seed(5, 1))
    assert (first.num_prompt_logprobs, second.num_prompt_logprobs) == (2, None)
    assert first.num_logprobs == second.num_logprobs == -1
