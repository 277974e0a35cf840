"""The CPU path of sampling: candidates that are not enough, and rows of every kind at once."""

import torch

from kernels import sampling
from kernels.sampling_cpu import sample_cpu
from tests.kernels.cases import random, sampling_rows


def test_rows_that_need_more_candidates_get_them() -> None:
    # Flat rows: no 256 tokens hold 99.9 % of the mass, and top-k 3000 asks for more by itself.
    num_rows = 30
    logits = random(num_rows, 20_000) * 0.1
    rows = sampling_rows(
        num_rows,
        top_p=[0.999, 0.9, 0.02] * 10,
        top_k=([0] * 15) + [3000] * 15,
        min_p=([0.0] * 5 + [0.9]) * 5,
    )

    expected = sampling.sample_reference(logits, rows)

    assert sample_cpu(logits, rows, True).equal(expected)


def test_ties_at_the_last_candidate_are_not_cut() -> None:
    # 400 equal tokens: the first 256 candidates cannot tell who else belongs.
    logits = torch.full((50, 2000), -3.0)
    logits[:, 100:500] = 2.0
    rows = sampling_rows(50, top_k=[10] * 50)

    drawn = sample_cpu(logits, rows, True)

    assert drawn.equal(sampling.sample_reference(logits, rows))
    assert drawn.min() < 200
    assert drawn.max() > 400


def test_greedy_plain_and_filtered_rows_mix() -> None:
    logits = random(6, 700) * 2
    rows = sampling_rows(6, temperature=[0, 1, 1, 0, 0.7, 2], top_k=[0, 0, 5, 5, 0, 700])

    assert sample_cpu(logits, rows, True).equal(sampling.sample_reference(logits, rows))
