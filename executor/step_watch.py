"""Whether the workers still move: the answers that came, and how long the next one is overdue.

A worker that is stopped, waits for ever or spins in a collective neither dies nor answers. It is
found by its silence: an answer that is due for longer than the limit. On the CPU a step may take
long on a small machine, so there only workers that compute nothing meanwhile count as stuck.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ipc.messages import ModelRunnerOutput
from ipc.tensors import Frames

LOOK_AFTER_S = 1.0  # an answer that is due for less raises no question
LOOK_AGAIN_S = 0.02  # between two looks while there is traffic
_MOVED_S = 0.05  # processor time that shows a worker at work

Answer = tuple[ModelRunnerOutput, Frames]


class Watched(Protocol):
    """What is asked about a worker."""

    rank: int

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def activity(self) -> tuple[bool, float]:
        """Whether it is stopped, and the processor time that it has used, in seconds."""
        ...


class StepWatch:
    """Owns the answers that nobody has taken yet, and the time since when one is due."""

    def __init__(
        self,
        limit_s: float,
        *,
        counts_processor_time: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch for answers that come later than ``limit_s``; 0: never complain."""
        self._limit_s = limit_s
        self._clock = clock
        self._counts_processor_time = counts_processor_time
        self._num_due = 0
        self._due_since_s = 0.0
        self._next_look_s = 0.0
        self._processor_s: float | None = None  # of all workers; None: not looked at since then
        self._answers: deque[Answer] = deque()

    def expect(self) -> None:
        """One more answer is due."""
        if self._num_due == 0:
            self._restart()
        self._num_due += 1

    def note_answer(self) -> None:
        """An answer came; the next one is due from now on."""
        self._num_due -= 1
        self._restart()

    def keep(self, output: ModelRunnerOutput, frames: Frames) -> None:
        """A step's answer came."""
        self.note_answer()
        self._answers.append((output, frames))

    def take(self) -> Answer | None:
        """The oldest answer that nobody has taken yet."""
        return self._answers.popleft() if self._answers else None

    def is_look_due(self) -> bool:
        """Whether the workers were not looked at a moment ago; then they are taken to be now."""
        now_s = self._clock()
        if now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + LOOK_AGAIN_S
        return True

    def describe_stuck(self, workers: Sequence[Watched]) -> str | None:
        """Who keeps an answer back for too long, as a sentence; None while all is well."""
        if self._num_due == 0 or self._limit_s == 0:
            return None
        overdue_s = self._clock() - self._due_since_s
        if overdue_s < min(LOOK_AFTER_S, self._limit_s):
            return None
        if self._counts_processor_time and self._may_compute(workers):
            return None
        if overdue_s < self._limit_s:
            return None
        stopped = [worker for worker in workers if worker.activity()[0]]
        names = [f"worker {w.rank} (process {w.pid})" for w in stopped or workers]
        state = "stopped" if stopped else "stuck"
        return (
            f"{' and '.join(names)} seems {state}: no result of a step for {overdue_s:.0f} s, "
            f"at most {self._limit_s:g} s are allowed (--engine-iteration-timeout)"
        )

    def _restart(self) -> None:
        self._due_since_s = self._clock()
        self._processor_s = None

    def _may_compute(self, workers: Sequence[Watched]) -> bool:
        """Whether the workers have computed since the last look; the first look cannot tell."""
        before_s = self._processor_s
        self._processor_s = sum(worker.activity()[1] for worker in workers)
        if before_s is None:
            return True
        if self._processor_s - before_s < _MOVED_S:
            return False
        self._due_since_s = self._clock()
        return True
