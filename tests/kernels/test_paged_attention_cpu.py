"""The CPU path of attention against the definition, with NaN wherever nothing is stored.

In bfloat16, where whole blocks are gathered, huge numbers stand there instead.
"""

import pytest
import torch

from kernels.attention_step import Options, StepMemo
from kernels.paged_attention import paged_attention_reference
from kernels.paged_attention_cpu import paged_attention_cpu
from tests.kernels.cases import DTYPES, assert_close, attention_inputs

pytestmark = pytest.mark.usefixtures("cpu_path")

OPTIONS = [
    pytest.param(Options(0.2, None, None), id="plain"),
    pytest.param(Options(0.2, 7, None), id="window"),
    pytest.param(Options(0.2, None, 2.0), id="cap"),
    pytest.param(Options(0.2, 20, 5.0), id="window and cap"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        pytest.param([1] * 5, [1, 16, 17, 300, 40], id="decode"),
        pytest.param([1], [33], id="lone decode"),
        pytest.param([1, 0, 1], [9, 9, 0], id="decode with gaps"),
        pytest.param([9, 33], [9, 33], id="whole prompts"),
        pytest.param([5, 1, 0, 18, 1], [35, 20, 7, 18, 90], id="mixed"),
        pytest.param([], [], id="no request"),
    ],
)
def test_cpu_path_equals_definition(
    options: Options, dtype: torch.dtype, query_lens: list[int], seq_lens: list[int]
) -> None:
    for heads, head_dim in (((6, 2), 40), ((3, 3), 16), ((5, 1), 80)):
        inputs = attention_inputs(
            query_lens,
            seq_lens,
            heads=heads,
            head_dim=head_dim,
            block_size=8,
            dtype=dtype,
            stale=1e30 if dtype == torch.bfloat16 else torch.nan,
        )

        out = paged_attention_cpu(*inputs, options)

        assert out.shape == inputs[0].shape
        assert_close(out, paged_attention_reference(*inputs, options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys_are_gathered_in_several_runs(dtype: torch.dtype) -> None:
    seq_lens = [600, 5, 700, 1025, 630, 8, 512, 513, 620, 64, 65, 610]
    inputs = attention_inputs([1] * 12, seq_lens, heads=(4, 2), head_dim=64, dtype=dtype, stale=0.0)
    options = Options(0.1, None, None)

    assert_close(paged_attention_cpu(*inputs, options), paged_attention_reference(*inputs, options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_of_a_request_does_not_depend_on_its_batch_mates(
    options: Options, dtype: torch.dtype
) -> None:
    seq_lens = [50, 700, 31, 64, 40, 701, 690, 20]  # some of which attend in one call
    q, key_cache, value_cache, step = attention_inputs(
        [1] * len(seq_lens), seq_lens, heads=(4, 2), head_dim=16, dtype=dtype, stale=0.0
    )
    together = paged_attention_cpu(q, key_cache, value_cache, step, options)

    for b in range(len(seq_lens)):
        lone = step._replace(
            block_table=step.block_table[b : b + 1],
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=step.seq_lens[b : b + 1],
        )
        out = paged_attention_cpu(q[b : b + 1], key_cache, value_cache, lone, options)
        assert out[0].equal(together[b])


def test_layers_share_a_memo_whatever_their_windows() -> None:
    inputs = attention_inputs([1, 4, 1], [50, 9, 31], heads=(4, 2), head_dim=16)
    memo = StepMemo()

    for window in (None, 7, None, 20):
        options = Options(0.2, window, None)
        shared = paged_attention_cpu(*inputs, options, memo)

        assert shared.equal(paged_attention_cpu(*inputs, options))
    assert len(memo.entries) == 3


def test_rows_of_no_request_are_zeros() -> None:
    q, key_cache, value_cache, step = attention_inputs([2, 1], [2, 9], heads=(2, 1), head_dim=16)
    padded = torch.cat((q, q))

    out = paged_attention_cpu(padded, key_cache, value_cache, step, Options(0.2, None, None))

    assert not out[3:].any()
    assert out[:3].isfinite().all()
