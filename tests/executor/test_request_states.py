"""Rows and how a plan changes them. CPU only."""

import numpy as np
import pytest
import torch

from executor.request_states import RowTable
from ipc.messages import RowParams
from tests.executor.builders import CPU, make_new_row, make_plan, make_states


def test_a_new_row_brings_tokens_blocks_and_counts() -> None:
    states = make_states()

    states.apply(
        make_plan(
            [],
            new_rows=[
                make_new_row(
                    3,
                    [5, 6, 7],
                    num_prompt_tokens=2,
                    num_computed_tokens=1,
                    block_ids=[9, 4],
                    num_prompt_logprobs_sent=1,
                )
            ],
        )
    )

    assert states.tokens.tensor[3, :4].tolist() == [5, 6, 7, 0]
    assert states.blocks.tensor[3, :3].tolist() == [9, 4, 0]
    counts = (states.num_tokens, states.num_prompt_tokens, states.num_computed_tokens)
    assert [int(count[3]) for count in counts] == [3, 2, 1]
    assert int(states.num_prompt_logprobs_sent[3]) == 1


def test_blocks_are_appended_and_released_from_the_front() -> None:
    states = make_states()
    states.apply(make_plan([], new_rows=[make_new_row(0, [1], block_ids=[2, 3])]))

    states.apply(make_plan([], new_block_ids=[(0, [4]), (0, [5])], released_block_ids=[(0, 2)]))

    assert states.block_ids(0) == [0, 0, 4, 5]


def test_many_rows_get_blocks_at_once() -> None:
    states = make_states()
    new_rows = [make_new_row(row, [1], block_ids=list(range(row + 1))) for row in range(3)]
    states.apply(make_plan([], new_rows=new_rows))

    states.apply(make_plan([], new_block_ids=[(2, [30]), (0, [31, 32]), (1, [33])]))

    assert [states.block_ids(row) for row in range(3)] == [[0, 31, 32], [0, 1, 33], [0, 1, 2, 30]]
    width = states.blocks.width
    with pytest.raises(ValueError, match=f"row 1 would need more than {width} columns"):
        states.apply(make_plan([], new_block_ids=[(0, [1]), (1, [2] * width)]))


def test_padding_is_a_greedy_row_of_the_null_block() -> None:
    states = make_states(max_num_seqs=3)

    assert states.padding_row == 3
    assert not states.blocks.tensor[3].any()
    assert states.sampling.tables.floats[0, 3] == 0.0


def test_the_next_owner_of_a_row_inherits_nothing() -> None:
    states = make_states()
    params = RowParams(seed=9, temperature=0.5, num_logprobs=3, logit_bias=[(1, 1.0)])
    states.apply(
        make_plan([], new_rows=[make_new_row(2, [1] * 20, block_ids=[7, 8, 9], params=params)])
    )

    states.apply(make_plan([], freed_rows=[2], new_rows=[make_new_row(2, [4], block_ids=[3])]))

    assert states.block_ids(2) == [3]
    assert states.blocks.tensor[2].tolist() == [3] + [0] * (states.blocks.width - 1)
    assert int(states.num_tokens[2]) == 1
    assert not states.sampling.flags[2]


def test_a_freed_row_asks_for_nothing() -> None:
    states = make_states()
    params = RowParams(seed=0, temperature=1.0)
    states.apply(make_plan([], new_rows=[make_new_row(1, [1], params=params)]))

    states.apply(make_plan([], freed_rows=[1]))

    assert states.sampling.wishes[1] is None
    assert not states.sampling.flags.any()


def test_sampling_adds_one_token_where_the_next_step_reads_it() -> None:
    states = make_states()
    states.apply(make_plan([], new_rows=[make_new_row(0, [1, 2]), make_new_row(1, [3])]))
    places = torch.tensor([2, states.tokens.width + 1])

    states.append(np.array([0, 1]), places, torch.tensor([50, 60]))

    assert states.tokens.tensor[0, :4].tolist() == [1, 2, 50, 0]
    assert states.tokens.tensor[1, :3].tolist() == [3, 60, 0]
    assert states.num_tokens[:2].tolist() == [3, 2]


def test_a_row_of_the_greatest_length_fits_and_far_beyond_does_not() -> None:
    states = make_states(max_model_len=64)
    states.apply(make_plan([], new_rows=[make_new_row(0, [1] * 64)]))

    with pytest.raises(ValueError, match="row 0 would need 200 columns"):
        states.apply(make_plan([], new_rows=[make_new_row(0, [1] * 200)]))


def test_parameters_follow_the_order_of_the_rows_asked_for() -> None:
    states = make_states()
    params = [
        RowParams(seed=2**63 + 5, temperature=0.5, top_k=7),
        RowParams(seed=-1, temperature=0.25, top_p=0.75, min_p=0.125, top_k=10**6),
    ]
    states.apply(
        make_plan([], new_rows=[make_new_row(i, [1], params=p) for i, p in enumerate(params)])
    )

    draw = states.sampling.gather(torch.tensor([1, 0]))

    assert draw.temperature.tolist() == [0.25, 0.5]
    assert draw.top_p.tolist() == [0.75, 1.0]
    assert draw.min_p.tolist() == [0.125, 0.0]
    assert draw.top_k.tolist() == [states.sampling.vocab_size, 7]
    assert draw.seeds.tolist() == [-1, 5 - 2**63], "the same 64 bits, read as signed"
    assert all(values.is_contiguous() for values in (draw.temperature, draw.top_k, draw.seeds))


def test_a_table_refuses_what_does_not_fit() -> None:
    table = RowTable(2, 4, CPU)
    table.write(1, 2, [8, 9])

    assert table.tensor.tolist() == [[0, 0, 0, 0], [0, 0, 8, 9]]
    with pytest.raises(ValueError, match="would need 5 columns, there are 4"):
        table.write(0, 3, [1, 2])
