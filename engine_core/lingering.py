"""Requests whose streams may be taken up again: after their frontend went, and after they ended.

A lingering request belongs to its frontend as any other does. When that frontend goes, the request
runs on for nobody; when it ends, its tokens stay for a while. Whoever knows its stream's name may
reclaim it: the core lets go, and the request comes back as a new one that resumes from its tokens,
most of which the prefix cache still holds.

Pure bookkeeping: it is told the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine_core.request import RequestGroup
from ipc.errors import RequestError, UnknownStreamError
from ipc.messages import AddRequest, EngineOutput, FinishReason, ReclaimedRequest

NOBODY = b""  # the client of requests whose frontend has gone
_LOOK_EVERY_S = 0.25
MAX_LINGERING = 4096  # streams; the one that ends its wait first makes room


@dataclass(slots=True)
class _Lingerer:
    request: AddRequest
    group: RequestGroup
    expires_s: float | None = None  # None while its frontend has it, and it runs


class Lingering:
    """Owns the lingering requests, by the names of their streams."""

    def __init__(self) -> None:
        self._lingerers: dict[str, _Lingerer] = {}
        self._next_look_s = 0.0

    def __len__(self) -> int:
        return len(self._lingerers)

    def check(self, request: AddRequest) -> None:
        """Raise RequestError when the name of a request's stream is in use."""
        if request.linger is None:
            return
        if request.linger.stream_id in self._lingerers:
            raise RequestError("a stream of this name is open already", "stream_id")

    def add(self, request: AddRequest, group: RequestGroup) -> None:
        """Remember a request that was admitted, where it wants to linger."""
        if request.linger is not None:
            group.linger = request.linger
            self._lingerers[request.linger.stream_id] = _Lingerer(request, group)

    def orphan(self, group: RequestGroup, now_s: float) -> bool:
        """Keep a running request whose frontend has gone; False when it does not linger."""
        if group.linger is None:
            return False
        self._lingerers[group.linger.stream_id].expires_s = now_s + group.linger.seconds
        group.move_to_client(NOBODY, group.linger.stream_id)
        return True

    def note_end(self, group: RequestGroup, now_s: float) -> None:
        """A request has come to its end: its stream may still be taken up for a while."""
        if group.linger is None:
            return
        if any(branch.finish_reason is FinishReason.ERROR for branch in group.branches):
            self.forget(group)
            return
        self._lingerers[group.linger.stream_id].expires_s = now_s + group.linger.seconds
        if len(self._lingerers) > MAX_LINGERING:
            ended = [
                (each.expires_s or 0.0, name)
                for name, each in self._lingerers.items()
                if each.group.is_finished  # one that runs must still be found at its end
            ]
            del self._lingerers[min(ended)[1]]

    def forget(self, group: RequestGroup) -> None:
        """A request was aborted or failed: nobody will want to go on with it."""
        if group.linger is not None:
            self._lingerers.pop(group.linger.stream_id, None)

    def expire(self, now_s: float) -> list[RequestGroup]:
        """Forget those whose time is over; return those that still run. Looks now and then."""
        if now_s < self._next_look_s:
            return []
        self._next_look_s = now_s + _LOOK_EVERY_S
        over = [
            name
            for name, each in self._lingerers.items()
            if each.expires_s is not None and now_s >= each.expires_s
        ]
        groups = [self._lingerers.pop(name).group for name in over]
        return [group for group in groups if not group.is_finished]

    def reclaim(
        self, stream_id: str, num_taken: Sequence[int]
    ) -> tuple[ReclaimedRequest, RequestGroup]:
        """What it takes to go on with a stream, and the request to end if it still runs.

        Args:
            num_taken: tokens of each branch that its reader has; none of those not named.

        Raises:
            UnknownStreamError: there is no such stream.
            RequestError: its reader cannot have so much of it. The stream stays as it is.
        """
        found = self._lingerers.get(stream_id)
        if found is None:
            raise UnknownStreamError("this stream does not exist, or its time is over")
        known = [len(branch.output_token_ids) for branch in found.group.branches]
        is_possible = len(num_taken) <= len(known) and all(
            0 <= taken <= most for taken, most in zip(num_taken, known, strict=False)
        )
        if not is_possible:
            raise RequestError(f"after: this stream has brought {known} tokens so far", "after")
        branches = [
            EngineOutput(
                branch.req_id,
                branch.index,
                0,
                list(branch.output_token_ids),
                branch.finish_reason,
                branch.stop_reason,
                num_cached_tokens=branch.num_cached_tokens or 0,
            )
            for branch in found.group.branches
        ]
        return ReclaimedRequest(found.request, branches), found.group
