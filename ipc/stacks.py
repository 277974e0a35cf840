"""The stacks of a process that hangs: it prints them itself, when its watcher sends a signal.

The interpreter's own handler does it, so it works where no Python code runs any more: in a kernel,
in a lock, in an endless loop. A process that is stopped prints nothing.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR2
_PRINT_S = 0.3  # until they are printed


def print_stacks_when_asked() -> None:
    """Have every thread's stack printed to stderr when somebody asks for it, from now on."""
    faulthandler.register(STACK_SIGNAL, file=sys.stderr, all_threads=True)


def ask_for_stacks(pids: Iterable[int]) -> None:
    """Have these processes print their stacks; returns when they should be there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
    time.sleep(_PRINT_S)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP; False where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in "Tt"
