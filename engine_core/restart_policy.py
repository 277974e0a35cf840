"""Whether a lost engine core is replaced, and after how long a wait. Pure: told the time.

A death from *outside*, a kill that nobody here sent, says nothing about the engine: it is replaced
at once, as often as it happens. A death from *inside*, and a restart that failed, may happen again
for the same reason: the wait doubles, and too many of them mean that the engine is given up.
"""

import random
import signal
from collections import deque
from dataclasses import dataclass

from ipc.errors import ExitCode
from ipc.messages import EngineFailed
from ipc.processes import describe_exit

MAX_FAILURES = 5  # of the engine's own making within the window; one more and it is given up
WINDOW_S = 60.0
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0
_JITTER = 0.2  # of the wait, so that engines that fell together do not come back together
_SIGNALS_OF_OTHERS = frozenset({signal.SIGKILL, signal.SIGTERM})
_RUNTIME_CODES = frozenset(
    {ExitCode.CORE_DIED, ExitCode.WORKER_DIED, ExitCode.DEVICE_UNUSABLE}
)  # what an engine that served can be given up with


@dataclass(frozen=True, kw_only=True)
class Death:
    """How a core ended.

    Args:
        return_code: of its process, negative for a signal.
        failure: its last words, if it had some.
        has_served: whether it had become ready.
        was_out_of_memory: whether the kernel killed a process of the tree for its memory.
        was_ours: whether we killed it.
    """

    return_code: int
    failure: EngineFailed | None
    has_served: bool
    was_out_of_memory: bool
    was_ours: bool

    @property
    def is_outside(self) -> bool:
        """Whether somebody else ended the core, or one of its workers."""
        if self.was_out_of_memory or self.was_ours:
            return False
        if self.failure is not None:
            return self.failure.killed_by in _SIGNALS_OF_OTHERS
        # A core that is told to stop ends in good order; it was not us who told it.
        return self.return_code == ExitCode.CLEAN or -self.return_code in _SIGNALS_OF_OTHERS

    @property
    def exit_code(self) -> int:
        """The code that an engine given up because of this ends with."""
        return ExitCode.CORE_DIED if self.failure is None else self.failure.exit_code

    def describe(self) -> str:
        """The cause in words."""
        if self.failure is not None:
            return self.failure.reason
        text = f"the engine core {describe_exit(self.return_code)}"
        return f"{text}: the system is out of memory" if self.was_out_of_memory else text


class RestartPolicy:
    """Remembers failures, and decides on the next restart."""

    def __init__(self, random_number: random.Random | None = None) -> None:
        self._random = random_number or random.Random()
        self._failures: deque[float] = deque()  # when the latest ones happened
        self._num_in_vain = 0  # restarts in a row that did not come to serve
        self._exit_code = int(ExitCode.CORE_DIED)

    @property
    def exit_code(self) -> int:
        """The code of an engine that was given up."""
        return self._exit_code

    def next_wait_s(self, death: Death, now_s: float) -> float | None:
        """How long to wait before the next start; None: give up."""
        self._num_in_vain = 0 if death.has_served else self._num_in_vain + 1
        while self._failures and self._failures[0] <= now_s - WINDOW_S:
            self._failures.popleft()
        if death.is_outside:
            return self._wait_s(self._num_in_vain)
        if death.exit_code in _RUNTIME_CODES:
            self._exit_code = death.exit_code
        self._failures.append(now_s)
        if len(self._failures) > MAX_FAILURES or self._num_in_vain > MAX_FAILURES:
            return None
        return self._wait_s(max(len(self._failures), self._num_in_vain))

    def _wait_s(self, num_failures: int) -> float:
        if num_failures == 0:
            return 0.0
        wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(num_failures - 1, 10))
        return wait_s * (1.0 + self._random.uniform(-_JITTER, _JITTER))
