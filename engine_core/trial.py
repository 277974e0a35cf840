"""Requests on trial: each runs alone until it has brought a token; everybody else waits meanwhile.

A new core learns from its supervisor who is suspected of having killed the last ones. Those it
tries first, one after the other, so that a further death names its cause.
"""

import hashlib
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from engine_core.flight_record import Flight, FlightRecord, Verdicts
from engine_core.request import RequestGroup
from ipc.errors import EngineCrashError, RefusedContentError
from ipc.messages import AddRequest, SchedulerOutput

if TYPE_CHECKING:
    from engine_core.core import EngineCore

AWAITED_S = 10.0  # for the accused to be sent again by their frontends
_STEPS_UNTIL_KNOWN = 9  # a step's tokens are taken in after so many further ones at most


def key_of(request: AddRequest) -> str:
    """The name of a request that it keeps from core to core, unlike any other frontend's."""
    return f"{request.req_id}@{request.arrival_time_s!r}"


def fingerprint(request: AddRequest) -> str:
    """A digest of what a request asks, its seed aside."""
    params = msgspec.structs.replace(request.params, seed=0)
    content = msgspec.msgpack.encode([request.prompt_token_ids, params])
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Trial:
    """Owns who waits for a trial, who is on it, and who waits until all are over."""

    def __init__(self, core: "EngineCore", record: FlightRecord | None) -> None:
        self._core = core
        self._record = record
        verdicts = Verdicts() if record is None else record.read_verdicts()
        self._guilty = frozenset(verdicts.guilty)
        self._refused = verdicts.refused
        self._awaited = set(verdicts.on_trial)
        self._until_s = time.monotonic() + AWAITED_S
        self._accused: deque[tuple[RequestGroup, AddRequest]] = deque()
        self._current: tuple[RequestGroup, AddRequest] | None = None
        self._others: list[RequestGroup] = []
        self._quiet_from = 0  # from this step on nobody runs who has brought no token

    @property
    def is_active(self) -> bool:
        """Whether somebody is awaited, waits or is on trial."""
        return bool(self._awaited or self._accused or self._current or self._others)

    def check(self, request: AddRequest) -> None:
        """Refuse what has killed a core.

        Raises:
            EngineCrashError: this very request did.
            RefusedContentError: one with the same content did.
        """
        if self._guilty and key_of(request) in self._guilty:
            raise EngineCrashError("this request ended the engine each time it ran (engine_crash)")
        until_s = self._refused.get(fingerprint(request)) if self._refused else None
        if until_s is not None and time.monotonic() < until_s:
            raise RefusedContentError(
                f"a request with this content ended the engine; it is refused for another "
                f"{until_s - time.monotonic():.0f} s"
            )

    def add(self, group: RequestGroup, request: AddRequest) -> None:
        """Queue a group: at once where no trial is on."""
        group.key = key_of(request)
        if not self.is_active:
            self._core.scheduler.add(group)
        elif group.key in self._awaited:
            self._awaited.discard(group.key)
            self._accused.append((group, request))
        else:
            self._others.append(group)

    def release(self, group: RequestGroup) -> None:
        """Let a group that waits here go to the scheduler, as it is to be ended."""
        for each in self._accused:
            if each[0] is group:
                self._accused.remove(each)
                self._core.scheduler.add(group)
                return
        if group in self._others:
            self._others.remove(group)
            self._core.scheduler.add(group)

    def advance(self) -> None:
        """Go on to the next accused when one has brought a token, and to all others in the end."""
        if not self.is_active:
            return
        if self._current is not None:
            branches = self._current[0].branches
            is_over = any(b.has_reported or b.finish_reason is not None for b in branches)
            if not is_over:
                return
            self._current = None
        if self._accused:
            self._current = self._accused.popleft()
            self._core.scheduler.add(self._current[0])
        elif not self._awaited or time.monotonic() > self._until_s:
            self._awaited.clear()
            others, self._others = self._others, []
            for group in others:
                self._core.scheduler.add(group)

    def note_step(self, plan: SchedulerOutput) -> None:
        """Write down who is in a step, before it runs. Tokens alone change nothing."""
        if self._record is None:
            return
        step_id = plan.step_id
        if plan.num_new_tokens or plan.new_rows:
            self._quiet_from = step_id + _STEPS_UNTIL_KNOWN
        flight = None
        if step_id <= self._quiet_from:
            running = self._core.scheduler.lifecycle.running
            suspects = dict.fromkeys(r.group.key for r in running if not r.has_reported)
            current = self._current
            flight = Flight(
                list(suspects),
                None if current is None else current[0].key,
                "" if current is None else fingerprint(current[1]),
            )
        self._record.note(step_id, flight)
