"""Whether an engine lives, answered at once: a busy engine is not a dead one.

An engine that ended is known without asking. One that is frozen is found by asking: at most one
question is under way, nobody waits for its answer, and only a long silence counts.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from ipc.errors import EngineDeadError, EngineError

# The core answers between two steps of its own loop; workers are watched by the core itself.
SILENCE_LIMIT_S = 60.0


class Liveness:
    """Owns the question that an engine has been asked, and since when it has no answer."""

    def __init__(
        self, ask: Callable[[], Awaitable[object]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``ask`` returns when the engine answered; it is called in the running event loop."""
        self._ask = ask
        self._clock = clock
        self._question: asyncio.Task[None] | None = None
        self._asked_s = 0.0

    def check(self) -> None:
        """Ask, unless a question is under way.

        Raises:
            EngineDeadError: the engine has left a question without an answer for too long.
        """
        if self._question is None or self._question.done():
            self._asked_s = self._clock()
            self._question = asyncio.get_running_loop().create_task(self._answered())
        silence_s = self._clock() - self._asked_s
        if silence_s > SILENCE_LIMIT_S:
            raise EngineDeadError(f"the engine gave no sign of life for {silence_s:.0f} s")

    async def _answered(self) -> None:
        try:
            await self._ask()
        except EngineError:  # an engine's end reaches everybody by itself
            return
