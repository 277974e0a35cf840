"""Which token ends a branch, and why."""

import pytest

from engine_core.request import Request, RequestGroup, make_branch
from engine_core.stop_checker import check_stop
from ipc.messages import FinishReason, RowParams
from ipc.sampling_params import SamplingParams

EOS, STOP, OTHER = 0, 9, 5


def make(output: list[int], *, max_output_tokens: int = 8, **params: object) -> Request:
    sampling = SamplingParams(seed=1, stop_token_ids=[STOP], max_tokens=None, **params)
    group = RequestGroup(b"c", "r", [1, 2], sampling, frozenset({EOS}), 0.0, b"root")
    branch = make_branch(
        group, 0, RowParams(1, 1.0), order=(0, 1, 0), max_output_tokens=max_output_tokens
    )
    branch.output_token_ids.extend(output)
    return branch


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        pytest.param(make([OTHER]), None, id="any other token goes on"),
        pytest.param(make([EOS]), (FinishReason.STOP, None), id="end of text names no token"),
        pytest.param(make([STOP]), (FinishReason.STOP, STOP), id="a stop token is named"),
        pytest.param(make([EOS], ignore_eos=True), None, id="ignored end of text goes on"),
        pytest.param(make([STOP, OTHER]), None, id="only the newest token counts"),
        pytest.param(make([OTHER, EOS], min_tokens=2), None, id="too early for min_tokens"),
        pytest.param(
            make([OTHER, OTHER, EOS], min_tokens=2), (FinishReason.STOP, None), id="after them"
        ),
        pytest.param(
            make([OTHER] * 8), (FinishReason.LENGTH, None), id="the longest allowed output"
        ),
        pytest.param(make([OTHER] * 7 + [STOP]), (FinishReason.STOP, STOP), id="stop beats length"),
    ],
)
def test_a_token_ends_a_branch(
    request_: Request, expected: tuple[FinishReason, int | None] | None
) -> None:
    assert check_stop(request_) == expected
