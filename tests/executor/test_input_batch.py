"""Packed inputs against a loop over requests. CPU only."""

import random

import numpy as np
import pytest

from executor import input_batch
from executor.input_batch import (
    build_input_batch,
    locate_samples,
    pack_rows,
    place_samples,
)
from executor.request_states import RequestStates
from tests.executor.builders import make_new_row, make_plan, make_states


def make_random_rows(seed: int, num_rows: int) -> tuple[RequestStates, dict[int, list[int]]]:
    """Rows with random tokens and scattered blocks; returns each row's block ids too."""
    rng = random.Random(seed)
    states = make_states()
    blocks = list(range(1, 90))
    rng.shuffle(blocks)
    new_rows = []
    for row in rng.sample(range(8), num_rows):
        tokens = [rng.randrange(100) for _ in range(rng.randint(1, 64))]
        block_ids = [blocks.pop() for _ in range(-(-len(tokens) // 8))]
        new_rows.append(
            make_new_row(
                row,
                tokens,
                num_computed_tokens=rng.randrange(len(tokens)),
                block_ids=block_ids,
            )
        )
    states.apply(make_plan([], new_rows=new_rows))
    return states, {new.row: new.block_ids for new in new_rows}


@pytest.mark.parametrize("seed", range(20))
def test_every_vector_equals_a_loop_over_requests(seed: int) -> None:
    states, block_ids = make_random_rows(seed, num_rows=1 + seed % 8)
    rng = random.Random(seed)
    rows = list(block_ids)
    owed = {row: int(states.num_tokens[row] - states.num_computed_tokens[row]) for row in rows}
    counts = [rng.choice([owed[row], rng.randint(1, owed[row])]) for row in rows]

    packed = pack_rows(make_plan(rows, counts), states)
    batch = build_input_batch(packed, states)

    positions, token_ids, slots, samples, ends = [], [], [], [], [0]
    for row, count in zip(rows, counts, strict=True):
        first = int(states.num_computed_tokens[row])
        for position in range(first, first + count):
            positions.append(position)
            token_ids.append(int(states.tokens.tensor[row, position]))
            slots.append(block_ids[row][position // 8] * 8 + position % 8)
        ends.append(ends[-1] + count)
        if count == owed[row]:
            samples.append((row, ends[-1] - 1, first + count))
    seq_lens = [int(states.num_computed_tokens[r]) + c for r, c in zip(rows, counts, strict=True)]
    assert batch.positions.tolist() == positions
    assert batch.token_ids.tolist() == token_ids
    assert batch.meta.slot_mapping.tolist() == slots
    assert batch.meta.query_start_loc.tolist() == packed.query_start_loc.tolist() == ends
    assert batch.meta.seq_lens.tolist() == seq_lens
    assert (batch.meta.max_query_len, batch.meta.max_seq_len) == (max(counts), max(seq_lens))
    for i, row in enumerate(rows):
        table = batch.meta.block_table[i].tolist()
        assert table[: len(block_ids[row])] == block_ids[row][: len(table)]
        assert not any(table[len(block_ids[row]) :])
    places = locate_samples(packed, states)
    assert packed.num_samples == len(samples)
    if samples:
        assert places is not None
        assert places.rows.tolist() == [row for row, _, _ in samples]
        assert places.positions.tolist() == [position for _, _, position in samples]
        indices = places.logit_indices
        indices = range(len(positions)) if indices is None else indices.tolist()
        assert list(indices) == [index for _, index, _ in samples]
    else:
        assert places is None


@pytest.mark.parametrize("seed", range(6))
def test_inputs_prepared_on_a_device_are_those_looked_up(seed: int) -> None:
    states, block_ids = make_random_rows(seed, num_rows=1 + seed)
    rng = random.Random(seed)
    rows = list(block_ids)
    owed = {row: int(states.num_tokens[row] - states.num_computed_tokens[row]) for row in rows}
    counts = [rng.randint(1, owed[row]) for row in rows]
    packed = pack_rows(make_plan(rows, counts), states)

    found, expected = input_batch._prepare(packed, states), input_batch._look_up(packed, states)

    assert found.token_ids.equal(expected.token_ids)
    assert found.positions.equal(expected.positions)
    assert found.meta.slot_mapping.equal(expected.meta.slot_mapping)
    num_rows = len(rows)
    assert found.meta.seq_lens[:num_rows].equal(expected.meta.seq_lens)
    assert found.meta.query_start_loc[: num_rows + 1].equal(expected.meta.query_start_loc)
    assert set(found.meta.query_start_loc[num_rows:].tolist()) == {sum(counts)}
    assert not found.meta.seq_lens[num_rows:].any()
    for table, other, seq_len in zip(
        found.meta.block_table, expected.meta.block_table, expected.meta.seq_lens, strict=False
    ):
        used = -(-int(seq_len) // 8)
        assert table[:used].equal(other[:used])
    lengths = found.meta.memo.lengths
    assert lengths is not None
    assert list(lengths.seq_lens) == expected.meta.seq_lens.tolist()
    assert found.meta.max_query_len >= expected.meta.max_query_len
    assert (found.meta.max_query_len == 1) == (max(counts) == 1)


def test_decode_is_one_token_for_each_row_and_needs_no_picking() -> None:
    states = make_states()
    states.apply(
        make_plan(
            [], new_rows=[make_new_row(r, [7 + r] * 9, num_computed_tokens=8) for r in range(3)]
        )
    )

    packed = pack_rows(make_plan([2, 0]), states)
    short = build_input_batch(packed, states)
    spelled_out = build_input_batch(pack_rows(make_plan([2, 0], [1, 1]), states), states)
    places = locate_samples(packed, states)

    assert places is not None
    assert places.logit_indices is None
    assert short.meta.max_query_len == 1
    for batch in (short, spelled_out):
        assert batch.token_ids.tolist() == [9, 7]
        assert batch.positions.tolist() == [8, 8]
        assert batch.meta.query_start_loc.tolist() == [0, 1, 2]


def test_samples_without_a_forward_pass_go_behind_the_last_token() -> None:
    states = make_states()
    states.apply(make_plan([], new_rows=[make_new_row(4, [1, 2, 3])]))

    samples = place_samples(np.array([4]), states)

    assert samples.positions.tolist() == [3]
    assert samples.places.tolist() == [4 * states.tokens.width + 3]


def test_dtypes_are_what_kernels_take() -> None:
    states = make_states()
    states.apply(make_plan([], new_rows=[make_new_row(0, [1, 2, 3])]))

    batch = build_input_batch(pack_rows(make_plan([0], [3]), states), states)

    dtypes = {
        "token_ids": batch.token_ids.dtype,
        "positions": batch.positions.dtype,
        "slot_mapping": batch.meta.slot_mapping.dtype,
        "block_table": batch.meta.block_table.dtype,
        "query_start_loc": batch.meta.query_start_loc.dtype,
        "seq_lens": batch.meta.seq_lens.dtype,
    }
    assert {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()} == {
        "token_ids": "int32",
        "positions": "int64",
        "slot_mapping": "int64",
        "block_table": "int32",
        "query_start_loc": "int32",
        "seq_lens": "int32",
    }
