"""Sampling: what the filters keep, how often each token is drawn, and which rows are bad."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import sampling
from kernels.sampling_cpu import Rows, sample_cpu
from tests.kernels.cases import FILTERS, filter_logits, random, sampling_rows

# A row of nothing but bans makes inf - inf, as it would on a GPU, where nobody remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

Path = Callable[[Tensor, Rows, bool], Tensor]


def triton_ids(logits: Tensor, rows: Rows, any_filter: bool) -> Tensor:
    return sampling.sample_triton(logits, rows, any_filter).token_ids


PATHS = [pytest.param(sample_cpu, id="cpu"), pytest.param(triton_ids, id="triton")]


def kept_tokens(logits: list[float], **filters: float) -> list[int]:
    """Which tokens a thousand draws of the definition ever return."""
    rows = sampling_rows(1000, **{name: [value] * 1000 for name, value in filters.items()})
    drawn = sampling.sample(torch.tensor([logits]).repeat(1000, 1), **rows._asdict())
    return sorted(set(drawn.token_ids.tolist()))


PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]
LOGITS = [math.log(p) for p in PROBABILITIES]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        pytest.param({}, [0, 1, 2, 3, 4], id="none"),
        pytest.param({"top_k": 2}, [1, 3], id="top-k"),
        pytest.param({"top_k": 5}, [0, 1, 2, 3, 4], id="top-k of all"),
        pytest.param({"top_p": 0.39}, [1], id="top-p within the first"),
        pytest.param({"top_p": 0.41}, [1, 3], id="top-p takes the token that crosses it"),
        pytest.param({"top_p": 0.86}, [1, 2, 3, 4], id="top-p of most"),
        pytest.param({"min_p": 0.45}, [1, 3, 4], id="min-p, relative to the likeliest"),
        pytest.param({"min_p": 1.0}, [1], id="min-p of one keeps the likeliest"),
        # Of [.4 .25 .2 .1] min-p .3 keeps [.4 .25 .2]; renormalised .4 / .85 = .47.
        pytest.param({"min_p": 0.3, "top_p": 0.46}, [1], id="top-p after min-p"),
        # Of the two kept the first has .4 / .65 = .615.
        pytest.param({"top_k": 2, "top_p": 0.61}, [1], id="top-p after top-k: below"),
        pytest.param({"top_k": 2, "top_p": 0.62}, [1, 3], id="top-p after top-k: above"),
        # At temperature 2 the likeliest has .4 ** .5 / 2.1 = .30, before it was .4.
        pytest.param({"temperature": 2.0, "top_p": 0.35}, [1, 3], id="temperature comes first"),
        pytest.param({"temperature": 0.0}, [1], id="greedy"),
        pytest.param({"top_p": 1e-9}, [1], id="one token always stays"),
    ],
)
def test_filters_keep_what_their_definition_says(
    filters: dict[str, float], kept: list[int]
) -> None:
    assert kept_tokens(LOGITS, **filters) == kept


def test_equal_tokens_stay_or_go_together() -> None:
    tied = [0.0, 1.0, 1.0, 1.0]

    assert kept_tokens(tied, top_k=1) == [1, 2, 3]
    assert kept_tokens(tied, top_k=3) == [1, 2, 3]
    assert kept_tokens(tied, top_p=0.1) == [1, 2, 3]
    assert kept_tokens(tied, temperature=0.0) == [1]  # the lowest id, when there is no noise


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        pytest.param({}, PROBABILITIES, id="plain"),
        pytest.param({"temperature": 0.5}, [p * p for p in PROBABILITIES], id="temperature"),
        pytest.param({"top_k": 3}, [0, 0.4, 0, 0.25, 0.2], id="top-k"),
        pytest.param({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2], id="top-p"),
        pytest.param({"min_p": 0.25}, [0, 0.4, 0.1, 0.25, 0.2], id="min-p"),
        pytest.param(
            {"min_p": 0.2, "top_k": 3, "top_p": 0.6}, [0, 0.4, 0, 0.25, 0], id="all together"
        ),
    ],
)
def test_draws_follow_the_distribution(filters: dict[str, float], expected: list[float]) -> None:
    num_draws = 50_000
    parameters = {name: [value] * num_draws for name, value in filters.items()}
    rows = sampling_rows(num_draws, seeds=[1234] * num_draws, **parameters)
    rows = rows._replace(positions=torch.arange(num_draws))
    logits = torch.tensor([LOGITS]).repeat(num_draws, 1)

    token_ids = sampling.sample(logits, **rows._asdict()).token_ids
    counts = torch.bincount(token_ids, minlength=5).double()

    possible = torch.tensor(expected) > 0
    wanted = torch.tensor(expected).double()[possible] / sum(expected) * num_draws
    assert not counts[~possible].any()
    chi_square = ((counts[possible] - wanted) ** 2 / wanted).sum().item()
    freedom = len(wanted) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("vocab_size", [5000, 130])
def test_every_combination_of_filters_equals_definition(run: Path, vocab_size: int) -> None:
    logits, rows = filter_logits(vocab_size), sampling_rows(12, **FILTERS)
    before = logits.clone()

    token_ids = run(logits, rows, True)

    assert token_ids.tolist() == sampling.sample_reference(logits, rows).tolist()
    assert logits.equal(before)
    for b in range(12):  # alone each row draws what it drew in company
        alone = run(logits[b : b + 1], Rows(*(column[b : b + 1] for column in rows)), True)
        assert alone[0] == token_ids[b]


WIDE: dict[str, list[float]] = {
    "temperature": [1, 1, 1, 1, 1, 1, 0.01, 3, 1],
    "top_k": [400, 600, 2000, 5000, 0, 0, 0, 0, 1500],
    "top_p": [1, 0.9, 0.5, 0.9, 0.5, 0.99, 0.9, 0.8, 0.6],
    "min_p": [0, 0, 0, 0, 0, 0, 0, 1e-3, 1e-4],
}


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("spread", [0.2, 2.0])
def test_filters_that_keep_many_equal_definition(run: Path, spread: float) -> None:
    # From a few hundred tokens, looked at one by one, to more than are looked for at all.
    logits, rows = random(9, 7001) * spread, sampling_rows(9, **WIDE)
    logits[0] = logits[0].round(decimals=1)  # with ties at the threshold
    logits[8, ::3] = -torch.inf

    assert run(logits, rows, True).tolist() == sampling.sample_reference(logits, rows).tolist()


@pytest.mark.parametrize("run", PATHS)
def test_rows_without_filters_equal_definition(run: Path) -> None:
    rows = sampling_rows(12, temperature=FILTERS["temperature"])
    for vocab_size in (1, 33, 5000):
        logits = filter_logits(max(8, vocab_size))[:, :vocab_size].contiguous()

        token_ids = run(logits, rows, False)

        assert token_ids.tolist() == sampling.sample_reference(logits, rows).tolist()


@pytest.mark.parametrize("run", PATHS)
def test_no_rows_draw_nothing(run: Path) -> None:
    assert run(random(0, 5), sampling_rows(0), True).shape == (0,)


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_rows_with_a_nan_or_without_a_token_are_bad_and_alone(path: str) -> None:
    columns = {name: values[:4] * 3 for name, values in FILTERS.items()}
    logits, rows = random(12, 3000), sampling_rows(12, **columns)
    logits[[1, 2, 4], 2345] = math.nan
    logits[3] = logits[7] = logits[9] = -math.inf
    logits[9, 17] = math.nan
    bad = sampling.is_bad_reference(logits)
    run = sampling.sample if path == "cpu" else sample_through_triton

    for any_filter in (True, False):
        parameters = rows if any_filter else sampling_rows(12, temperature=columns["temperature"])
        sampled = run(logits, **parameters._asdict(), any_filter=any_filter)

        assert sampled.is_bad.tolist() == bad.tolist()
        good = ~bad
        alone = sampling.sample_reference(logits[good], Rows(*(c[good] for c in parameters)))
        assert sampled.token_ids[good].tolist() == alone.tolist()
        assert ((sampled.token_ids >= 0) & (sampled.token_ids < 3000)).all()


def sample_through_triton(
    logits: Tensor, *, any_filter: bool, **columns: Tensor
) -> sampling.Sampled:
    return sampling.sample_triton(logits, Rows(**columns), any_filter)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    logits, rows = random(2, 9), sampling_rows(2)
    with pytest.raises(ValueError, match=r"\[B, V\] float32"):
        sampling.sample(logits.half(), **rows._asdict())
    with pytest.raises(ValueError, match=r"must be \[2\]"):
        sampling.sample(logits, **rows._replace(top_k=rows.top_k[:1])._asdict())
    with pytest.raises(ValueError, match="int32"):
        sampling.sample(logits, **rows._replace(top_k=rows.top_k.long())._asdict())
    with pytest.raises(ValueError, match="contiguous"):
        sampling.sample(random(9, 2).t(), **rows._asdict())
