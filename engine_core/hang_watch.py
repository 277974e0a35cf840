"""Finds a core that stopped moving while it has work, and says where it stands.

Each phase has its own budget. The stacks come from the core itself: a signal makes the interpreter
print them even where its code cannot run. A process that is stopped cannot, and is said to be.
"""

import time

from engine_core.progress import Phase, ProgressPage
from ipc.config import ParallelConfig
from ipc.stacks import ask_for_stacks, is_stopped

LOOK_EVERY_S = 1.0


class HangWatch:
    """Owns the supervisor's view of one core's progress."""

    def __init__(self, descriptor: int, pid: int, budgets: ParallelConfig) -> None:
        self._page = ProgressPage(descriptor)
        self._pid = pid
        self._budgets = budgets
        self._started_s = self._loading_s = time.monotonic()
        self._loading = "starting"

    def note_loading(self, phase: str) -> None:
        """A start reports how far it has come."""
        self._loading, self._loading_s = phase, time.monotonic()

    def find(self) -> str | None:
        """Why the core counts as hung, its stacks printed; None while all is well."""
        progress = self._page.read()
        if progress.phase is Phase.STARTING:
            name, since_s = self._loading, self._loading_s
            is_compiling = "compil" in name or "warm" in name
            budgets = self._budgets
            budget_s = budgets.compiling_hang_s if is_compiling else budgets.loading_hang_s
        elif not progress.has_work and progress.phase is Phase.STEPPING:
            return None
        else:
            is_stepping = progress.phase is Phase.STEPPING
            name, since_s = progress.phase.name.lower(), progress.beat_s
            budget_s = (
                self._budgets.stepping_hang_s if is_stepping else self._budgets.loading_hang_s
            )
        silent_s = time.monotonic() - since_s
        if not 0 < budget_s <= silent_s:
            return None
        state = "is stopped" if is_stopped(self._pid) else "hangs"
        if state == "hangs":
            ask_for_stacks([self._pid])
        return (
            f"hang: the engine core (process {self._pid}) {state} while {name}: no progress for "
            f"{silent_s:.1f} s after {progress.num_steps} steps, at most {budget_s:g} s are allowed"
        )

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()
