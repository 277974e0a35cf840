"""The supervisor: starts the engine core, watches it, and leaves nothing behind when it ends.

It holds no user data, imports neither torch nor zmq, and sleeps in one place until a child, a
signal, the core's status pipe or whoever started it has something to say.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ipc.addresses import find_runtime_directory, make_ipc_directory, sweep_stale_directories
from ipc.errors import ExitCode
from ipc.messages import EngineFailed, LoadProgress
from ipc.processes import (
    SignalWatch,
    adopt_orphans,
    child_environment,
    describe_exit,
    kill_group,
    python_command,
)
from ipc.status import Listening, Status, StatusReader

DRAIN_GRACE_S = 5.0  # beyond the time that open requests have
STOP_GRACE_S = 10.0  # for a core that was told to stop or has failed; then it is killed
REAP_S = 10.0  # for killed processes to be gone, device memory included

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Core:
    """A running core: its process, our ends of its pipes, and what it said last."""

    process: "subprocess.Popen[bytes]"
    pidfd: int
    death_pipe: int  # never written; the core dies when it closes
    status: StatusReader
    epoch: int
    phase: str = "starting"
    is_listening: bool = False
    failure: EngineFailed | None = None


class Supervisor:
    """Owns the process tree below it: one core, whose process group holds its workers.

    Args:
        config: the encoded ``EngineConfig``, passed on as it is.
        listen: the core's address; None makes a private local one.
        is_embedded: whether the tree belongs to a user's process; then it is quiet.
        parent: descriptors that become readable when whoever started us is gone.
        report: told everything that the core says about its start and its end.
        drain_s: how long a core's open requests may go on after a signal to stop.
    """

    def __init__(
        self,
        *,
        config: bytes,
        listen: str | None,
        curve_keys: Path | None,
        parent: list[int],
        is_embedded: bool,
        report: Callable[[Status], None],
        drain_s: float = 0.0,
    ) -> None:
        self._config = config
        self._directory = make_ipc_directory() if listen is None else None
        self._listen = f"ipc://{self._directory}/core" if listen is None else listen
        self._curve_keys = curve_keys
        self._parent = parent
        self._is_embedded = is_embedded
        self._drain_s = drain_s
        self._report = report
        self._signals = SignalWatch(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._is_stopping = False
        self._kill_at_s: float | None = None

    def run(self) -> int:
        """Start a core, watch it to its end, clean up after it; the exit code to end with."""
        adopt_orphans()
        core = self._spawn(epoch=0)
        try:
            self._watch(core)
        finally:
            return_code = self._end(core)
        return self._judge(core, return_code)

    def _spawn(self, epoch: int) -> Core:
        death_read, death_write = os.pipe()
        status_read, status_write = os.pipe()
        arguments = ["--core", "--listen", self._listen, "--epoch", str(epoch)]
        arguments += ["--shutdown-timeout", str(self._drain_s)]
        arguments += ["--status-fd", str(status_write), "--death-fd", str(death_read)]
        if self._is_embedded:
            arguments.append("--embedded")
        if self._curve_keys is not None:
            arguments += ["--curve-keys", str(self._curve_keys)]
        process = subprocess.Popen(
            python_command("engine_core", *arguments),
            stdin=subprocess.PIPE,
            pass_fds=(status_write, death_read),
            env=child_environment(),
            process_group=0,  # so that the terminal's Ctrl-C reaches the supervisor alone
        )
        os.close(death_read)
        os.close(status_write)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(self._config)
        pidfd = os.pidfd_open(process.pid)
        return Core(process, pidfd, death_write, StatusReader(status_read), epoch)

    def _watch(self, core: Core) -> None:
        """Return when the core has ended or must be killed."""
        poller = select.poll()
        sources = [core.pidfd, core.status.fileno(), self._signals.fileno(), *self._parent]
        for source in sources:
            poller.register(source, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poller.poll(self._milliseconds_left())}
            if core.status.fileno() in ready:
                self._read_status(core)
                if core.status.is_at_end:
                    poller.unregister(core.status.fileno())
            if core.pidfd in ready or not ready.isdisjoint(self._parent):
                return
            if not self._take_signals(core) or self._milliseconds_left() == 0:
                return

    def _read_status(self, core: Core) -> None:
        for status in core.status.read():
            match status:
                case LoadProgress():
                    core.phase = status.phase
                case Listening():
                    core.is_listening = True
                case EngineFailed():
                    core.failure = status
                    self._kill_at_s = time.monotonic() + STOP_GRACE_S
            self._report(status)

    def _take_signals(self, core: Core) -> bool:
        """Pass the first signal on as a request to stop; a second one means at once: False."""
        for _ in self._signals.take():
            if self._is_stopping:
                return False
            self._is_stopping = True
            grace_s = self._drain_s + DRAIN_GRACE_S if self._drain_s else STOP_GRACE_S
            self._kill_at_s = time.monotonic() + grace_s
            core.process.terminate()
        return True

    def _milliseconds_left(self) -> int | None:
        if self._kill_at_s is None:
            return None
        return max(0, round((self._kill_at_s - time.monotonic()) * 1000))

    def _end(self, core: Core) -> int:
        """Kill what is left of the core's group, wait for it to be gone, remove its files."""
        kill_group(core.process.pid, signal.SIGKILL)
        return_code = core.process.wait()
        self._read_status(core)
        _reap_orphans(time.monotonic() + REAP_S)
        core.status.close()
        os.close(core.pidfd)
        os.close(core.death_pipe)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        sweep_stale_directories(find_runtime_directory())
        return return_code

    def _judge(self, core: Core, return_code: int) -> int:
        """The exit code, after making sure that the cause was reported."""
        if core.failure is not None:
            return core.failure.exit_code
        if self._is_stopping or return_code == ExitCode.CLEAN:
            return ExitCode.CLEAN
        reason = f"the engine core {describe_exit(return_code)}"
        exit_code = ExitCode.CORE_DIED
        if not core.is_listening:
            reason += f" while it was starting ({core.phase})"
            exit_code = ExitCode.START_FAILED
        self._report(EngineFailed(core.epoch, reason, exit_code))
        return exit_code


def _reap_orphans(deadline_s: float) -> None:
    """Wait until every descendant that became ours is gone, or the deadline has passed."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            if time.monotonic() >= deadline_s:
                logger.warning("a killed process of the engine is still there")
                return
            time.sleep(0.01)
