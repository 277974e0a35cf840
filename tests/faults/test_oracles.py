"""Each oracle is silent on sound evidence, and speaks up on each kind of unsound evidence."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults import oracles
from tests.faults.builders import IDS, make_history, two_choices
from tests.faults.history import EventReader, History
from tests.faults.mixed_traffic import decode
from tests.faults.oracles import Holdings


def test_a_sound_stream_is_not_flagged() -> None:
    assert oracles.check_integrity(make_history(), decode) == []
    assert oracles.check_equality([make_history()], {"a": make_history()}) == []


def _set(history: History, **fields: object) -> History:
    for name, value in fields.items():
        setattr(history.branches[0], name, value)
    return history


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda: _set(make_history(), text="other"), "is not that", id="text"),
        pytest.param(lambda: make_history(IDS[:-1]), "ended by length after 4", id="lost token"),
        pytest.param(lambda: make_history((*IDS, 5)), "6 tokens, at most 5", id="token too many"),
        pytest.param(
            lambda: _set(make_history(), finish_reasons=["length", "stop"]), "2 times", id="ends"
        ),
        pytest.param(lambda: _set(make_history(), finish_reasons=[]), "ended by []", id="no end"),
        pytest.param(lambda: _set(make_history(), num_after_finish=1), "after its end", id="late"),
        pytest.param(lambda: _set(make_history(), num_roles=2), "role told 2", id="roles"),
        pytest.param(lambda: _set(make_history(), num_prompts_told=2), "prompt told", id="prompts"),
        pytest.param(lambda: make_history(usages=[]), "usage told 0 times", id="no usage"),
        pytest.param(
            lambda: make_history(usages=[{"completion_tokens": 6}]), "usage tells 6", id="usage"
        ),
        pytest.param(lambda: make_history(num_done=0), "0 x [DONE]", id="no done"),
        pytest.param(lambda: make_history(num_done=2), "2 x [DONE]", id="two done"),
        pytest.param(lambda: make_history(num_after_done=1), "1 events after", id="after done"),
        pytest.param(lambda: make_history(answer_ids={"a", "b"}), "more than one", id="ids"),
        pytest.param(lambda: make_history(errors=["no"]), "errors ['no']", id="error event"),
        pytest.param(lambda: make_history(status=503), "status 503", id="refused"),
        pytest.param(lambda: make_history(is_broken=True), "connection broken", id="broken"),
        pytest.param(lambda: make_history(contradictions=["a was b"]), "a was b", id="takes back"),
        pytest.param(two_choices, "choices [0], asked for 2", id="choice"),
    ],
)  # fmt: skip
def test_a_stream_that_lies_is_flagged(make: Callable[[], History], words: str) -> None:
    found = oracles.check_integrity(make(), decode)

    assert any(words in line for line in found), found


def test_a_client_that_left_is_judged_by_what_came() -> None:
    left = make_history(IDS[:3], is_cut=True, usages=[], num_done=0)
    left.branches[0].finish_reasons = []

    assert oracles.check_integrity(left, decode) == []
    assert oracles.check_equality([left], {"a": make_history()}) == []

    left.branches[0].token_ids[1] += 1
    assert oracles.check_integrity(left, decode)
    assert oracles.check_equality([left], {"a": make_history()})


@pytest.mark.parametrize(
    ("ids", "at"),
    [((*IDS[:2], 9, *IDS[3:]), 2), ((*IDS[:2], *IDS[3:]), 2), ((*IDS[:1], *IDS), 1)],
    ids=["wrong", "lost", "repeated"],
)
def test_the_first_token_that_differs_is_named(ids: tuple[int, ...], at: int) -> None:
    found = oracles.check_equality([make_history(ids)], {"a": make_history()})

    assert len(found) == 1
    assert f"from token {at} on" in found[0]


def test_noise_beyond_that_of_a_rerun_is_flagged() -> None:
    assert oracles.check_noise(3, 2, 100) == []
    assert oracles.check_noise(4, 2, 100)


@pytest.mark.parametrize("name", oracles.ZERO_WHEN_IDLE)
def test_an_idle_engine_holds_nothing(name: str) -> None:
    assert oracles.check_leaks(Holdings(), Holdings()) == []
    assert oracles.check_leaks(Holdings(), replace(Holdings(), **{name: 1}))


@pytest.mark.parametrize("name", ["tasks", "fds", "threads", "processes", "shared_memory"])
def test_growth_is_a_leak_and_shrinking_is_none(name: str) -> None:
    before = replace(Holdings(), **{name: 5})

    assert oracles.check_leaks(before, replace(Holdings(), **{name: 4})) == []
    assert oracles.check_leaks(before, replace(Holdings(), **{name: 6}))


def test_canaries_must_be_whole_and_right() -> None:
    reference = {"a": make_history()}

    assert oracles.check_well([make_history()], reference, decode) == []
    assert oracles.check_well([make_history(num_done=0)], reference, decode)
    assert oracles.check_well([make_history((*IDS[:4], 9))], reference, decode)
    assert oracles.check_same_process([1], [1]) == []
    assert oracles.check_same_process([1], [2])


def test_events_are_read_across_any_cut() -> None:
    data = b': keep-alive\n\ndata: {"a":1}\n\ndata: [DONE]\n\n'
    for size in range(1, len(data)):
        reader = EventReader()
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        assert [e for part in parts for e in reader.feed(part)] == ['{"a":1}', "[DONE]"]
        assert reader.num_comments == 1


def test_a_chunk_that_takes_something_back_is_kept_as_it_came() -> None:
    history = make_history()
    chunk = {"id": "cmpl-1", "created": 1, "choices": [{"index": 0, "text": "x", "token_ids": [5]}]}
    history.take_object(chunk)
    history.take_event("{", 0.0)

    assert history.branches[0].num_after_finish == 1
    assert history.num_after_done == 1
    assert "unreadable" in history.contradictions[0]
