"""Stop strings in a growing text: found wherever they lie, and never shown by halves.

Pure text: knows nothing of tokens, requests or streams. The result depends on the characters
alone, not on how they were cut into pieces: the stop string that is complete first wins, and of
those complete at the same character the one that begins first.
"""

from collections.abc import Sequence


class StopStringMatcher:
    """Watches one text for stop strings.

    Invariant: ``_carry`` is the longest end of the text that is a proper beginning of some stop
    string. So whatever matches later begins inside it, and all text before it is safe to show.
    """

    __slots__ = ("_carry", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        self._stops = stops
        self._include = include_in_output
        self._carry = ""
        self.matched: str | None = None  # the stop string that ended the text

    def append(self, piece: str, *, may_stop: bool = True) -> str:
        """Take in a piece of text; return what may be shown now.

        After a match the text is over: nothing more may be appended.

        Args:
            may_stop: False lets a stop string that this piece completes pass as plain text.
        """
        window = self._carry + piece
        found = self._earliest(window) if may_stop else None
        if found is not None:
            start, end, self.matched = found
            shown = window[len(self._carry) : end] if self._include else window[:start]
            self._carry = ""
            return shown
        num_held = self._num_held(window)
        self._carry = window[len(window) - num_held :]
        return piece if self._include else window[: len(window) - num_held]

    def finish(self) -> str:
        """The text is over without a match: return what was held back."""
        held, self._carry = self._carry, ""
        return "" if self._include else held

    def _earliest(self, window: str) -> tuple[int, int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, start) < (best[1], best[0]):
                best = (start, end, stop)
        return best

    def _num_held(self, window: str) -> int:
        longest = 0
        for stop in self._stops:
            first = stop[0]
            at = window.find(first, max(0, len(window) - len(stop) + 1))
            while at >= 0:
                num_matching = len(window) - at
                if num_matching <= longest:
                    break
                if stop.startswith(window[at:]):
                    longest = num_matching
                    break
                at = window.find(first, at + 1)
        return longest
