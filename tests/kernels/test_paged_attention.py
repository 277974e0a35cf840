"""Paged attention: the definition against dense attention, then the kernels, interpreted.

Every case carries NaN wherever no request has stored anything, so a read too far shows.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.attention_step import Options, Step
from kernels.decode_attention import decode_attention_triton
from kernels.paged_attention import (
    mixed_attention,
    paged_attention,
    paged_attention_reference,
)
from kernels.prefill_attention import prefill_attention_triton
from tests.kernels.cases import (
    DTYPES,
    assert_close,
    attention_inputs,
    random,
    same_query_in_other_steps,
)

MIXED = pytest.param([5, 1, 0, 3], [5, 20, 7, 30], id="prefill, decode, no query, chunk")
TILES = pytest.param([37, 1, 18], [37, 19, 50], id="several tiles a request")


def call(q: torch.Tensor, caches: tuple[torch.Tensor, ...], step: Step, **changes: Any) -> Any:
    arguments = step._asdict() | {"scale": 0.3} | changes
    return paged_attention(q, *caches, **arguments)


def test_definition_agrees_with_dense_attention() -> None:
    q, key_cache, value_cache, step = attention_inputs([9], [9], heads=(4, 2), head_dim=8)
    k, v = (c[step.block_table[0, 0]][:9].transpose(0, 1) for c in (key_cache, value_cache))

    out = paged_attention_reference(q, key_cache, value_cache, step, Options(0.3, None, None))

    dense = F.scaled_dot_product_attention(
        q.transpose(0, 1), k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert_close(out, dense.transpose(0, 1))


def test_window_of_one_sees_itself_alone_and_caps_bound_scores() -> None:
    q, key_cache, value_cache, step = attention_inputs([4], [6], heads=(1, 1), head_dim=8)
    values = value_cache[step.block_table[0, 0]][2:6]

    alone = paged_attention_reference(q, key_cache, value_cache, step, Options(1.0, 1, None))
    capped = paged_attention_reference(q, key_cache, value_cache, step, Options(1.0, None, 1e-6))

    assert_close(alone, values)
    everything = value_cache[step.block_table[0, 0]][:6]  # equal scores: the plain mean
    assert_close(capped[-1], everything.mean(dim=0))


@pytest.mark.parametrize(("query_lens", "seq_lens"), [MIXED, TILES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [((6, 2), 40, 8), ((2, 2), 96, 16), ((5, 1), 16, 32)]
)
def test_mixed_batch_equals_definition(
    query_lens: list[int],
    seq_lens: list[int],
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
) -> None:
    inputs = attention_inputs(
        query_lens, seq_lens, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    options = Options(head_dim**-0.5, None, None)

    assert_close(mixed_attention(*inputs, options), paged_attention_reference(*inputs, options))


@pytest.mark.parametrize(
    "options", [Options(0.2, 7, None), Options(0.2, None, 2.0), Options(0.2, 20, 5.0)]
)
def test_window_and_cap_equal_definition(options: Options) -> None:
    mixed = attention_inputs([5, 1, 18], [35, 20, 40], heads=(3, 1), head_dim=20, block_size=8)
    decode = attention_inputs([1, 1], [35, 3], heads=(3, 1), head_dim=20, block_size=8)

    for inputs, run in ((mixed, mixed_attention), (decode, decode_attention_triton)):
        assert_close(run(*inputs, options), paged_attention_reference(*inputs, options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "seq_lens",
    [
        pytest.param([5, 20, 1, 33], id="whole"),
        pytest.param([300, 3, 270], id="split, one part empty for a short request"),
    ],
)
def test_decode_equals_definition(dtype: torch.dtype, seq_lens: list[int]) -> None:
    inputs = attention_inputs([1] * len(seq_lens), seq_lens, heads=(6, 2), head_dim=24, dtype=dtype)
    options = Options(0.2, None, None)

    assert_close(
        decode_attention_triton(*inputs, options), paged_attention_reference(*inputs, options)
    )


def test_decode_skips_requests_without_queries_and_gives_zeros_for_no_keys() -> None:
    inputs = attention_inputs([1, 0, 1], [9, 9, 0], heads=(2, 1), head_dim=16)
    options = Options(0.2, None, None)

    out = decode_attention_triton(*inputs, options)

    assert_close(out, paged_attention_reference(*inputs, options))
    assert not out[1].any()


def test_wrapper_takes_the_cpu_path() -> None:
    q, key_cache, value_cache, step = attention_inputs([3, 1], [3, 9], heads=(2, 1), head_dim=16)
    expected = paged_attention_reference(q, key_cache, value_cache, step, Options(0.3, 4, 2.0))

    out = call(q, (key_cache, value_cache), step, sliding_window=4, soft_cap=2.0)

    assert out.is_contiguous()
    assert_close(out, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"max_seq_len": 17}, "max_seq_len", id="longer than the table"),
        pytest.param({"max_query_len": -1}, "max_query_len", id="negative bound"),
        pytest.param({"sliding_window": 0}, "sliding_window", id="empty window"),
        pytest.param({"soft_cap": 0.0}, "soft_cap", id="cap of zero"),
        pytest.param({"seq_lens": torch.tensor([3])}, "int32", id="64-bit lengths"),
        pytest.param({"seq_lens": torch.tensor([3, 3]).int()}, "block_table", id="batch sizes"),
        pytest.param({"query_start_loc": torch.tensor([0]).int()}, "query_start_loc", id="starts"),
    ],
)
def test_steps_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    q, key_cache, value_cache, step = attention_inputs([3], [3], heads=(2, 1), head_dim=16)

    with pytest.raises(ValueError, match=message):
        call(q, (key_cache, value_cache), step, **changes)


@pytest.mark.parametrize(
    ("q", "cache", "message"),
    [
        pytest.param(random(3, 32), random(2, 16, 1, 16), r"\[T, N, D\]", id="two dimensions"),
        pytest.param(random(3, 3, 16), random(2, 16, 2, 16), "heads", id="heads in no groups"),
        pytest.param(random(3, 2, 8), random(2, 16, 1, 16), "heads", id="head sizes"),
        pytest.param(random(3, 2, 16), random(2, 12, 1, 16), "block_size", id="block size"),
        pytest.param(random(3, 2, 16).half(), random(2, 16, 1, 16), "dtypes", id="dtypes"),
        pytest.param(
            random(3, 2, 16).double(), random(2, 16, 1, 16).double(), "float32", id="double"
        ),
        pytest.param(
            random(2, 3, 16).transpose(0, 1), random(2, 16, 1, 16), "queries", id="layout of q"
        ),
        pytest.param(
            random(3, 2, 16),
            random(2, 32, 1, 16)[:, ::2],
            "caches must be",
            id="layout of the cache",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    q: torch.Tensor, cache: torch.Tensor, message: str
) -> None:
    step = attention_inputs([3], [3], heads=(2, 1), head_dim=16)[3]

    with pytest.raises(ValueError, match=message):
        call(q, (cache, cache), step)


@pytest.mark.parametrize("options", [Options(0.2, None, None), Options(0.2, 9, 5.0)])
def test_a_query_is_served_the_same_in_any_step(options: Options) -> None:
    inputs = attention_inputs([21], [75], heads=(4, 2), head_dim=32, dtype=torch.float16)
    expected = paged_attention_reference(*inputs, options)
    whole = prefill_attention_triton(*inputs, options, batch_invariant=True)

    assert_close(whole, expected)
    for step, rows, count in same_query_in_other_steps(inputs, 6):
        out = prefill_attention_triton(*step, options, batch_invariant=True)
        assert out[rows].equal(whole[-count:])
