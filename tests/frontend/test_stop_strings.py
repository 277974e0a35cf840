"""Stop strings: found wherever they lie, shown by no half, whatever the pieces are."""

import random

import pytest

from frontend.stop_strings import StopStringMatcher


def watch(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """All that is shown of a text in pieces, and the stop string that ended it."""
    matcher = StopStringMatcher(stops, include_in_output=include)
    shown = ""
    for piece in pieces:
        shown += matcher.append(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.finish(), None


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "matched"),
    [
        pytest.param(["abc", "def"], ["cd"], "ab", "cd", id="split over two pieces"),
        pytest.param(["a", "#", "#", "#", "b"], ["###"], "a", "###", id="split over three"),
        pytest.param(
            ["aab", "x"], ["aabaa"], "aabx", None, id="a beginning that goes on otherwise"
        ),
        pytest.param(["aa", "ab"], ["aab"], "a", "aab", id="a beginning inside a beginning"),
        pytest.param(["abc"], ["bc", "b"], "a", "b", id="complete first wins over listed first"),
        pytest.param(["xyz"], ["z", "xyz"], "", "xyz", id="same end: begins first wins"),
        pytest.param(["end<", "/s"], ["</s>"], "end</s", None, id="unfinished at the end is text"),
        pytest.param(["é", "ß"], ["éß"], "", "éß", id="not only ASCII"),
    ],
)
def test_a_stop_string_cuts_the_text(
    pieces: list[str], stops: list[str], shown: str, matched: str | None
) -> None:
    assert watch(pieces, stops) == (shown, matched)


def test_a_kept_stop_string_ends_the_text_and_what_follows_it_is_cut() -> None:
    assert watch(["ab", "c!d"], ["c!"], include=True) == ("abc!", "c!")


def test_a_kept_stop_string_holds_nothing_back() -> None:
    matcher = StopStringMatcher(["###"], include_in_output=True)
    assert matcher.append("a#") == "a#"
    assert matcher.append("##b") == "##"


def test_a_stop_string_that_may_not_stop_yet_is_text() -> None:
    matcher = StopStringMatcher(["##"], include_in_output=False)
    assert matcher.append("a##", may_stop=False) == "a#"
    assert matcher.append("b#") == "#b"
    assert matcher.append("#") == ""
    assert matcher.matched == "##"


def test_the_cut_does_not_depend_on_the_pieces_and_no_half_is_ever_shown() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices("ab#", k=rng.randrange(1, 20)))
        stops = ["".join(rng.choices("ab#", k=rng.randrange(1, 5))) for _ in range(3)]
        expected = watch(list(text), stops)
        pieces, rest = [], text
        while rest:
            cut = rng.randrange(1, len(rest) + 1)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        assert watch(pieces, stops) == expected
        shown, matched = expected
        assert all(stop not in shown for stop in stops)
        assert matched is None or text.startswith(shown + matched)


def test_shown_text_is_never_taken_back() -> None:
    rng = random.Random(2)
    for _ in range(500):
        stops = ["".join(rng.choices("ab", k=rng.randrange(2, 5)))]
        matcher = StopStringMatcher(stops, include_in_output=False)
        shown, text = "", ""
        while matcher.matched is None and len(text) < 12:
            text += rng.choice("ab")
            shown += matcher.append(text[-1])
            assert text.startswith(shown)
        final = text.split(stops[0])[0] if matcher.matched else text
        assert final.startswith(shown)
