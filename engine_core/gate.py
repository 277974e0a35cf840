"""What is let in, and for how long: bounds on waiting, deadlines, and the end of admission.

Frontends refuse what is too much for them alone; this bound holds for all of them together. It is
told the time.
"""

import heapq
from collections.abc import Iterator

from engine_core.request import RequestGroup
from engine_core.waiting_room import WaitingRoom
from ipc.errors import (
    DeadlineExceededError,
    EngineCrashError,
    EngineDrainingError,
    EngineOverloadedError,
    RequestError,
)
from ipc.messages import AddRequest, FinishReason, Limits

_FEW_DEADLINES = 64  # not worth looking for those of ended requests

# Why a request may not be admitted; its client is told, and nobody else notices.
REFUSALS = (RequestError, EngineOverloadedError, DeadlineExceededError, EngineCrashError)

# How an overdue request ends: its reason, the error where it failed, and the error's class.
Ending = tuple[FinishReason, str | None, str]


class Gate:
    """Owns the deadlines of open requests, and whether anything is let in at all."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._deadlines: list[tuple[float, int, RequestGroup]] = []  # a heap
        self._num_watched = 0
        self._max_deadlines = _FEW_DEADLINES
        self.is_draining = False

    def check(self, request: AddRequest, room: WaitingRoom, *, num_open: int, now_s: float) -> None:
        """Refuse what comes too late or is too much; what a former epoch let in stays in.

        Args:
            room: who waits to begin.
            num_open: requests that have not ended, of all frontends.

        Raises:
            EngineDrainingError: nothing is let in any more.
            EngineOverloadedError: too many requests, or too many prompt tokens, wait.
            DeadlineExceededError: its time is up already.
        """
        deadline_s = deadline_of(request, now_s)
        if deadline_s is not None and deadline_s <= now_s:
            raise DeadlineExceededError("the request's time was up before it reached the engine")
        if request.num_attempts > 1 or request.resumed:
            return
        if self.is_draining:
            raise EngineDrainingError("the engine is shutting down")
        limits = self._limits
        max_open = limits.max_num_seqs + limits.max_waiting_requests
        max_tokens = limits.max_waiting_tokens
        if num_open >= max_open:
            raise EngineOverloadedError(
                f"{num_open} requests are in flight, at most {max_open}", room.retry_after_s
            )
        num_tokens = len(request.prompt_token_ids)
        is_alone = room.num_requests == 0  # then any prompt may wait
        if max_tokens and not is_alone and room.num_tokens + num_tokens > max_tokens:
            raise EngineOverloadedError(
                f"{room.num_tokens} prompt tokens wait, at most {max_tokens}, and this prompt "
                f"has {num_tokens}",
                room.retry_after_s,
            )

    def watch(self, group: RequestGroup) -> None:
        """Keep an eye on an admitted request's deadline."""
        if group.deadline_s is None:
            return
        self._num_watched += 1
        heapq.heappush(self._deadlines, (group.deadline_s, self._num_watched, group))
        if len(self._deadlines) > self._max_deadlines:  # most may have ended long ago
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_finished]
            heapq.heapify(self._deadlines)
            self._max_deadlines = max(_FEW_DEADLINES, 2 * len(self._deadlines))

    @property
    def next_deadline_s(self) -> float | None:
        """When the next look is due."""
        return self._deadlines[0][0] if self._deadlines else None

    def take_overdue(self, now_s: float) -> Iterator[tuple[RequestGroup, Ending]]:
        """Open requests whose time is up, each once, and how they end."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now_s:
            group = heapq.heappop(deadlines)[2]
            if not group.is_finished:
                yield group, _ending(group)


def deadline_of(request: AddRequest, now_s: float) -> float | None:
    """The deadline on this host's clock."""
    if request.timeout_s is not None:
        return now_s + request.timeout_s
    return request.deadline_s


def _ending(group: RequestGroup) -> Ending:
    """A request that has begun to answer ends with what there is; another has failed."""
    if any(branch.output_token_ids for branch in group.branches):
        return FinishReason.TIMEOUT, None, ""
    where = "while it computed its prompt" if group.num_waiting_tokens is None else "while waiting"
    error = f"the request's time was up {where}, before its first token"
    return FinishReason.ERROR, error, DeadlineExceededError.__name__
