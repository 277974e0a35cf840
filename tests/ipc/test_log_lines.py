"""Log lines: what a stranger sends begins no line and moves no cursor."""

import logging
import re

import pytest

from ipc.log_lines import FloodGate, LineFormatter

FORMATTER = LineFormatter("%(levelname)s %(name)s: %(message)s")


def line(message: str, *args: object, **fields: object) -> str:
    record = logging.LogRecord("x", logging.INFO, "", 1, message, args, None)
    record.__dict__.update(fields)
    return FORMATTER.format(record)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a\nINFO x: all is well", id="newline"),
        pytest.param("a\r\nINFO x: all is well", id="carriage return"),
        pytest.param("\x1b[2J\x1b[31mred", id="escape sequence"),
        pytest.param("\x9b2J", id="the same in one character"),
        pytest.param("a\x00b\x08c\x7f", id="NUL, backspace, delete"),
        pytest.param("\u202eexe.gpj\u2066\u2028", id="text turned about"),
    ],
)
def test_a_strangers_text_begins_no_line_and_holds_no_control(text: str) -> None:
    lines = line("request %s", text).split("\n")
    assert lines[0].startswith("INFO x: request ")
    assert all(each.startswith("    ") for each in lines[1:])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "".join(lines))


def test_plain_text_is_written_as_it_is() -> None:
    assert line("Grüße\t你好 %d\n", 7) == "INFO x: Grüße\t你好 7"


def test_a_traceback_stands_indented_below_its_line() -> None:
    try:
        raise ValueError("bad\nERROR x: forged")
    except ValueError as err:
        text = line("failed", exc_info=(ValueError, err, err.__traceback__))
    first, *rest = text.split("\n")
    assert first == "INFO x: failed"
    assert rest[0] == "    Traceback (most recent call last):"
    assert "    ERROR x: forged" in rest


def passes(gate: FloodGate, message: str, level: int = logging.WARNING) -> str | None:
    record = logging.LogRecord("x", level, "", 1, message, (), None)
    return record.getMessage() if gate.filter(record) else None


def test_a_warning_that_strangers_repeat_passes_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    gate = FloodGate(interval_s=10.0)
    assert [passes(gate, "bad") for _ in range(100)] == ["bad"] + [None] * 99
    assert passes(gate, "another") == "another"
    assert [passes(gate, "bad", logging.ERROR) for _ in range(2)] == ["bad", "bad"]
    now_s = 11.0
    assert passes(gate, "bad") == "bad (and 99 more before it)"
    assert passes(gate, "bad") is None
    for number in range(1000):
        assert passes(gate, f"message {number}") is not None
    assert len(gate._seen) <= 100
