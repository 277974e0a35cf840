"""Waiting for steps on a device: asleep while they run, awake soon after they end.

A wait that blocks in the driver comes back 50 to 200 us late, and one that spins takes a core. So
the waiter sleeps for most of the time that the last step took, and then looks again and again.
"""

import ctypes
import time
from collections.abc import Callable

_SHARE = 0.7  # of what is left, by the last step's measure, is slept at once
_OVERDUE_SHARE = 1 / 16  # of the time that a step is overdue
_SHORTEST_S, _LONGEST_S = 10e-6, 250e-6  # one sleep; a step may be much shorter than the last
_PR_SET_TIMERSLACK = 29  # linux/prctl.h
_SLACK_NS = 1000


class StepClock:
    """Knows when the last step ended and how long it took. Used by one thread, step after step."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._last_end_s = 0.0
        self._last_step_s = 0.0

    def wait(self, is_done: Callable[[], bool], launched_s: float) -> None:
        """Return when the step is done.

        Args:
            launched_s: when it was queued, behind the steps before it.
        """
        start_s = max(launched_s, self._last_end_s)
        due_s = start_s + self._last_step_s
        while not is_done():
            left_s = due_s - self._clock()
            wanted_s = left_s * (_SHARE if left_s > 0 else -_OVERDUE_SHARE)
            self._sleep(min(max(wanted_s, _SHORTEST_S), _LONGEST_S))
        self._last_end_s = self._clock()
        self._last_step_s = self._last_end_s - start_s


def sharpen_timers() -> None:
    """Let this thread's sleeps end within a microsecond or so of their time; Linux adds 50."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
