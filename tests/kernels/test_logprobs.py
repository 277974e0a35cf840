"""Log-probabilities: the definition by hand, then both paths against it."""

import math

import pytest
import torch

from kernels import logprobs
from tests.kernels.cases import assert_close, random

# A row of NaN makes inf - inf, as it would on a GPU, where nobody remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def test_definition_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]]).log() + 7

    chosen, rank, top_ids, top = logprobs.token_logprobs_reference(logits, torch.tensor([3]), 1)

    assert chosen.item() == pytest.approx(math.log(0.2), abs=1e-6)
    assert rank.tolist() == [2]  # equal tokens share the better rank
    assert top_ids.tolist() == [[2]]
    assert top.item() == pytest.approx(math.log(0.4), abs=1e-6)


@pytest.mark.parametrize("run", [logprobs.token_logprobs, logprobs.token_logprobs_triton])
@pytest.mark.parametrize(
    ("B", "V", "k"), [(4, 5000, 5), (2, 3, 3), (3, 40, 0), (0, 7, 2), (2, 9001, 33), (1, 4100, 32)]
)
def test_both_paths_equal_the_definition(run, B: int, V: int, k: int) -> None:
    logits = random(B, V) * 4
    logits[: B // 2, 1] = -torch.inf
    token_ids = (torch.arange(B) * 977 + 2) % V

    results = run(logits, token_ids, k)

    expected = logprobs.token_logprobs_reference(logits, token_ids, k)
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.dtype == wanted.dtype
    assert_close(results[0], expected[0])
    assert results[1].equal(expected[1])
    assert_close(results[3], expected[3])
    finite = expected[3].isfinite()
    assert results[2][finite].equal(expected[2][finite])


def test_the_lowest_of_equal_tokens_are_named_and_bad_rows_harm_nobody() -> None:
    logits = torch.zeros(3, 9000)
    logits[0, 5000:] = 1.0
    logits[1, 17:] = -torch.inf
    logits[2] = torch.nan

    chosen, rank, top_ids, top = logprobs.token_logprobs_triton(logits, torch.tensor([4, 3, 2]), 20)

    assert top_ids[0].tolist() == list(range(5000, 5020))
    assert top_ids[1].tolist() == list(range(20))
    assert ((top_ids >= 0) & (top_ids < 9000)).all()
    assert rank[:2].tolist() == [4001, 1]
    assert chosen[1].item() == pytest.approx(-math.log(17), abs=1e-5)
    assert top[1, 16].item() == pytest.approx(-math.log(17), abs=1e-5)
    assert top[1, 17].item() == -math.inf


def test_arguments_that_do_not_fit_are_refused() -> None:
    logits, ids = random(2, 10), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="float32"):
        logprobs.token_logprobs(logits.half(), ids, 1)
    with pytest.raises(ValueError, match="int64"):
        logprobs.token_logprobs(logits, ids.int(), 1)
    with pytest.raises(ValueError, match="within 0 and the vocabulary"):
        logprobs.token_logprobs(logits, ids, 11)
    with pytest.raises(ValueError, match="token_ids must be contiguous"):
        logprobs.token_logprobs(logits, torch.tensor([0, 1, 2, 3])[::2], 1)
