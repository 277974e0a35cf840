"""Starting our own processes and never leaving one behind. Linux only; knows no message.

A child gets the read end of a pipe whose write end only its parent holds. When the parent is gone,
in whatever way, the kernel closes the write end and kills the child: no thread and no cooperation
is needed, so it also works inside a long call into a driver.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import sys
from types import FrameType

KEY_VARIABLE = "VLLM_API_KEY"  # an API key of the server, named as users of vLLM know it

_PR_SET_CHILD_SUBREAPER = 36


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules with this interpreter."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """This environment, with an import path that finds what this process finds.

    API keys are left out: only who answers HTTP needs them, and is told in another way.
    """
    paths = [os.path.abspath(path) for path in sys.path]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}


def die_with(death_pipe: int) -> None:
    """Have the kernel kill this process as soon as the pipe's other end is closed."""
    fcntl.fcntl(death_pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(death_pipe, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(death_pipe, fcntl.F_GETFL)
    fcntl.fcntl(death_pipe, fcntl.F_SETFL, flags | os.O_ASYNC)
    if is_closed(death_pipe):  # before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def is_closed(pipe: int) -> bool:
    """Whether the other end of a pipe is gone."""
    poller = select.poll()
    poller.register(pipe, 0)
    return any(events & select.POLLHUP for _, events in poller.poll(0))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        return not is_readable(pidfd)
    finally:
        os.close(pidfd)


def is_readable(descriptor: int) -> bool:
    """Whether there is something to read now; for a pidfd: whether its process has ended."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that they can be waited for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def kill_group(group: int, signal_number: int) -> None:
    """Send a signal to a process group; nothing happens when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal_number)


def describe_exit(return_code: int) -> str:
    """How a process ended, as a clause: "was killed by SIGKILL", "exited with code 1"."""
    if return_code >= 0:
        return f"exited with code {return_code}"
    try:
        return f"was killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"was killed by signal {-return_code}"


class SignalWatch:
    """Turns termination signals into a readable descriptor, for a loop that waits for several.

    For processes of our own only, in the main thread: it replaces the process's handlers, those
    excepted that were set to ignore, as nohup and shells do for jobs in the background.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = frozenset(signals)
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _noted)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Readable while a signal waits to be taken."""
        return self._receiver.fileno()

    def close(self) -> None:
        """Close the descriptors; the handlers stay."""
        self._receiver.close()
        self._sender.close()

    def take(self) -> list[signal.Signals]:
        """The watched signals since the last call, oldest first.

        The descriptor tells of every signal that has a handler; what others watch is not ours.
        """
        try:
            numbers = self._receiver.recv(4096)
        except BlockingIOError:
            return []
        return [s for s in map(signal.Signals, numbers) if s in self._signals]


def _noted(_number: int, _frame: FrameType | None) -> None:
    """A handler must exist for the wake-up descriptor to be written; it has nothing to do."""
