"""The order in which requests wait.

One order serves both policies: (priority, arrival, branch), with priority 0 for everyone when
first come is first served. A preempted request keeps its arrival, and so its place in front.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from engine_core.request import Request

_order = attrgetter("order")


class RequestQueue:
    """Requests sorted by ``order``, which no two requests share.

    While ``is_holding``, requests that join late are set aside and not iterated.
    """

    def __init__(self) -> None:
        # A sorted list: inserting moves pointers only, and requests mostly leave at the front.
        self._requests: list[Request] = []
        self._held: list[Request] = []
        self.is_holding = False

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __contains__(self, request: Request) -> bool:
        place = bisect_left(self._requests, request.order, key=_order)
        return place < len(self._requests) and self._requests[place] is request

    @property
    def num_held(self) -> int:
        """Requests set aside."""
        return len(self._held)

    def has_set_aside(self, request: Request) -> bool:
        """Whether a request is among those set aside."""
        return request in self._held

    def join(self, request: Request) -> None:
        """Add a new request, or set it aside while holding."""
        if self.is_holding:
            self._held.append(request)
        else:
            self.add(request)

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        insort(self._requests, request, key=_order)

    def remove(self, request: Request) -> None:
        """Take a request out; it may be one set aside or not be here at all."""
        place = bisect_left(self._requests, request.order, key=_order)
        if place < len(self._requests) and self._requests[place] is request:
            del self._requests[place]
        elif request in self._held:
            self._held.remove(request)

    def hold(self) -> None:
        """Set aside whoever joins from now on."""
        self.is_holding = True

    def release(self) -> None:
        """Stop holding; those set aside take their places."""
        self.is_holding = False
        for request in self._held:
            self.add(request)
        self._held.clear()
