"""What each wish of a row does to its logits, and in which order. CPU only."""

import math

import pytest
import torch
from torch import Tensor

from executor.input_batch import place_samples
from executor.request_states import RequestStates
from executor.sampler import Sampled, process_logits, sample_rows
from executor.sampling_states import Wish
from ipc.messages import RowParams
from tests.executor.builders import make_new_row, make_plan, make_states, peaked
from tests.executor.configs import VOCAB_SIZE


def make_row_states(
    *params: RowParams, token_ids: list[int] | None = None, num_prompt_tokens: int | None = None
) -> RequestStates:
    """One row per parameter set, all with the same tokens."""
    states = make_states()
    tokens = [1, 2, 3] if token_ids is None else token_ids
    states.apply(
        make_plan(
            [],
            new_rows=[
                make_new_row(i, tokens, num_prompt_tokens=num_prompt_tokens, params=p)
                for i, p in enumerate(params)
            ],
        )
    )
    return states


def processed(params: RowParams, logits: Tensor, **rows: object) -> Tensor:
    """The one row's logits after bans, biases and penalties."""
    states = make_row_states(params, **rows)  # type: ignore[arg-type]
    result = logits.clone()
    process_logits(result, place_samples_of(states, 1).rows, states)
    return result[0]


def place_samples_of(states: RequestStates, num_rows: int):  # type: ignore[no-untyped-def]
    return place_samples(torch.arange(num_rows).numpy(), states)


def sampled(states: RequestStates, logits: Tensor) -> Sampled:
    return sample_rows(logits.clone(), place_samples_of(states, logits.shape[0]), states)


def greedy(**fields: object) -> RowParams:
    return RowParams(seed=0, temperature=0.0, **fields)  # type: ignore[arg-type]


def test_a_greedy_batch_is_the_argmax() -> None:
    states = make_row_states(greedy(), greedy())

    assert sampled(states, peaked(4, 90)).token_ids.tolist() == [4, 90]


def test_a_greedy_row_stays_greedy_beside_a_random_one() -> None:
    states = make_row_states(greedy(), RowParams(seed=5, temperature=50.0))
    logits = peaked(4, 4)

    draws = [sampled(states, logits).token_ids.tolist() for _ in range(2)]

    assert draws[0] == draws[1], "a draw has no state"
    assert draws[0][0] == 4


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    flat = torch.zeros(3, VOCAB_SIZE)
    params = [RowParams(seed=s, temperature=1.0) for s in (7, 7, 8)]
    states = make_row_states(*params)

    first = sampled(states, flat).token_ids.tolist()
    states.num_tokens[0] += 1  # the next position
    second = sampled(states, flat).token_ids.tolist()

    assert first[0] == first[1] != first[2]
    assert second[0] != first[0]
    assert second[1:] == first[1:]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(RowParams(seed=1, temperature=9.0, top_k=1), id="top-k of one"),
        pytest.param(RowParams(seed=1, temperature=1.0, top_p=0.5), id="top-p"),
        pytest.param(RowParams(seed=1, temperature=1.0, min_p=0.9), id="min-p"),
        pytest.param(RowParams(seed=1, temperature=1e-6), id="a temperature near zero"),
    ],
)
def test_filters_reach_the_draw(params: RowParams) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 42] = 6.0
    states = make_row_states(params)

    for _ in range(20):  # twenty positions
        assert sampled(states, logits).token_ids.tolist() == [42]
        states.num_tokens[0] += 1


def test_allowed_ids_leave_nothing_else() -> None:
    logits = processed(greedy(allowed_token_ids=[3, 100, 31, 32]), peaked(50))

    assert torch.nonzero(logits > -math.inf).flatten().tolist() == [3, 31, 32, 100]


def test_logit_bias_is_added() -> None:
    raw = peaked(50)

    logits = processed(greedy(logit_bias=[(7, 2.5), (50, -100.0)]), raw)

    assert float(logits[7]) == pytest.approx(float(raw[0, 7]) + 2.5)
    assert float(logits[50]) == pytest.approx(float(raw[0, 50]) - 100.0)
    assert torch.equal(logits[8:50], raw[0, 8:50])


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    params = greedy(
        logit_bias=[(VOCAB_SIZE, 5.0), (10**6, 5.0)],
        allowed_token_ids=[3, 10**6],
        min_tokens=5,
        stop_token_ids=[10**6],
        bad_words_token_ids=[[10**6], [1, 10**6]],
    )

    logits = processed(params, peaked(50))

    assert torch.nonzero(logits > -math.inf).flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("word", "is_banned"),
    [
        pytest.param([9], True, id="a single token always"),
        pytest.param([3, 9], True, id="the token before matches"),
        pytest.param([2, 3, 9], True, id="both tokens before match"),
        pytest.param([1, 3, 9], False, id="the second token before differs"),
        pytest.param([1, 2, 3, 9], True, id="the whole row matches"),
        pytest.param([0, 1, 2, 3, 9], False, id="longer than the row"),
        pytest.param([2, 9], False, id="an earlier token matches"),
    ],
)
def test_a_bad_word_bans_its_last_token(word: list[int], is_banned: bool) -> None:
    raw = peaked(9)

    logits = processed(greedy(bad_words_token_ids=[word]), raw, token_ids=[1, 2, 3])

    assert (float(logits[9]) == -math.inf) is is_banned
    others = torch.arange(VOCAB_SIZE) != 9
    assert torch.equal(logits[others], raw[0][others])


