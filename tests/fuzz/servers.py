"""A real server on a loopback port, as a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

from tests.e2e.engines import ROOT, TINY

START_LIMIT_S = 60.0


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[str]:
    """Serve the tiny model in float32; yields the URL, and checks that the end is a clean one."""
    port = free_port()
    command = [
        sys.executable, "-m", "frontend", "--model", str(TINY), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--worker-threads", "1",
        "--disable-log-requests", "--uvicorn-log-level", "warning", *flags,
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
            assert process.poll() is None, f"the server ended by itself: {process.returncode}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert process.returncode == 0, f"exit code {process.returncode} after SIGTERM"


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Until the URL answers 200."""
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        assert process.poll() is None, f"the server ended with exit code {process.returncode}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"no answer from {url} within {START_LIMIT_S} s")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
