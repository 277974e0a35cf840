"""Attention of one query each: the plan's arithmetic, and the kernel against the definition.

The kernel is interpreted. Every case carries NaN wherever no request has stored anything.
"""

from itertools import pairwise

import pytest
import torch

from kernels.attention_step import Options, StepMemo
from kernels.decode_attention import (
    DecodeTiles,
    Plan,
    PlanKey,
    decode_attention_triton,
    make_plan,
)
from kernels.paged_attention import paged_attention_reference
from tests.kernels.cases import DTYPES, assert_close, attention_inputs

PLAIN = Options(0.2, None, None)


def plan_for(
    query_lens: list[int], seq_lens: list[int], num_kv_heads: int, num_programs: int, **key: int
) -> Plan:
    step = attention_inputs(query_lens, seq_lens, heads=(1, 1), head_dim=8)[3]
    window = key.get("sliding_window")
    plan = make_plan(step, PlanKey(num_kv_heads, num_programs, key.get("tile", 16), 64, window))
    return Plan.read(plan, len(seq_lens))


def test_plan_cuts_a_lone_request_into_ranges_that_end_with_its_heads() -> None:
    plan = plan_for([1], [1000], 2, 8)

    assert plan.share == 16  # 63 tiles of a head over 4 programs
    assert plan.starts.tolist() == [0, 64]
    assert plan.num_tiles == 2 * 64


def test_plan_shares_out_many_requests_evenly_whatever_their_lengths() -> None:
    seq_lens = [17, 900, 64, 333, 1, 512, 80]
    tiles = [-(-n // 16) for n in seq_lens]

    plan = plan_for([1] * 7, seq_lens, 3, 5)

    assert plan.num_tiles == 3 * sum(tiles)
    assert plan.share == -(-3 * sum(tiles) // 5)
    assert [b - a for a, b in pairwise(plan.starts.tolist())] == tiles
    assert plan.seq_lens.tolist() == [*seq_lens, 0]


def test_plan_leaves_out_requests_that_have_no_query_or_several() -> None:
    plan = plan_for([1, 0, 3, 1], [40, 50, 60, 0], 1, 64)

    assert plan.requests.tolist() == [0, 3, 0, 0, 0]  # one without keys is somebody's too
    assert plan.tokens.tolist() == [0, 4, 0, 0, 0]
    assert plan.starts.tolist() == [0, 4, 8, 8, 8]
    assert plan.num_done.tolist() == [0] * 4


def test_plan_counts_no_keys_before_the_window() -> None:
    assert plan_for([1, 1], [1000, 20], 1, 1, sliding_window=160).starts.tolist() == [0, 10, 12]


def test_a_share_is_never_too_small_to_be_worth_merging() -> None:
    assert plan_for([1], [1000], 1, 500).share == 4
    assert plan_for([1], [1000], 1, 500, tile=128).share == 1


@pytest.mark.parametrize("num_programs", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "seq_lens",
    [
        pytest.param([700, 3, 129, 64], id="uneven"),
        pytest.param([65], id="alone"),
        pytest.param([80, 80, 80], id="even"),
    ],
)
def test_cut_anywhere_the_result_is_the_same(
    num_programs: int, dtype: torch.dtype, seq_lens: list[int]
) -> None:
    inputs = attention_inputs([1] * len(seq_lens), seq_lens, heads=(6, 2), head_dim=24, dtype=dtype)

    out = decode_attention_triton(*inputs, PLAIN, num_programs=num_programs)

    assert_close(out, paged_attention_reference(*inputs, PLAIN))


@pytest.mark.parametrize("num_programs", [3, 40])
@pytest.mark.parametrize("options", [Options(0.2, 70, None), Options(0.2, None, 2.0)])
@pytest.mark.parametrize("block_size", [8, 32])
def test_window_and_cap_equal_definition(
    num_programs: int, options: Options, block_size: int
) -> None:
    inputs = attention_inputs(
        [1, 1, 1], [350, 69, 71], heads=(3, 1), head_dim=20, block_size=block_size
    )

    out = decode_attention_triton(*inputs, options, num_programs=num_programs)

    assert_close(out, paged_attention_reference(*inputs, options))


def test_more_parts_than_one_round_of_merging_takes() -> None:
    inputs = attention_inputs([1], [2000], heads=(4, 1), head_dim=128)
    tiles = DecodeTiles(num_keys=32, num_warps=1, num_stages=2, programs_per_sm=1)

    out = decode_attention_triton(*inputs, PLAIN, tiles=tiles, num_programs=20)

    assert_close(out, paged_attention_reference(*inputs, PLAIN))


def test_layers_share_a_plan_and_leave_it_ready_for_the_next() -> None:
    inputs = attention_inputs([1, 1], [400, 90], heads=(4, 2), head_dim=16)
    memo = StepMemo()

    first = decode_attention_triton(*inputs, PLAIN, memo, num_programs=7)
    (plan,) = memo.entries.values()
    assert not Plan.read(plan, 2).num_done.any()
    second = decode_attention_triton(*inputs, PLAIN, memo, num_programs=7)
    decode_attention_triton(*inputs, Options(0.2, 50, None), memo, num_programs=7)

    assert second.equal(first)
    assert len(memo.entries) == 2  # a window has a plan of its own


def test_rows_of_requests_with_several_queries_stay_as_they_are() -> None:
    inputs = attention_inputs([1, 3, 0, 1], [20, 30, 5, 9], heads=(2, 1), head_dim=16)
    out = torch.full(inputs[0].shape, 7.0)

    decode_attention_triton(*inputs, PLAIN, out=out)

    expected = paged_attention_reference(*inputs, PLAIN)
    assert_close(out[[0, 4]], expected[[0, 4]])
    assert (out[1:4] == 7.0).all()
