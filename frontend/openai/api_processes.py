"""Several API processes on one port, in front of one engine: ``--api-server-count``.

The process that the user started serves nothing itself: it holds the port and the engine, starts
the API processes, replaces one that dies, and passes signals on. Each API process listens on the
port by itself (``SO_REUSEPORT``: the kernel deals out connections) and is attached to the engine
like any other frontend; one that dies takes its own streams along and nobody else's.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from frontend.launcher import Launch
from ipc.config import EngineConfig
from ipc.errors import ExitCode
from ipc.processes import SignalWatch, child_environment, describe_exit, python_command

QUICK_DEATH_S = 10.0  # a process that lives shorter than this has not worked
MAX_QUICK_DEATHS = 3  # in a row; then something is wrong that no new process mends
SECOND_STOP_S = 2.0  # after a second signal
STOP_GRACE_S = 5.0  # beyond the shutdown timeout: they end by themselves well before

# Ends that a new process would come to as well.
_LASTING = frozenset({code for code in ExitCode if code is not ExitCode.CLEAN})

logger = logging.getLogger(__name__)


def hold_port(listener: socket.socket) -> socket.socket:
    """Close a listener, and keep its port for the sockets of one's own processes.

    Args:
        listener: bound without sharing, which showed that nobody else has the port.
    """
    address = listener.getsockname()
    is_dual = listener.family == socket.AF_INET6 and not listener.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    )
    listener.close()
    holder = socket.socket(listener.family)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if is_dual:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    holder.bind(address)
    return holder


@dataclass(slots=True)
class ApiProcess:
    """One running API process; it dies when ``death_pipe`` closes."""

    process: "subprocess.Popen[bytes]"
    pidfd: int
    death_pipe: int
    started_s: float


def spawn(arguments: Sequence[str]) -> ApiProcess:
    """Start an API process with these flags.

    They go through memory that only the two processes share, as API keys may be among them:
    command lines are everybody's to read.
    """
    death_read, death_write = os.pipe()
    with os.fdopen(os.memfd_create("arguments"), "wb") as file:
        file.write(msgspec.json.encode(list(arguments)))
        file.flush()
        process = subprocess.Popen(
            python_command(
                "frontend",
                *("--arguments-fd", str(file.fileno())),
                *("--death-fd", str(death_read)),
            ),
            pass_fds=(file.fileno(), death_read),
            env=child_environment(),
            process_group=0,  # so that the terminal's Ctrl-C reaches the process in front alone
        )
    os.close(death_read)
    return ApiProcess(process, os.pidfd_open(process.pid), death_write, time.monotonic())


def read_arguments(descriptor: int) -> list[str]:
    """The flags that ``spawn`` passed on."""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return msgspec.json.decode(file.read(), type=list[str])


class ApiProcessGroup:
    """Owns the API processes of one server.

    Args:
        start: starts one of them.
        shutdown_timeout: how long their open requests may go on after a signal to stop.
    """

    def __init__(
        self,
        start: Callable[[], ApiProcess],
        count: int,
        signals: SignalWatch,
        shutdown_timeout: float,
    ) -> None:
        self._start = start
        self._count = count
        self._signals = signals
        self._shutdown_timeout = shutdown_timeout
        self._running: list[ApiProcess] = []
        self._num_quick_deaths = 0
        self._kill_at_s: float | None = None  # set when stopping
        self._exit_code = int(ExitCode.CLEAN)

    def run(self) -> int:
        """Serve until a signal, or until it makes no sense any more; the exit code."""
        try:
            self._running = [self._start() for _ in range(self._count)]
            while self._running:
                self._wait()
                if self._signals.take():
                    self._stop()
                for ended in [each for each in self._running if each.process.poll() is not None]:
                    self._bury(ended)
        finally:
            for each in self._running:
                each.process.kill()
                self._let_go(each)
        return self._exit_code

    def _wait(self) -> None:
        poller = select.poll()
        for descriptor in (self._signals.fileno(), *(each.pidfd for each in self._running)):
            poller.register(descriptor, select.POLLIN)
        if self._kill_at_s is None:
            poller.poll()
        elif not poller.poll(max(0.0, 1e3 * (self._kill_at_s - time.monotonic()))):
            for each in self._running:  # time is up
                each.process.kill()

    def _stop(self) -> None:
        """Pass a signal on: the first lets open requests finish, the second does not."""
        limit_s = (
            self._shutdown_timeout + STOP_GRACE_S if self._kill_at_s is None else SECOND_STOP_S
        )
        self._kill_at_s = time.monotonic() + limit_s
        for each in self._running:
            each.process.terminate()

    def _bury(self, ended: ApiProcess) -> None:
        """Note a process's end; start another in its place where that is of use."""
        self._running.remove(ended)
        return_code = self._let_go(ended)
        if self._kill_at_s is not None:
            return
        lived_s = time.monotonic() - ended.started_s
        logger.warning(
            "API process %d %s after %.0f s", ended.process.pid, describe_exit(return_code), lived_s
        )
        self._num_quick_deaths = self._num_quick_deaths + 1 if lived_s < QUICK_DEATH_S else 0
        if return_code in _LASTING or self._num_quick_deaths >= MAX_QUICK_DEATHS:
            self._exit_code = return_code if return_code in _LASTING else ExitCode.START_FAILED
            self._stop()
        else:
            self._running.append(self._start())

    def _let_go(self, ended: ApiProcess) -> int:
        return_code = ended.process.wait()
        os.close(ended.pidfd)
        os.close(ended.death_pipe)
        return return_code


def wait_for_engine(launch: Launch, signals: SignalWatch) -> str | None:
    """Wait until an engine is ready; its address, or None when a signal to stop came first.

    Raises:
        ConfigError, EngineStartError: as ``Launch.wait_ready``.
    """
    poller = select.poll()
    for descriptor in (launch.fileno(), signals.fileno()):
        poller.register(descriptor, select.POLLIN)
    while not launch.update():
        poller.poll()
        if signals.take():
            return None
    return launch.address


def serve_with_processes(
    config: EngineConfig | None,
    make_start: Callable[[str | None], Callable[[], ApiProcess]],
    count: int,
    shutdown_timeout: float,
) -> int:
    """Start the engine, serve with ``count`` API processes, end the engine; the exit code.

    Args:
        config: the engine's; None uses an engine that runs already.
        make_start: given the address of the engine started here, how to start an API process.

    Raises:
        ConfigError, EngineStartError: the engine cannot start; nothing is left behind.
    """
    signals = SignalWatch(signal.SIGTERM, signal.SIGINT)
    if config is None:
        return ApiProcessGroup(make_start(None), count, signals, shutdown_timeout).run()
    launch = Launch(config)
    try:
        address = wait_for_engine(launch, signals)
        if address is None:
            return int(ExitCode.CLEAN)
        code = ApiProcessGroup(make_start(address), count, signals, shutdown_timeout).run()
        if code != ExitCode.CLEAN and launch.describe_end() is not None:
            code = code if launch.failure is None else launch.failure.exit_code
        return code
    finally:
        launch.terminate()
