"""Starting an engine's process tree from a user's process, and never leaving it behind.

The tree ends with ``Launch.terminate``, with the garbage collection of the ``Launch``, with the
interpreter's exit, and, because the supervisor watches this process, with its sudden death too.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from typing import Any

from ipc.addresses import find_runtime_directory, sweep_stale_directories
from ipc.config import EngineConfig, encode_config
from ipc.errors import (
    ConfigError,
    DeviceStartError,
    EngineDeadError,
    EngineStartError,
    ExitCode,
)
from ipc.messages import EngineFailed, LoadProgress
from ipc.processes import child_environment, describe_exit, python_command
from ipc.status import Listening, StatusReader

logger = logging.getLogger(__name__)

STOP_GRACE_S = 15.0  # the supervisor itself kills a stuck core after 10

_LENGTH_BYTES = 8


class Launch:
    """A process tree of our own: owns the supervisor's process and the pipes to it.

    ``address`` is set once the engine is ready, ``failure`` once it said why it ended.
    Reading the status never blocks: ``update`` takes in what has arrived.
    """

    def __init__(self, config: EngineConfig, *, shows_progress: bool = True) -> None:
        self.address: str | None = None
        self.failure: EngineFailed | None = None
        status_read, status_write = os.pipe()
        self._status = StatusReader(status_read)
        self._progress = ProgressLine() if shows_progress else None
        self._process = subprocess.Popen(
            python_command(
                "engine_core",
                "--embedded",
                *("--parent-pid", str(os.getpid())),
                *("--status-fd", str(status_write)),
            ),
            stdin=subprocess.PIPE,
            pass_fds=(status_write,),
            env=child_environment(),
            start_new_session=True,  # the terminal's Ctrl-C is for the user's process
        )
        os.close(status_write)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self._finalizer = weakref.finalize(
            self, _end_tree, self._process, self.pidfd, self._status, os.getpid()
        )
        encoded = encode_config(config)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(len(encoded).to_bytes(_LENGTH_BYTES, "big") + encoded)
            self._process.stdin.flush()  # and kept open: closing it ends the tree

    def __reduce__(self) -> str:
        raise RuntimeError("an engine cannot be pickled: it is a tree of processes")

    def fileno(self) -> int:
        """Readable when ``update`` would learn something."""
        return self._status.fileno()

    def wait_ready(self, timeout_s: float | None = None) -> str:
        """Wait until the engine is ready; its address. On failure nothing is left running.

        Raises:
            ConfigError: a value of the config cannot work.
            EngineStartError: a process could not start; carries the stage and the real cause.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not self.update():
                remaining_s = None if deadline is None else deadline - time.monotonic()
                if remaining_s is not None and remaining_s <= 0:
                    raise EngineStartError(f"the engine was not ready within {timeout_s:g} s")
                select.select([self._status], [], [], remaining_s)
        except BaseException:
            self.terminate()
            raise
        assert self.address is not None
        return self.address

    def update(self) -> bool:
        """Take in what the engine said; True once it is ready.

        Raises:
            ConfigError, EngineStartError: as ``wait_ready``, when it failed before it was ready.
        """
        if not self._finalizer.alive:
            raise EngineDeadError("the engine was stopped")
        for status in self._status.read():
            match status:
                case LoadProgress():
                    if self._progress is not None:
                        self._progress.show(status)
                case Listening():
                    self.address = status.address
                    self._close_progress(is_ready=True)
                case EngineFailed():
                    self.failure = status
        if self.address is None and (self.failure is not None or self._status.is_at_end):
            self._close_progress()
            raise self._start_error()
        return self.address is not None

    def describe_end(self) -> str | None:
        """Why the engine ended, None while it runs."""
        if not self._finalizer.alive:
            return "the engine was stopped"
        with contextlib.suppress(ConfigError, EngineStartError):
            self.update()
        if self.failure is not None:
            return self.failure.reason
        return_code = self._process.poll()
        if return_code is None:
            return None
        return f"the engine's supervisor {describe_exit(return_code)}"

    def request_stop(self) -> None:
        """Ask the tree to end, without waiting for it; ``pidfd`` tells when it has."""
        if self._finalizer.alive and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def terminate(self) -> None:
        """End the tree: politely, then by force. Returns when it is gone. May be repeated."""
        self._close_progress()
        self._finalizer()

    def _close_progress(self, *, is_ready: bool = False) -> None:
        if self._progress is not None:
            self._progress.close(is_ready=is_ready)
            self._progress = None

    def _start_error(self) -> Exception:
        if self.failure is None:
            ended = describe_exit(self._process.wait())
            return EngineStartError(f"the engine's supervisor {ended} before the engine was ready")
        match self.failure.exit_code:
            case ExitCode.CONFIG:
                return ConfigError(self.failure.reason)
            case ExitCode.DEVICE_UNUSABLE:
                return DeviceStartError(self.failure.reason)
            case _:
                return EngineStartError(self.failure.reason)


class ProgressLine:
    """How a start goes on: a bar on a terminal, else one log line per phase with its seconds."""

    def __init__(self) -> None:
        self._is_bar = sys.stderr.isatty()
        self._bar: Any = None  # a tqdm bar, imported when one is shown
        self._phase = "starting"  # the processes
        self._phase_began_s = time.monotonic()

    def show(self, progress: LoadProgress) -> None:
        """Show the latest state; the first rank stands for all."""
        if progress.rank != 0:
            return
        if not self._is_bar:
            if progress.phase != self._phase:
                self._log_phase()
                self._phase = progress.phase
            return
        label = f"{progress.phase} ({progress.elapsed_s:.0f} s)"
        if self._bar is None:
            self._bar = _make_bar(label, progress)
            return
        self._bar.total = max(progress.total, 1)
        self._bar.n = progress.done
        self._bar.set_description_str(label)

    def close(self, *, is_ready: bool = False) -> None:
        """Wipe the bar; log the phase that ended with the engine being ready."""
        if self._bar is not None:
            self._bar.close()
        elif is_ready and not self._is_bar:
            self._log_phase()

    def _log_phase(self) -> None:
        now_s = time.monotonic()
        logger.info("start-up phase %r took %.1f s", self._phase, now_s - self._phase_began_s)
        self._phase_began_s = now_s


def _make_bar(label: str, progress: LoadProgress) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """A bar without tqdm's watching thread."""

        monitor_interval = 0

    return Bar(
        desc=label,
        initial=progress.done,
        total=max(progress.total, 1),
        file=sys.stderr,
        leave=False,
        bar_format="{desc} {bar} {percentage:.0f}%",
    )


def _end_tree(
    process: "subprocess.Popen[bytes]", pidfd: int, status: StatusReader, owner_pid: int
) -> None:
    """End the supervisor, which ends the rest. Does nothing in a forked copy of the owner."""
    if os.getpid() != owner_pid:
        return
    assert process.stdin is not None
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the core dies with it, and the workers with the core
            process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    os.close(pidfd)
    status.close()
    sweep_stale_directories(find_runtime_directory())  # a killed supervisor could not
