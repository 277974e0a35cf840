"""How log lines are written: whatever a stranger put into a name, it stays inside its own line.

A newline cannot begin a line that looks like ours, and an escape sequence reaches no terminal.
"""

import logging
import math
import time

_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # turn text around it about
_SEPARATORS = (0x2028, 0x2029)
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_SHOWN = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*_CONTROLS, *_DIRECTIONS, *_SEPARATORS)
    if chr(code) not in "\n\t"
}
_MAX_MESSAGES = 100  # that a gate remembers
_INDENT = "\n    "  # of further lines, as tracebacks have


class LineFormatter(logging.Formatter):
    """A formatter whose every record begins at the margin, and nothing else does."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, with control characters shown and further lines indented."""
        text = super().format(record).rstrip("\n")
        return text.translate(_SHOWN).replace("\n", _INDENT)


class FloodGate(logging.Filter):
    """Lets a warning through once in a while, however often strangers cause it.

    The next one says how many were left out. Errors always pass.
    """

    def __init__(self, interval_s: float = 10.0) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._seen: dict[str, tuple[float, int]] = {}  # by message: when it passed, left out since

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be written."""
        if record.levelno >= logging.ERROR:
            return True
        message, now_s = str(record.msg), time.monotonic()
        passed_s, num_left_out = self._seen.get(message, (-math.inf, 0))
        if now_s - passed_s < self._interval_s:
            self._seen[message] = (passed_s, num_left_out + 1)
            return False
        if len(self._seen) >= _MAX_MESSAGES:
            self._seen.clear()
        self._seen[message] = (now_s, 0)
        if num_left_out:
            record.msg = f"{message} (and {num_left_out} more before it)"
        return True


def log_to_stderr(level: int, fmt: str, datefmt: str | None = None) -> None:
    """Log lines of this process and its libraries go to stderr, unless they go somewhere yet."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(fmt, datefmt))
    logging.basicConfig(level=level, handlers=[handler])
