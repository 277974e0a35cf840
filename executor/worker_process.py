"""One worker process as its parent sees it: started, watched, ended. Imports no torch."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from ipc.channel import wait
from ipc.errors import EngineDeadError
from ipc.processes import child_environment, describe_exit, kill_group, python_command
from ipc.records import Message

_DEATH_SHOWS_S = 0.1  # sockets of a killed process close before it is seen dead


class Boot(Message, frozen=True):
    """What a worker process reads from its standard input."""

    address: str  # of the executor's channel
    rank: int
    death_pipe: int  # its other end is the parent's: when that closes, the process ends
    rendezvous: str  # a file where the ranks meet
    config: bytes  # the EngineConfig, msgpack
    token: str  # proves to the executor that a message comes from one of its own


def identity_of(token: str, rank: int) -> bytes:
    """The name under which a rank's channel receives. Nobody else knows the token in it."""
    return f"{token}-worker-{rank}".encode()


class WorkerProcess:
    """Owns a child process: its pidfd, its death pipe, its output.

    The child leads its own process group, so that nothing it starts outlives it.
    """

    def __init__(
        self,
        *,
        rank: int,
        module: str,
        address: str,
        rendezvous: str,
        config: bytes,
        token: str,
        prefixed: bool,
    ) -> None:
        self.rank = rank
        read_end, write_end = os.pipe()
        self._death_pipe = os.fdopen(write_end, "wb", buffering=0)  # closed with this object
        output = subprocess.PIPE if prefixed else None
        self._process = subprocess.Popen(
            python_command(module),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT if prefixed else None,
            env=child_environment(),
            pass_fds=(read_end,),
            process_group=0,
        )
        os.close(read_end)
        self.pidfd = os.pidfd_open(self._process.pid)
        if self._process.stdout is not None:
            relay = threading.Thread(
                target=_relay, args=(self._process.stdout, rank), daemon=True, name=f"log-{rank}"
            )
            relay.start()
        boot = Boot(address, rank, read_end, rendezvous, config, token)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.msgpack.encode(boot))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already, which its pidfd tells

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def has_exited(self) -> bool:
        """Whether the child is gone."""
        return self._process.poll() is not None

    def killed_by(self) -> int:
        """The signal that ended the child, 0 when none did; it must be gone."""
        return max(0, -self._process.wait())

    def describe_exit(self) -> str:
        """How the child ended, as a clause; it must be gone."""
        return describe_exit(self._process.wait())

    def activity(self) -> tuple[bool, float]:
        """Whether the child is stopped, and the processor time that it has used, in seconds."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:  # gone, which its pidfd tells
            return False, 0.0
        fields = text.rpartition(")")[2].split()  # behind the name, which may hold anything
        ticks = int(fields[11]) + int(fields[12])
        return fields[0] in "Tt", ticks / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End the child and all it started, now."""
        kill_group(self._process.pid, signal.SIGKILL)

    def reap(self, timeout_s: float) -> bool:
        """Wait for the end and release what was held; False when it still runs."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._death_pipe.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        return True


def killed_error(worker: WorkerProcess) -> EngineDeadError:
    """The error for a worker that is gone without a word."""
    cause = f"worker {worker.rank} {worker.describe_exit()}"
    return EngineDeadError(cause, killed_by=worker.killed_by())


def find_killed(workers: Sequence[WorkerProcess]) -> EngineDeadError | None:
    """The error for a worker that somebody killed, as far as one is gone or about to be."""
    if len(workers) > 1:
        wait([worker.pidfd for worker in workers if worker.pidfd >= 0], _DEATH_SHOWS_S)
    for worker in workers:
        if worker.has_exited() and worker.killed_by() in (signal.SIGKILL, signal.SIGTERM):
            return killed_error(worker)
    return None


def _relay(stream: IO[bytes], rank: int) -> None:
    """Pass a child's output on, each line with its rank."""
    prefix = f"(worker {rank}) ".encode()
    with stream:
        for line in stream:
            sys.stderr.buffer.write(prefix + line)
            sys.stderr.buffer.flush()
