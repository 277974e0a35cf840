"""Who is replaced, who is not, and which exit code comes of it. Real processes that do nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from frontend.openai.api_processes import (
    MAX_QUICK_DEATHS,
    ApiProcess,
    ApiProcessGroup,
    hold_port,
)
from ipc.errors import ExitCode
from ipc.processes import SignalWatch

SLEEP = "import time; time.sleep(60)"


class Starter:
    """Starts processes that run one of the given programs after the other, the last for ever."""

    def __init__(self, *programs: str) -> None:
        self._programs = list(programs)
        self.num_started = 0

    def __call__(self) -> ApiProcess:
        program = self._programs.pop(0) if len(self._programs) > 1 else self._programs[0]
        self.num_started += 1
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", program])
        pipe = os.open(os.devnull, os.O_RDONLY)
        return ApiProcess(process, os.pidfd_open(process.pid), pipe, time.monotonic())


@pytest.fixture
def signals() -> Iterator[SignalWatch]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    watch = SignalWatch(signal.SIGUSR1)
    yield watch
    signal.set_wakeup_fd(-1)
    watch.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_processes_that_die_at_once_are_replaced_a_few_times_only(signals: SignalWatch) -> None:
    start = Starter("raise SystemExit(1)")
    group = ApiProcessGroup(start, 1, signals, shutdown_timeout=1.0)
    assert group.run() == ExitCode.START_FAILED
    assert start.num_started == MAX_QUICK_DEATHS


@pytest.mark.parametrize("code", [ExitCode.CONFIG, ExitCode.CORE_DIED, ExitCode.DEVICE_UNUSABLE])
def test_an_end_that_would_repeat_itself_ends_all(signals: SignalWatch, code: ExitCode) -> None:
    start = Starter(SLEEP, f"raise SystemExit({int(code)})")
    group = ApiProcessGroup(start, 2, signals, shutdown_timeout=1.0)
    assert group.run() == code
    assert start.num_started == 2


def test_a_process_that_ends_in_order_by_itself_is_replaced(signals: SignalWatch) -> None:
    stop_us = f"import os, signal; os.kill({os.getpid()}, signal.SIGUSR1); {SLEEP}"
    start = Starter("pass", stop_us)
    group = ApiProcessGroup(start, 1, signals, shutdown_timeout=1.0)
    assert group.run() == ExitCode.CLEAN
    assert start.num_started == 2


def test_a_held_port_can_be_shared_by_those_who_ask_and_taken_by_nobody_else() -> None:
    with hold_port(socket.create_server(("127.0.0.1", 0))) as holder:
        address = holder.getsockname()
        with socket.create_server(address, reuse_port=True) as first:
            with socket.create_server(address, reuse_port=True):
                pass
            with socket.create_connection(first.getsockname()) as client:
                client.close()
        with pytest.raises(OSError, match="in use"):
            socket.create_server(address)
