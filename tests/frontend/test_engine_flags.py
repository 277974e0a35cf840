"""Flags made from dataclass fields, and the checks on their values."""

import argparse
from dataclasses import dataclass
from typing import Any

import pytest

from frontend.engine_flags import (
    UNSET_FALSE,
    JsonObject,
    Names,
    add_flags,
    as_json_object,
    check_fields,
    flag,
    flag_name,
    is_unset,
)
from ipc.errors import ConfigError


@dataclass
class Options:
    """One field of each kind."""

    name: str = flag("x", help="100% text")
    kind: str = flag("a", choices=("a", "b"), help="a choice")
    size: int = flag(1, aliases=("-s",), help="a number")
    limit: int | None = flag(None, help="a number or nothing")
    share: float = flag(0.5, help="a fraction")
    is_on: bool = flag(False, help="a switch")
    is_maybe: bool = flag(UNSET_FALSE, help="a switch with three states")
    names: Names | None = flag(None, help="several")  # noqa: RUF009 - a field, not a value
    extra: JsonObject | None = flag(None, help="an object")  # noqa: RUF009 - as above
    factors: tuple[float, ...] | None = flag(None, help="numbers")


@dataclass
class MoreOptions(Options):
    """One more."""

    more: int = flag(7, help="more")


def parse(*words: str) -> argparse.Namespace:
    """Parse a command line of ``Options``."""
    parser = argparse.ArgumentParser()
    add_flags(parser, Options, "options")
    return parser.parse_args(words)


def test_without_flags_every_field_has_its_default() -> None:
    assert Options(**vars(parse())) == Options()


@pytest.mark.parametrize(
    ("words", "field", "expected"),
    [
        (["--name", "y"], "name", "y"),
        (["--kind", "b"], "kind", "b"),
        (["-s", "3"], "size", 3),
        (["--limit", "5"], "limit", 5),
        (["--limit", "None"], "limit", None),
        (["--share", "1"], "share", 1.0),
        (["--is-on"], "is_on", True),
        (["--no-is-on"], "is_on", False),
        (["--names", "a", "b"], "names", ["a", "b"]),
        (["--extra", '{"a": [1]}'], "extra", {"a": [1]}),
        (["--factors", "1,2.5"], "factors", (1.0, 2.5)),
    ],
)
def test_flags_set_their_field(words: list[str], field: str, expected: Any) -> None:
    options = Options(**vars(parse(*words)))
    assert getattr(options, field) == expected
    check_fields(options)


@pytest.mark.parametrize(
    "words",
    [
        ["--kind", "c"],
        ["--size", "1.5"],
        ["--size", "None"],
        ["--share", "much"],
        ["--extra", "[1]"],
        ["--extra", "{"],
        ["--factors", "1;2"],
    ],
)
def test_errors_on_the_command_line_name_the_flag(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 1),
        ("name", None),
        ("name", "a\0b"),
        ("name", "\ud800"),
        ("kind", "c"),
        ("size", True),
        ("size", 1.0),
        ("size", "1"),
        ("size", 2**63),
        ("limit", -(2**63) - 1),
        ("share", float("nan")),
        ("share", float("inf")),
        ("share", 10**400),
        ("share", "0.5"),
        ("is_on", 1),
        ("is_on", None),
        ("names", [1]),
        ("names", ("a",)),
        ("extra", [1]),
        ("extra", {1: 2}),
        ("extra", {"a": object()}),
        ("extra", {"a": 2**70}),
        ("factors", [1, "x"]),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_flag(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=flag_name(field)):
        check_fields(Options(**{field: value}))


def test_an_unset_switch_is_told_from_one_that_was_turned_off() -> None:
    assert is_unset(Options().is_maybe)
    assert not is_unset(Options(is_maybe=False).is_maybe)
    assert Options().is_maybe == False  # noqa: E712 - equal to the contract's default
    assert not is_unset(parse("--no-is-maybe").is_maybe)
    assert repr(Options().is_maybe) == "False"


def test_flags_of_another_record_can_be_left_out() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, MoreOptions, "more", besides=Options)
    assert vars(parser.parse_args([])) == {"more": 7}


def test_help_texts_may_hold_percent_signs() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Options, "options")
    assert "100% text" in parser.format_help()


def test_json_objects_come_as_text_or_as_they_are() -> None:
    assert as_json_object("--extra", '{"a": 1}') == {"a": 1}
    assert as_json_object("--extra", {"a": 1}) == {"a": 1}
    assert as_json_object("--extra", None) is None
    with pytest.raises(ConfigError, match="--extra: not JSON"):
        as_json_object("--extra", "{")
