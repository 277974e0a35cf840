"""How much a batch may put into the core's queue; the rest of it waits at home.

The core refuses what is beyond its bounds. A batch is no overload: it sends only what the core will
take, and more as requests begin and end.
"""

from ipc.messages import Limits


class CoreRoom:
    """Owns which requests were sent, and which of them have no output yet.

    Invariant: ``unstarted`` is part of what was sent, and no larger than the core's queue may be,
    yet large enough to fill a whole batch.
    """

    def __init__(self, limits: Limits) -> None:
        self._max_sent = limits.max_num_seqs + limits.max_waiting_requests
        self._max_unstarted = max(limits.max_waiting_requests, limits.max_num_seqs)
        self._max_tokens = limits.max_waiting_tokens
        self._sent: set[str] = set()
        self._num_tokens = 0
        self.unstarted: dict[str, int] = {}  # tokens of the prompt; for reading

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._sent

    def has_room(self, num_tokens: int) -> bool:
        """Whether the core takes a prompt of so many tokens; one alone always."""
        num_unstarted = len(self.unstarted)
        if num_unstarted >= self._max_unstarted or len(self._sent) >= self._max_sent:
            return False
        if not self._max_tokens or not num_unstarted:
            return True
        return self._num_tokens + num_tokens <= self._max_tokens

    def add(self, req_id: str, num_tokens: int) -> None:
        """A request is sent."""
        self._sent.add(req_id)
        self.unstarted[req_id] = num_tokens
        self._num_tokens += num_tokens

    def note_started(self, req_id: str) -> None:
        """Output of a request came; harmless when repeated."""
        self._num_tokens -= self.unstarted.pop(req_id, 0)

    def remove(self, req_id: str) -> None:
        """A request ended."""
        self.note_started(req_id)
        self._sent.discard(req_id)

    def clear(self) -> None:
        """Everything ended."""
        self._sent.clear()
        self.unstarted.clear()
        self._num_tokens = 0