def test_bad_words_of_several_lengths_and_rows_in_one_batch() -> None:
    states = make_row_states(
        greedy(bad_words_token_ids=[[3, 9], [5, 8], [1, 2, 3, 7]]),
        greedy(),
        greedy(bad_words_token_ids=[[2, 3, 6]]),
    )
    logits = torch.zeros(3, VOCAB_SIZE)

    process_logits(logits, place_samples_of(states, 3).rows, states)

    banned = [torch.nonzero(row == -math.inf).flatten().tolist() for row in logits]
    assert banned == [[7, 9], [], [6]]


def test_stop_tokens_are_banned_until_min_tokens_are_out() -> None:
    params = greedy(min_tokens=2, stop_token_ids=[50, 51])
    states = make_row_states(params, token_ids=[1, 2, 3], num_prompt_tokens=2)
    rows = place_samples_of(states, 1).rows

    early = peaked(50)
    process_logits(early, rows, states)
    assert float(early[0, 50]) == float(early[0, 51]) == -math.inf

    states.num_tokens[0] += 1
    late = peaked(50)
    process_logits(late, rows, states)
    assert torch.equal(late, peaked(50))
    assert not states.sampling.flags[0] & Wish.MIN_TOKENS, "from here on it costs nothing"


def test_penalties_count_output_and_repetition_the_prompt_too() -> None:
    raw = torch.ones(1, VOCAB_SIZE)
    raw[0, 1] = -1.0
    params = greedy(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)

    logits = processed(params, raw, token_ids=[1, 2, 3, 3, 4], num_prompt_tokens=2)

    assert logits[:6].tolist() == [
        1.0,  # never seen
        -2.0,  # in the prompt, negative: multiplied
        0.5,  # in the prompt, positive: divided
        0.5 - 0.5 - 0.25 * 2,  # twice in the output
        0.5 - 0.5 - 0.25,
        1.0,
    ]


def test_penalties_touch_only_the_rows_that_ask() -> None:
    states = make_row_states(greedy(), greedy(repetition_penalty=2.0), greedy())
    logits = torch.ones(3, VOCAB_SIZE)

    process_logits(logits, place_samples_of(states, 3).rows, states)

    assert logits[0].tolist() == logits[2].tolist() == [1.0] * VOCAB_SIZE
    assert logits[1, :5].tolist() == [1.0, 0.5, 0.5, 0.5, 1.0]


def test_bans_come_before_penalties_and_both_before_the_draw() -> None:
    params = RowParams(
        seed=3,
        temperature=1.0,
        top_k=1,
        logit_bias=[(3, 20.0)],
        bad_words_token_ids=[[50]],
        repetition_penalty=4.0,
    )
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 50], logits[0, 60] = 100.0, 6.0
    # The bias makes token 3 the best, 20 against 6; as part of the prompt it is then divided to 5.
    states = make_row_states(params, token_ids=[1, 2, 3])

    assert sampled(states, logits).token_ids.tolist() == [60]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nan_is_bad_and_alone(temperature: float) -> None:
    states = make_row_states(*[RowParams(seed=0, temperature=temperature)] * 3)
    logits = peaked(4, 5, 6)
    logits[1, 77] = math.nan

    result = sampled(states, logits)

    assert result.is_bad.tolist() == [False, True, False]
    assert 0 <= int(result.token_ids[1]) < VOCAB_SIZE


def test_a_row_without_any_token_left_is_bad() -> None:
    params = greedy(allowed_token_ids=[4], min_tokens=9, stop_token_ids=[4])
    states = make_row_states(greedy(), params)

    result = sampled(states, peaked(4, 4))

    assert result.is_bad.tolist() == [False, True]


def test_a_plain_batch_reads_nothing_but_its_flags() -> None:
    states = make_row_states(greedy(), greedy())
    states.sampling.wishes = [None] * 8  # any look at a row's wishes would now fail

    assert sampled(states, peaked(4, 5)).token_ids.tolist() == [4, 5]
