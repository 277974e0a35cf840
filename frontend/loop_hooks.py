"""What an engine's client hangs into a running event loop, so that it can be taken out again.

Works with asyncio's own loop and with uvloop; adds no thread and no signal handler.
"""

import asyncio
import weakref
from collections.abc import Callable


class LoopHooks:
    """What one client has registered; outlives the client just long enough to undo it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptors: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The client's loop."""
        assert self._loop is not None, "not connected yet"
        return self._loop

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin, in this loop."""
        assert self._loop is None, "connected already"
        self._loop = loop

    def add(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``descriptor`` is readable."""
        self.loop.add_reader(descriptor, callback)
        self._descriptors.add(descriptor)

    def remove(self, descriptor: int) -> None:
        """Undo ``add``."""
        self._descriptors.discard(descriptor)
        self.loop.remove_reader(descriptor)

    def clear(self) -> None:
        """Undo every ``add``."""
        for descriptor in tuple(self._descriptors):
            self.remove(descriptor)

    def repeat(self, callback: Callable[[], None], interval_s: float) -> None:
        """Call ``callback`` every ``interval_s``, and nothing else any more."""
        if self._timer is not None:
            self._timer.cancel()

        def run() -> None:
            self._timer = self.loop.call_later(interval_s, run)
            callback()

        self._timer = self.loop.call_later(interval_s, run)

    def close(self) -> None:
        """Undo everything, unless the loop is gone already. Harmless when repeated."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._loop is not None and not self._loop.is_closed():
            for descriptor in self._descriptors:
                self._loop.remove_reader(descriptor)
        self._descriptors.clear()


def weakly(method: Callable[[], None]) -> Callable[[], None]:
    """A callback for a loop that does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        target = reference()
        if target is not None:
            target()

    return call


async def until_readable(descriptor: int) -> None:
    """Wait until a descriptor is readable."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
