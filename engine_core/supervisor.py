"""The supervisor: starts the engine core, starts another when it is lost, leaves nothing behind.

A core that is lost takes its whole process group along; the next one gets the next epoch and the
same address, and frontends continue there. The supervisor holds no user data, imports neither
torch nor zmq, and sleeps in one place until a child, a signal, the core's status pipe or whoever
started it has something to say.
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

from engine_core.memory_kills import count_memory_kills
from engine_core.restart_policy import Death, RestartPolicy
from ipc.addresses import find_runtime_directory, make_ipc_directory, sweep_stale_directories
from ipc.config import decode_config
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

STOP_GRACE_S = 10.0  # for a core that was told to stop or cannot start; then it is killed
FAILED_GRACE_S = 1.0  # for one that served and failed: others wait for the next one
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
    num_memory_kills: int  # of the whole machine's count, when it was started
    started_s: float
    phase: str = "starting"
    is_listening: bool = False
    was_killed: bool = False  # by us, while it ran
    failure: EngineFailed | None = None


class Supervisor:
    """Owns the process tree below it: one core, whose process group holds its workers.

    Args:
        config: the encoded ``EngineConfig``, passed on as it is.
        listen: the core's address; None makes a private local one.
        is_embedded: whether the tree belongs to a user's process; then it is quiet.
        parent: descriptors that become readable when whoever started us is gone.
        report: told everything that the core says about its start and its end.
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
    ) -> None:
        self._config = config
        self._recovers = decode_config(config).parallel_config.enable_recovery
        self._directory = make_ipc_directory() if listen is None else None
        self._listen = f"ipc://{self._directory}/core" if listen is None else listen
        self._curve_keys = curve_keys
        self._parent = parent
        self._is_embedded = is_embedded
        self._report = report
        self._signals = SignalWatch(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._is_stopping = False
        self._kill_at_s: float | None = None
        self._exit_code = int(ExitCode.CLEAN)

    def run(self) -> int:
        """Start cores until one is the last; clean up; the exit code to end with."""
        adopt_orphans()
        policy = RestartPolicy()
        core = self._spawn(epoch=0)
        try:
            while (wait_s := self._serve_once(core, policy)) is not None:
                if not self._pause(wait_s):
                    return int(ExitCode.CLEAN)
                core = self._spawn(core.epoch + 1)
        finally:
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
        return self._exit_code

    def _serve_once(self, core: Core, policy: RestartPolicy) -> float | None:
        """Watch a core to its end; how long to wait before the next one, None: it was the last."""
        try:
            is_over = self._watch(core)
        finally:
            noticed_s = time.monotonic()
            return_code = self._end(core)
        is_first = core.epoch == 0 and not core.is_listening  # a start that fails is no death
        if is_over or self._is_stopping or is_first or not self._recovers:
            self._exit_code = self._judge(core, return_code)
            return None
        death = Death(
            return_code=return_code,
            failure=core.failure,
            has_served=core.is_listening,
            was_out_of_memory=count_memory_kills() > core.num_memory_kills,
            was_ours=core.was_killed,
        )
        wait_s = policy.next_wait_s(death, time.monotonic())
        logger.warning(
            "%s; its processes are gone after %.2f s; %s",
            death.describe(),
            time.monotonic() - noticed_s,
            "the engine is given up"
            if wait_s is None
            else f"the next one starts in {wait_s:.1f} s",
        )
        if wait_s is None:
            self._exit_code = policy.exit_code
            reason = f"{death.describe()} (given up after {core.epoch} restarts)"
            self._report(EngineFailed(core.epoch, reason, self._exit_code))
        return wait_s

    def _pause(self, wait_s: float) -> bool:
        """Wait before a start; False when there will be none, as somebody wants us to end."""
        poller = select.poll()
        for source in (self._signals.fileno(), *self._parent):
            poller.register(source, select.POLLIN)
        return not poller.poll(wait_s * 1000) or not (self._signals.take() or self._parent)

    def _spawn(self, epoch: int) -> Core:
        death_read, death_write = os.pipe()
        status_read, status_write = os.pipe()
        arguments = ["--core", "--listen", self._listen, "--epoch", str(epoch)]
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
        return Core(
            process,
            os.pidfd_open(process.pid),
            death_write,
            StatusReader(status_read),
            epoch,
            num_memory_kills=count_memory_kills(),
            started_s=time.monotonic(),
        )

    def _watch(self, core: Core) -> bool:
        """Return when the core has ended or must be killed; True when the supervisor must end."""
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
            if not ready.isdisjoint(self._parent):
                return True
            if core.pidfd in ready:
                return False
            if not self._take_signals(core):
                return True
            if self._milliseconds_left() == 0:
                core.was_killed = core.failure is None
                return self._is_stopping

    def _read_status(self, core: Core) -> None:
        for status in core.status.read():
            match status:
                case LoadProgress():
                    core.phase = status.phase
                case Listening():
                    core.is_listening = True
                    self._listen = status.address  # a port that was free is ours from now on
                    self._note_ready(core)
                case EngineFailed():
                    core.failure = status
                    grace_s = FAILED_GRACE_S if core.is_listening else STOP_GRACE_S
                    self._kill_at_s = time.monotonic() + grace_s
            if core.epoch == 0 and not (core.is_listening and isinstance(status, EngineFailed)):
                self._report(status)  # of later ones our starter learns only the very last word

    def _note_ready(self, core: Core) -> None:
        if core.epoch:
            logger.warning(
                "engine core %d is ready after %.2f s",
                core.epoch,
                time.monotonic() - core.started_s,
            )

    def _take_signals(self, core: Core) -> bool:
        """Pass the first signal on as a request to stop; a second one means at once: False."""
        for _ in self._signals.take():
            if self._is_stopping:
                return False
            self._is_stopping = True
            self._kill_at_s = time.monotonic() + STOP_GRACE_S
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
        self._kill_at_s = None
        sweep_stale_directories(find_runtime_directory())
        return return_code

    def _judge(self, core: Core, return_code: int) -> int:
        """The exit code, after making sure that the cause was reported."""
        if core.failure is not None:
            if core.is_listening or core.epoch:
                self._report(core.failure)
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
