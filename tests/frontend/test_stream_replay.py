"""A state that takes up where another one was shows what is left, and all of it."""

import pytest

from frontend.output_processor import OutputProcessor
from frontend.request_state import RequestState
from frontend.stream_replay import replay
from ipc.messages import EngineOutput, FinishReason, ResumedBranch
from ipc.sampling_params import RequestOutputKind
from tests.frontend.builders import make_inputs, make_request, make_tokenizer

TEXT = "naïve 日本 STOP and more"
IDS = list(TEXT.encode())


def open_state(**params: object) -> RequestState:
    inputs = make_inputs()
    outputs = OutputProcessor(make_tokenizer(), log_stats=False)
    new = make_request(output_kind=RequestOutputKind.DELTA, max_tokens=100, **params)
    return outputs.open(inputs.admit(new), epoch=1)


def shown_after(state: RequestState, output: EngineOutput) -> str:
    """The text of a state that had nothing before."""
    state.update(output, 1.0)
    taken = state.take()
    return "" if taken is None else taken.outputs[0].text


@pytest.mark.parametrize("num_known", [0, 4, 13, len(IDS)])
@pytest.mark.parametrize("stop", [[], ["STOP"]], ids=["plain", "stop string"])
def test_what_was_taken_and_what_is_left_make_the_whole(num_known: int, stop: list[str]) -> None:
    whole = shown_after(open_state(stop=stop), EngineOutput("1", 0, 0, IDS, FinishReason.LENGTH))
    for num_taken in range(min(num_known, TEXT.index("STOP")) + 1):
        before = shown_after(open_state(stop=stop), EngineOutput("1", 0, 0, IDS[:num_taken]))
        state = open_state(stop=stop)
        known = EngineOutput("1", 0, 0, IDS[:num_known], num_cached_tokens=3)

        (resumed,) = replay(state, [known], [num_taken], 2.0)

        assert resumed.token_ids == state.branches[0].token_ids
        if not resumed.is_finished:
            rest = EngineOutput("1", 0, num_known, IDS[num_known:], FinishReason.LENGTH)
            state.update(rest, 3.0)
        taken = state.take()
        assert taken is not None
        assert before + taken.outputs[0].text == whole
        assert taken.outputs[0].finish_reason == ("stop" if stop else "length")
        assert len(taken.outputs[0].token_ids) == len(state.branches[0].token_ids) - num_taken
        if num_known:
            assert taken.num_cached_tokens == 3


def test_one_that_has_ended_says_so_again() -> None:
    state = open_state()
    ended = EngineOutput("1", 0, 0, IDS, FinishReason.STOP, 7)

    assert replay(state, [ended], [len(IDS)], 1.0) == [ResumedBranch(0, IDS, True)]

    taken = state.take()
    assert taken is not None
    assert (taken.outputs[0].text, taken.outputs[0].token_ids) == ("", [])
    assert (taken.outputs[0].finish_reason, taken.outputs[0].stop_reason) == ("stop", 7)
    assert taken.finished
