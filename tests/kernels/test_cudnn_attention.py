"""What cuDNN is given of a step, and the kernels around its calls, interpreted."""

import pytest
import torch

from kernels.attention_step import Options, StepLengths
from kernels.cudnn_attention import (
    GRAIN,
    MIN_QUERIES,
    Share,
    can_serve,
    find_shares,
    gather_keys,
    merge_results,
    merge_results_reference,
)
from kernels.paged_attention import paged_attention_reference
from kernels.prefill_attention import prefill_attention_triton
from tests.kernels.cases import DTYPES, assert_close, attention_inputs, random


def lengths_of(query_lens: list[int], seq_lens: list[int]) -> StepLengths:
    return StepLengths([sum(query_lens[:b]) for b in range(len(query_lens) + 1)], seq_lens)


@pytest.mark.parametrize(
    ("query_len", "seq_len", "expected"),
    [
        pytest.param(MIN_QUERIES - 1, 9000, None, id="too short"),
        pytest.param(2048, 2048, (2048, 0, 0), id="a whole prompt"),
        pytest.param(2500, 2500, (2048, 0, 0), id="a rest is left over"),
        pytest.param(8192, 24576, (8192, 16384, 0), id="a chunk on a border"),
        pytest.param(2100, 2110, (2038, 0, 10), id="a few cached tokens join the chunk"),
        pytest.param(2100, 5700, (1520, 3072, 528), id="both"),
    ],
)
def test_shares(query_len: int, seq_len: int, expected: tuple[int, int, int] | None) -> None:
    shares = find_shares(lengths_of([1, query_len, 0], [70, seq_len, 9]))

    assert shares == ([] if expected is None else [Share(1, 1, *expected)])
    for share in shares:
        assert share.border % GRAIN == (share.num_queries + share.num_ahead) % GRAIN == 0
        assert share.border + share.num_ahead == seq_len - query_len


def test_the_triton_kernel_leaves_out_what_a_share_has() -> None:
    query_len, seq_len = 2060, 2090
    inputs = attention_inputs([query_len], [seq_len], heads=(1, 1), head_dim=16)
    options = Options(0.2, None, None)
    (share,) = find_shares(lengths_of([query_len], [seq_len]))
    untouched = 7.0
    out = torch.full(inputs[0].shape, untouched)

    prefill_attention_triton(*inputs, options, out=out, skip_shares=True)

    tile = 64
    assert (out[: share.num_queries // tile * tile] == untouched).all()
    expected = paged_attention_reference(*inputs, options)
    assert_close(out[share.num_queries :], expected[share.num_queries :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "num_keys"), [(8, 24), (16, 5), (32, 33)])
def test_gathered_keys_are_in_order(dtype: torch.dtype, block_size: int, num_keys: int) -> None:
    key_cache = random(9, block_size, 3, 20, dtype=dtype)
    value_cache = random(9, block_size, 3, 20, dtype=dtype, seed=1)
    block_ids = torch.tensor([7, 2, 8, 5], dtype=torch.int32)

    k, v = gather_keys(key_cache, value_cache, block_ids, num_keys=num_keys)

    assert k.equal(key_cache[block_ids].flatten(0, 1)[:num_keys])
    assert v.equal(value_cache[block_ids].flatten(0, 1)[:num_keys])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ahead", [0, 3])
def test_merging_equals_definition(dtype: torch.dtype, num_ahead: int) -> None:
    rows, num_heads, head_dim = 7, 6, 24
    a, b = (
        (random(rows, num_heads, head_dim, dtype=dtype, seed=i), random(num_heads, rows, seed=i))
        for i in (1, 2)
    )
    a[1][0], b[1][1] = -torch.inf, -torch.inf  # nothing was seen in one of the parts
    shape = (rows - num_ahead, num_heads, head_dim)
    out, expected = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    merge_results(a, b, out, num_ahead=num_ahead)

    merge_results_reference(a, b, expected, num_ahead=num_ahead)
    assert_close(out, expected)


def test_merged_parts_are_one_softmax() -> None:
    q, k, v = random(5, 2, 8), random(30, 2, 8, seed=1), random(30, 2, 8, seed=2)
    scores = torch.einsum("qnd,snd->nqs", q, k)

    def part(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        weights = scores[:, :, keys].softmax(dim=-1)
        return torch.einsum("nqs,snd->qnd", weights, v[keys]), scores[:, :, keys].logsumexp(-1)

    out = torch.empty(5, 2, 8)
    merge_results_reference(part(slice(0, 11)), part(slice(11, 30)), out, num_ahead=0)

    assert_close(out, part(slice(0, 30))[0])


@pytest.mark.parametrize(
    ("q", "options"),
    [
        pytest.param(random(4, 2, 64), Options(0.1, None, None), id="float32"),
        pytest.param(random(4, 2, 80).half(), Options(0.1, None, None), id="head size"),
        pytest.param(random(4, 2, 64).half(), Options(0.1, 100, None), id="window"),
        pytest.param(random(4, 2, 64).half(), Options(0.1, None, 30.0), id="cap"),
    ],
)
def test_what_cudnn_has_not_is_left_to_triton(q: torch.Tensor, options: Options) -> None:
    assert not can_serve(q, options)
