"""Attention of one query each: the plan's arithmetic, and the kernel against the definition.

The kernel is interpreted. Every case carries NaN wherever no request has stored anything.
"""

from itertools import pairwise

import pytest
import torch

from kernels.attention_step import Options, Step, StepMemo
from kernels.decode_attention import DecodeTiles, decode_attention_triton, make_plan
from kernels.paged_attention import paged_attention_reference
from tests.kernels.cases import DTYPES, assert_close, attention_inputs

UNIT = 16
PLAIN = Options(0.2, None, None)


def step_of(query_lens: list[int], seq_lens: list[int]) -> Step:
    return attention_inputs(query_lens, seq_lens, heads=(1, 1), head_dim=8)[3]


def read_plan(plan: torch.Tensor, num_requests: int) -> tuple[int, int, list[int]]:
    return int(plan[0]), int(plan[1]), plan[2 : 3 + num_requests].tolist()


def test_plan_cuts_a_lone_request_into_equal_ranges_of_its_own_heads() -> None:
    plan = make_plan(step_of([1], [1000]), None, num_kv_heads=2, num_programs=8)

    per_range, total, starts = read_plan(plan, 1)
    assert per_range == 16  # 63 units of a head over 4 programs
    assert starts == [0, 64]  # the head's last range ends with its programs, not inside one
    assert total == 2 * 64


def test_plan_shares_out_many_requests_evenly_whatever_their_lengths() -> None:
    seq_lens = [17, 900, 64, 333, 1, 512, 80]
    units = [-(-n // UNIT) for n in seq_lens]

    plan = make_plan(step_of([1] * 7, seq_lens), None, num_kv_heads=3, num_programs=5)

    per_range, total, starts = read_plan(plan, 7)
    assert total == 3 * sum(units)
    assert per_range == -(-total // 5)
    assert [b - a for a, b in pairwise(starts)] == units


def test_plan_leaves_out_requests_that_have_no_query_or_several() -> None:
    plan = make_plan(step_of([1, 0, 3, 1], [40, 50, 60, 0]), None, num_kv_heads=1, num_programs=64)

    assert read_plan(plan, 4)[2] == [0, 4, 4, 4, 8]  # a request without keys is somebody's too


def test_plan_counts_no_keys_before_the_window() -> None:
    plan = make_plan(step_of([1, 1], [1000, 20]), 160, num_kv_heads=1, num_programs=1)

    assert read_plan(plan, 2)[2] == [0, 10, 12]


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
    assert not plan[2 + 3 :].any()  # counts of finished parts
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
