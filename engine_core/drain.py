"""The end of a core that others depend on: what is open finishes, what is new is refused.

The first signal begins it. It is over when nothing is open, when its time is up, or at a second
signal; what is open then ends as aborted, and its clients are told.
"""

import logging
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine_core.core import EngineCore

logger = logging.getLogger(__name__)


class Drain:
    """Owns when the drain ends; ``ends_s`` is None before it began.

    Args:
        limit_s: how long open requests may go on; 0: not at all, as where nobody but the owner of
            the core uses it.
    """

    def __init__(self, core: "EngineCore", limit_s: float) -> None:
        self._core = core
        self._limit_s = limit_s
        self.ends_s: float | None = None
        self.reason = ""

    def advance(
        self, signals: Sequence[signal.Signals], now_s: float, *, owes_outputs: bool
    ) -> str | None:
        """Take signals in; why to end now, None while requests may go on.

        Args:
            owes_outputs: whether a frontend has not been told everything yet.
        """
        if signals and self.ends_s is None:
            self.reason = f"the engine was stopped by {signals[0].name}"
            if not self._limit_s:
                return self.reason
            self.ends_s = now_s + self._limit_s
            self._core.gate.is_draining = True
            logger.info("stopping: %d requests are open", self._core.num_open)
            signals = signals[1:]
        assert self.ends_s is not None
        if self._core.num_open == 0 and not owes_outputs:
            return self.reason
        if signals or now_s >= self.ends_s:
            logger.warning("aborting %d requests", self._core.num_open)
            self._core.abort_all()
            return self.reason
        return None
