"""Signs of life on streams that are silent because the engine restarts.

Proxies cut connections on which nothing moves. A comment is no event: clients pass over it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frontend.openai.state import ServerState

EVERY_S = 5.0


class KeepAlive:
    """Owns when the next comment is due. Idle, at no cost, while the engine runs."""

    def __init__(self, state: "ServerState") -> None:
        self._state = state
        self._due_s: float | None = None  # set while the engine restarts

    def tick(self, now_s: float) -> None:
        """Look at the clock; call it several times a second."""
        if self._state.engine.restarting is None:
            self._due_s = None
        elif self._due_s is None:
            self._due_s = now_s + EVERY_S
        elif now_s >= self._due_s:
            self._due_s = now_s + EVERY_S
            for stream in tuple(self._state.open_streams):
                stream.keep_alive()
