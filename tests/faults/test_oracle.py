"""Each way a stream can be wrong is named; a right one is not."""

import json
from collections.abc import Callable

import pytest

from tests.faults.histories import Choice, History
from tests.faults.oracle import Holdings, check_equality, check_integrity, check_leaks


def decode(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def history(name: str = "a") -> History:
    right = History(name, status=200, ended_s=1.0)
    for text in ("ab", "c"):
        choice = {"index": 0, "text": text, "token_ids": [*map(ord, text)], "finish_reason": None}
        right.take(json.dumps({"id": "x", "created": 1, "choices": [choice]}))
    right.take(
        '{"id": "x", "created": 1, "choices": [{"index": 0, "text": "", "token_ids": [], '
        '"finish_reason": "length"}]}'
    )
    right.take('{"id": "x", "created": 1, "choices": [], "usage": {"completion_tokens": 3}}')
    right.take("[DONE]")
    return right


def test_a_right_stream_has_no_problem() -> None:
    assert check_integrity(history(), decode) == []
    assert check_equality(history(), history()) == []


def lose(h: History) -> None:
    h.lost, h.ended_s = "reset", None


WRONGS: dict[str, tuple[Callable[[History], object], str]] = {
    "broken": (lose, "connection broke"),
    "error event": (lambda h: h.errors.append({"message": "x"}), "error event"),
    "status": (lambda h: setattr(h, "status", 500), "status 500"),
    "not done": (lambda h: setattr(h, "num_done", 0), "0 [DONE]"),
    "more behind done": (lambda h: h.take('{"error": {}}'), "1 events behind it"),
    "two ids": (lambda h: h.ids.add("y"), "ids"),
    "two times": (lambda h: h.created.add(2), "created"),
    "missing choice": (lambda h: h.choices.clear(), "choices [] of 1"),
    "further choice": (lambda h: h.choices.update({1: Choice("", [], ["stop"])}), "of 1"),
    "two ends": (lambda h: h.choices[0].finish_reasons.append("stop"), "finish reasons"),
    "no end": (lambda h: h.choices[0].finish_reasons.clear(), "finish reasons []"),
    "content behind the end": (lambda h: setattr(h.choices[0], "num_after_end", 1), "behind"),
    "lost text": (lambda h: setattr(h.choices[0], "text", "ac"), "at character 1"),
    "no usage": (lambda h: h.usages.clear(), "0 usages"),
    "two usages": (lambda h: h.usages.append(h.usages[0]), "2 usages"),
    "wrong usage": (lambda h: h.usages[0].update(completion_tokens=2), "usage tells 2"),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_what_is_wrong_is_named(wrong: str) -> None:
    spoil, expected = WRONGS[wrong]
    spoiled = history()
    spoil(spoiled)

    problems = check_integrity(spoiled, decode)

    assert any(expected in problem for problem in problems), problems
    assert all(problem.startswith("a: ") for problem in problems)


def test_events_behind_the_end_are_counted() -> None:
    more = history()
    more.take(
        '{"id": "x", "created": 1, "choices": [{"index": 0, "text": "d", "token_ids": [100], '
        '"finish_reason": null}]}'
    )
    assert any("content behind the end" in problem for problem in check_integrity(more, decode))


@pytest.mark.parametrize(
    ("ids", "place"), [([97, 98], 2), ([97, 99, 98], 1), ([97, 98, 99, 99], 3), ([], 0)]
)
def test_tokens_that_differ_from_the_undisturbed_run_are_found(ids: list[int], place: int) -> None:
    other = history()
    other.choices[0].token_ids = ids
    assert f"at token {place}" in check_equality(other, history())[0]


def test_another_end_than_undisturbed_is_found() -> None:
    other = history()
    other.choices[0].finish_reasons = ["stop"]
    assert "ended ['stop']" in check_equality(other, history())[0]


def test_what_is_held_and_was_not_before_is_a_leak() -> None:
    before = Holdings(0, 0, 0.0, 0, 4, 100, 20, 5, 1)
    assert check_leaks(before, before, {}) == []
    after = Holdings(0, 0, 0.01, 0, 4, 103, 19, 5, 1)
    assert check_leaks(before, after, {"num_descriptors": 3}) == ["kv_usage was 0.0, is 0.01"]
    assert len(check_leaks(before, after, {})) == 2
