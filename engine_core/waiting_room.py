"""Requests that were admitted and have not begun: how many tokens they bring, how fast they begin.

The bound on waiting and the advice when to come back follow from these numbers. A preempted request
has begun: it is not counted. Pure state: no clock.
"""

from math import exp

from engine_core.request import RequestGroup

MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0

_MEMORY_S = 10.0  # of the rate at which requests begin
_MIN_OBSERVED_S = 0.2  # of waiting; less tells nothing about the rate


class WaitingRoom:
    """Owns the counts, and the rate at which waiting tokens begin while somebody waits.

    Invariant: ``num_tokens`` is the sum over groups whose ``num_waiting_tokens`` is set.
    """

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_tokens = 0
        self.newest_place = 0  # the largest leading part of ``Request.order`` that has begun
        self._begun_tokens = 0.0  # lately; older ones fade
        self._waited_s = 0.0  # the time in which they began, during which somebody waited
        self._now_s: float | None = None

    def enter(self, group: RequestGroup) -> None:
        """A request begins to wait."""
        self.advance(group.arrival_s)
        group.num_waiting_tokens = len(group.prompt_token_ids)
        self.num_requests += 1
        self.num_tokens += group.num_waiting_tokens

    def begin(self, group: RequestGroup, place: int, now_s: float) -> None:
        """A branch runs for the first time; its request waits no more."""
        self.newest_place = max(self.newest_place, place)
        if group.num_waiting_tokens is not None:
            self.advance(now_s)
            self._begun_tokens += group.num_waiting_tokens
            self.leave(group)

    def leave(self, group: RequestGroup) -> None:
        """A request waits no more, whether it began or ended; harmless when repeated."""
        if group.num_waiting_tokens is not None:
            self.num_requests -= 1
            self.num_tokens -= group.num_waiting_tokens
            group.num_waiting_tokens = None

    def advance(self, now_s: float) -> None:
        """Let time pass: the rate is about time in which somebody waited."""
        before_s, self._now_s = self._now_s, now_s
        if before_s is not None and self.num_requests and now_s > before_s:
            kept = exp((before_s - now_s) / _MEMORY_S)
            self._begun_tokens *= kept
            self._waited_s = self._waited_s * kept + now_s - before_s

    @property
    def retry_after_s(self) -> float:
        """How long until what waits now will have begun, within bounds that a client can use."""
        if not self.num_tokens or self._waited_s < _MIN_OBSERVED_S:
            return MIN_RETRY_S
        if self._begun_tokens * MAX_RETRY_S <= self.num_tokens * self._waited_s:
            return MAX_RETRY_S
        return max(MIN_RETRY_S, self.num_tokens * self._waited_s / self._begun_tokens)
