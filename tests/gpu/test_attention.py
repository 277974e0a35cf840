"""Attention on a GPU: every kind of step against the definition, eagerly and in graphs.

The definition runs on the GPU too, in float32. Launches run with synchronisation forbidden.
"""

import pytest
import torch

from kernels.attention_step import Options, Step, StepLengths, StepMemo
from kernels.paged_attention import paged_attention, paged_attention_reference
from tests.gpu.test_kernels import without_waiting
from tests.kernels.cases import (
    AttentionInputs,
    assert_close,
    attention_inputs,
    same_query_in_other_steps,
)

pytestmark = pytest.mark.gpu
PLAIN = Options(0.1, None, None)


def attend(inputs: AttentionInputs, options: Options, memo: StepMemo | None = None) -> torch.Tensor:
    q, key_cache, value_cache, step = inputs
    arguments = step._asdict() | options._asdict()
    return without_waiting(
        lambda: paged_attention(q, key_cache, value_cache, **arguments, memo=memo)
    )


def zipf_lengths(num_requests: int, longest: int, shortest: int) -> list[int]:
    """A few long and many short, in no order."""
    lengths = [max(shortest, longest // (i + 1)) + i % 7 for i in range(num_requests)]
    order = torch.randperm(num_requests, generator=torch.Generator().manual_seed(3))
    return [lengths[i] for i in order.tolist()]


@pytest.mark.parametrize(
    "seq_lens",
    [
        pytest.param([8191], id="one long"),
        pytest.param([1, 16, 17, 130, 400], id="short"),
        pytest.param([4096] * 9, id="even"),
        pytest.param(zipf_lengths(256, 8000, 64), id="few long, many short"),
        pytest.param([33] * 300, id="more than a block of requests"),
        pytest.param([2999, 0, 15], id="one without keys"),
    ],
)
@pytest.mark.parametrize("heads", [(32, 8), (6, 2), (16, 1)])
def test_decode_of_any_lengths(seq_lens: list[int], heads: tuple[int, int]) -> None:
    inputs = attention_inputs(
        [1] * len(seq_lens),
        seq_lens,
        heads=heads,
        head_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
    )

    assert_close(attend(inputs, PLAIN), paged_attention_reference(*inputs, PLAIN))


def test_layers_that_share_a_plan_agree_bit_by_bit() -> None:
    lengths = zipf_lengths(64, 4000, 20)
    inputs = attention_inputs(
        [1] * 64, lengths, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    memo = StepMemo()

    outs = [attend(inputs, PLAIN, memo) for _ in range(20)]

    assert_close(outs[0], paged_attention_reference(*inputs, PLAIN))
    assert all(out.equal(outs[0]) for out in outs)


def test_a_captured_decode_serves_any_lengths() -> None:
    longest = 3000
    q, *caches, step = attention_inputs(
        [1] * 8, [longest] * 8, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda"
    )

    def run_layers() -> list[torch.Tensor]:
        memo = StepMemo()
        return [attend((q, *caches, step), PLAIN, memo) for _ in range(3)]

    run_layers()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_layers()
    for lengths in ([1] * 8, [longest] * 8, [1, 2999, 16, 17, 700, 1, 5, 64], [0] * 8):
        step.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()

        expected = paged_attention_reference(q, *caches, step, PLAIN)
        for out in captured:
            assert_close(out, expected)


@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        pytest.param([200, 1, 1, 1, 37], [200, 900, 16, 2500, 1500], id="chunks among decode"),
        pytest.param([0, 513, 0, 1], [70, 513, 0, 40], id="requests without queries"),
        pytest.param([64] * 5, [600, 64, 65, 4000, 128], id="short tails of cached prompts"),
    ],
)
@pytest.mark.parametrize(
    "options", [PLAIN, Options(0.1, 300, None), Options(0.1, None, 30.0)], ids=str
)
def test_mixed_steps(query_lens: list[int], seq_lens: list[int], options: Options) -> None:
    inputs = attention_inputs(
        query_lens, seq_lens, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda"
    )

    assert_close(attend(inputs, options), paged_attention_reference(*inputs, options))


def test_padding_after_the_last_request_changes_nothing() -> None:
    q, *caches, step = attention_inputs(
        [30, 1], [90, 300], heads=(4, 2), head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    padded = torch.cat([q, torch.full_like(q, torch.nan)])
    wider = Step(step.block_table, step.query_start_loc, step.seq_lens, 62, step.max_seq_len)

    out = attend((padded, *caches, wider), PLAIN)

    assert_close(out[:31], paged_attention_reference(q, *caches, step, PLAIN))


@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        pytest.param([2048], [2048], id="a whole prompt"),
        pytest.param([2500], [2500], id="a prompt with a rest"),
        pytest.param([1, 2100, 30, 0], [77, 2100, 400, 5], id="among others"),
        pytest.param([2048], [4096], id="a chunk on a border"),
        pytest.param([1, 2100], [300, 5700], id="a chunk elsewhere"),
        pytest.param([2049, 3000], [2050, 4500], id="two"),
    ],
)
@pytest.mark.parametrize("head_dim", [128, 64])
def test_long_prompts_whose_lengths_the_host_knows(
    query_lens: list[int], seq_lens: list[int], head_dim: int
) -> None:
    inputs = attention_inputs(
        query_lens, seq_lens, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    starts = inputs[3].query_start_loc.tolist()

    out = attend(inputs, PLAIN, StepMemo(lengths=StepLengths(starts, seq_lens)))

    assert_close(out, paged_attention_reference(*inputs, PLAIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [PLAIN, Options(0.1, 300, None), Options(0.1, None, 20.0)])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((16, 8), 128), ((6, 2), 64)])
def test_a_query_is_served_the_same_in_any_step(
    heads: tuple[int, int], head_dim: int, options: Options, dtype: torch.dtype
) -> None:
    inputs = attention_inputs(
        [700], [1900], heads=heads, head_dim=head_dim, dtype=dtype, device="cuda"
    )
    q, key_cache, value_cache, step = inputs
    arguments = options._asdict() | {"batch_invariant": True}
    whole = paged_attention(q, key_cache, value_cache, **step._asdict(), **arguments)

    assert_close(whole, paged_attention_reference(*inputs, options))
    for (q, *_, other), rows, count in same_query_in_other_steps(inputs, 130):
        out = paged_attention(q, key_cache, value_cache, **other._asdict(), **arguments)
        assert out[rows].equal(whole[-count:])
