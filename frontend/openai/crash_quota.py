"""A key whose requests have ended the engine more than once in a minute has to wait."""

from collections import deque

from ipc.errors import EngineOverloadedError

MAX_CRASHES = 2
WINDOW_S = 60.0


class CrashQuota:
    """Owns when which key's requests were found to end the engine. It is told the time."""

    def __init__(self) -> None:
        self._crashes: dict[str | None, deque[float]] = {}

    def note(self, tenant: str | None, now_s: float) -> None:
        """A request of this key ended the engine."""
        self._crashes.setdefault(tenant, deque(maxlen=MAX_CRASHES)).append(now_s)

    def check(self, tenant: str | None, now_s: float) -> None:
        """Let a request of this key pass.

        Raises:
            EngineOverloadedError: too many of its requests have ended the engine.
        """
        crashes = self._crashes.get(tenant)
        if crashes is None or len(crashes) < MAX_CRASHES:
            return
        wait_s = crashes[0] + WINDOW_S - now_s
        if wait_s <= 0:
            return
        raise EngineOverloadedError(
            f"{MAX_CRASHES} requests of this key ended the engine within {WINDOW_S:.0f} s",
            retry_after_s=wait_s,
        )
