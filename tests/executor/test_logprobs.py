"""Log-probabilities against a plain log-softmax. CPU only."""

import pytest
import torch

from executor import logprobs
from executor.input_batch import pack_rows
from executor.logprobs import compute_logprobs, prompt_logprobs
from ipc.messages import RowParams, TokenLogprobs
from tests.executor.builders import make_new_row, make_plan, make_states, peaked
from tests.executor.configs import VOCAB_SIZE

ASKING = RowParams(seed=0, temperature=0.0, num_prompt_logprobs=2)


def test_each_position_gets_as_many_as_it_asked_for() -> None:
    logits = peaked(4, 5, 6)
    expected = logits.log_softmax(-1)

    parts = compute_logprobs(logits, torch.tensor([4, 9, 6]), [2, 0, -1]).unpack()

    assert [len(part.token_ids) for part in parts] == [3, 1, 1 + VOCAB_SIZE]
    assert [part.rank for part in parts] == [1, int((logits[1] >= logits[1, 9]).sum()), 1]
    for row, part in enumerate(parts):
        wanted = expected[row, part.token_ids].tolist()
        assert part.logprobs == pytest.approx(wanted, abs=1e-5)
    assert parts[0].token_ids[0] == parts[0].token_ids[1] == 4, "the chosen one leads, and repeats"


def collect(
    tokens: list[int], chunks: list[int], params: RowParams = ASKING, num_sent: int = 0
) -> list[list[TokenLogprobs]]:
    """Prompt log-probabilities per chunk, where hidden states stand for logits."""
    states = make_states()
    row = make_new_row(3, tokens, params=params, num_prompt_logprobs_sent=num_sent)
    states.apply(make_plan([], new_rows=[make_new_row(1, [8, 8, 8]), row]))
    all_logits = peaked(*range(len(tokens)))
    found = []
    done = 0
    for i, chunk in enumerate(chunks):
        rows, counts = ([1, 3], [3, chunk]) if i == 0 else ([3], [chunk])
        packed = pack_rows(make_plan(rows, counts), states)
        mates = torch.zeros(3 if i == 0 else 0, VOCAB_SIZE)
        hidden = torch.cat([mates, all_logits[done : done + chunk]])
        parts = prompt_logprobs(packed, states, hidden, lambda h: h)
        found.append([part for _, slices in parts for one in slices for part in one.unpack()])
        assert all(found_row == 3 for found_row, _ in parts)
        states.advance(packed.rows, packed.num_new_tokens)
        done += chunk
    return found


@pytest.mark.parametrize(
    ("chunks", "per_chunk"),
    [
        pytest.param([6], [5], id="whole: every position but the first"),
        pytest.param([2, 3, 1], [2, 3, 0], id="chunks: the last token predicts no prompt token"),
        pytest.param([5, 1], [5, 0], id="all but the last token"),
    ],
)
def test_prompt_positions_come_once_and_in_order(chunks: list[int], per_chunk: list[int]) -> None:
    tokens = [10, 11, 12, 13, 14, 15]

    found = collect(tokens, chunks)

    assert [len(parts) for parts in found] == per_chunk
    joined = [part for parts in found for part in parts]
    expected = peaked(*range(6)).log_softmax(-1)
    assert [part.token_ids[0] for part in joined] == tokens[1:]
    for position, part in enumerate(joined):
        assert part.token_ids[1] == position, "the peak of the position before"
        assert part.logprobs[0] == pytest.approx(
            float(expected[position, tokens[position + 1]]), abs=1e-5
        )


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect([10, 11, 12, 13, 14, 15], [6])
    monkeypatch.setattr(logprobs, "MAX_SLICE_BYTES", 2 * 4 * VOCAB_SIZE)

    assert collect([10, 11, 12, 13, 14, 15], [6]) == whole


def test_positions_reported_before_a_preemption_are_not_repeated() -> None:
    found = collect([10, 11, 12, 13, 14, 15], [4, 2], num_sent=2)

    assert [[part.token_ids[0] for part in parts] for parts in found] == [[13, 14], [15]]


def test_a_row_that_does_not_ask_gets_nothing() -> None:
    assert collect([10, 11], [2], params=RowParams(seed=0, temperature=0.0)) == [[]]
