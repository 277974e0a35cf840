"""What a caller sees does not depend on how it asks, nor on how tokens came in."""

import random

import pytest

from frontend.request_state import RequestState
from ipc.messages import FinishReason
from ipc.sampling_params import RequestOutputKind
from tests.frontend.builders import EOS, ProcessorRig, make_rig

TEXT = "Grüße – 你好, ### 🙂 und #### so weiter"


def read(
    rig: ProcessorRig, kind: RequestOutputKind, rng: random.Random, **params: object
) -> tuple[str, list[int]]:
    """All text and tokens of one stream, fed and taken in random portions."""
    state = rig.open(output_kind=kind, max_tokens=500, **params)
    ids, text, seen = [*TEXT.encode(), EOS], "", []
    while ids and not state.is_finished:
        portion = ids[: rng.randrange(1, 5)]
        ids = ids[len(portion) :]
        reason = None if ids else FinishReason.STOP
        rig.say(state, portion, finish_reason=reason)
        if rng.random() < 0.5 or state.is_finished:
            text, seen = take(state, text, seen)
    return text, seen


def take(state: RequestState, text: str, seen: list[int]) -> tuple[str, list[int]]:
    output = state.take()
    if output is None:
        return text, seen
    (completion,) = output.outputs
    if state.kind is RequestOutputKind.DELTA:
        return text + completion.text, seen + completion.token_ids
    assert completion.text.startswith(text)
    assert completion.token_ids[: len(seen)] == seen
    return completion.text, completion.token_ids


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_the_whole_text_and_every_token_come_through(kind: RequestOutputKind) -> None:
    rig, rng = make_rig(), random.Random(3)
    for _ in range(100):
        assert read(rig, kind, rng) == (TEXT, [*TEXT.encode(), EOS])


@pytest.mark.parametrize(
    ("stop", "include", "expected"),
    [
        pytest.param("###", False, "Grüße – 你好, ", id="cut"),
        pytest.param("###", True, "Grüße – 你好, ###", id="kept"),
        pytest.param("####", False, "Grüße – 你好, ### 🙂 und ", id="longer than another"),
        pytest.param("🙂", False, "Grüße – 你好, ### ", id="a character of four bytes"),
        pytest.param("never", False, TEXT, id="not there"),
    ],
)
def test_a_stop_string_cuts_the_same_place_however_tokens_come(
    stop: str, include: bool, expected: str
) -> None:
    rig, rng = make_rig(), random.Random(4)
    for kind in RequestOutputKind:
        for _ in range(50):
            text, ids = read(rig, kind, rng, stop=stop, include_stop_str_in_output=include)
            assert text == expected
            complete = (expected if include else expected + stop).encode()
            assert ids == ([*TEXT.encode(), EOS] if stop == "never" else list(complete))


def test_taking_without_news_gives_nothing() -> None:
    rig = make_rig()
    state = rig.open()
    assert state.take() is None
    rig.say(state, "a")
    assert state.take() is not None
    assert state.take() is None


def test_the_state_of_a_delta_stream_does_not_keep_what_was_taken() -> None:
    rig = make_rig()
    state = rig.open(output_kind=RequestOutputKind.DELTA, logprobs=0)
    rig.say(state, "abc")
    state.take()
    (branch,) = state.branches
    assert (branch.text, branch.new_pieces, branch.logprobs) == ("", [], [])
