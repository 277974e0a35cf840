"""What a frontend refuses by itself, before anything is sent: too much in flight, or a drain.

The core has the last word, for all frontends together. This is the quick no: it costs the core
nothing, and it knows from the core's own numbers when to come back.
"""

from frontend.stat_loggers import IterationStats
from ipc.errors import (
    DeadlineExceededError,
    EngineDrainingError,
    EngineError,
    EngineOverloadedError,
)
from ipc.messages import Limits, SchedulerStats


class FrontendAdmission:
    """Owns what the core said last of its queue, and how many requests were refused here."""

    def __init__(self) -> None:
        self.retry_after_s = 1.0
        self._num_rejected = 0  # not reported yet
        self._num_expired = 0  # not reported yet
        self._num_waiting_tokens = 0  # of all frontends
        self._num_sent_tokens = 0  # since the core said so
        self._drain_reason: str | None = None

    def note_stats(self, stats: SchedulerStats | None) -> None:
        """Learn how much waits in the core."""
        if stats is None:
            return
        self.retry_after_s = max(1.0, stats.retry_after_s)
        self._num_waiting_tokens, self._num_sent_tokens = stats.num_waiting_tokens, 0

    def note_sent(self, num_tokens: int) -> None:
        """Count a prompt that the core may not have counted yet."""
        self._num_sent_tokens += num_tokens

    def note_welcome(self) -> None:
        """Another core took the place of the former one: what that said does not hold any more."""
        self.note_stats(SchedulerStats())
        self._drain_reason = None

    def note_draining(self, reason: str) -> None:
        """The core takes nothing new any more."""
        self._drain_reason = reason

    def note_failure(self, failure: EngineError) -> EngineError:
        """Count what did not fail but never began; a refusal gets its advice."""
        if isinstance(failure, EngineOverloadedError):
            self._num_rejected += 1
            failure.retry_after_s = max(failure.retry_after_s, self.retry_after_s)
        elif isinstance(failure, DeadlineExceededError):
            self._num_expired += 1
        return failure

    def report(self, iteration: IterationStats) -> None:
        """Add to ``iteration`` what was not reported before."""
        iteration.num_rejected, self._num_rejected = self._num_rejected, 0
        iteration.num_expired, self._num_expired = self._num_expired, 0

    def check_draining(self) -> None:
        """Raise EngineDrainingError when the core stops."""
        if self._drain_reason is not None:
            raise EngineDrainingError(self._drain_reason)

    def check(self, limits: Limits, num_open: int, num_tokens: int = 0) -> None:
        """Refuse what the core would refuse.

        Args:
            num_open: requests of this frontend. While it has none, nothing tells it how the
                core's queue moves, and the core is asked.
            num_tokens: of the prompt, where they are known.

        Raises:
            EngineDrainingError, EngineOverloadedError: nothing may be sent.
        """
        self.check_draining()
        max_open = limits.max_num_seqs + limits.max_waiting_requests
        if num_open >= max_open:
            self._refuse(f"{num_open} requests are in flight, at most {max_open}")
        max_tokens = limits.max_waiting_tokens
        num_waiting = self._num_waiting_tokens + self._num_sent_tokens
        if max_tokens and num_open and num_waiting and num_waiting + num_tokens > max_tokens:
            self._refuse(f"{num_waiting} prompt tokens wait, at most {max_tokens}")

    def _refuse(self, reason: str) -> None:
        self._num_rejected += 1
        raise EngineOverloadedError(reason, self.retry_after_s)
