"""How many connections may be open, and whose turn it is to go when there are too many.

A connection that waits for a request (its head has not come, or its last answer is done) costs the
server a descriptor and gives it nothing. When all places are taken, the one that has waited longest
makes room; so a thousand clients that say nothing do not keep others out.
"""

import logging
import resource
from typing import Protocol

DEFAULT_MAX_CONNECTIONS = 16384

_OTHER_FILES = 256  # descriptors for everything but clients

logger = logging.getLogger(__name__)


class Connection(Protocol):
    """What can be asked to go."""

    def cut(self) -> None:
        """Close at once, whatever is under way."""


class ConnectionTable:
    """Owns the list of one process's open connections, and which of them wait for a request."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # longest first
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, connection: Connection) -> bool:
        """Take a new connection in; False when there is no place and nobody to make room."""
        if len(self._open) >= self._limit:
            if not self._waiting:
                return False
            oldest = next(iter(self._waiting))
            self.close(oldest)
            self.num_evicted += 1
            oldest.cut()
        self._open.add(connection)
        self._waiting[connection] = None
        return True

    def note_request(self, connection: Connection) -> None:
        """The head of a request came."""
        self._waiting.pop(connection, None)

    def note_answered(self, connection: Connection) -> None:
        """The answer is done; the connection waits for another request."""
        if connection in self._open:
            self._waiting[connection] = None

    def close(self, connection: Connection) -> None:
        """Forget a connection; harmless when repeated."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)


def raise_file_limit(max_connections: int) -> int:
    """Let this process open enough descriptors; how many connections it can really hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    possible = max(1, soft - _OTHER_FILES)
    logger.warning(
        "--max-connections is lowered from %d to %d: a process here may open %d files",
        max_connections,
        possible,
        soft,
    )
    return possible
