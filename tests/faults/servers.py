"""A server of its own process tree, and the pids in it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from tests.e2e.engines import ROOT, TINY
from tests.faults.oracle import Holdings
from tests.fuzz.servers import free_port, wait_until_ready


@dataclass
class Tree:
    """A server, its supervisor, core and worker."""

    process: "subprocess.Popen[bytes]"
    url: str

    def find(self, role: str) -> psutil.Process | None:
        """The running process of a role: "supervisor", "core" or "worker"; None while there is
        none."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _role_of(process) == role and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    async def wait_for(self, role: str, *, other_than: int, limit_s: float = 60.0) -> int:
        """The pid of a role's next process."""
        async with asyncio.timeout(limit_s):
            while True:
                found = self.find(role)
                if found is not None and found.pid != other_than:
                    return found.pid
                await asyncio.sleep(0.02)

    def health(self) -> int:
        """The status of /health; 0: no answer."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as err:
            return err.code
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        found = [line.split() for line in lines if line.startswith(f"heliograph:{name}")]
        return sum(float(words[-1]) for words in found)

    def holdings(self) -> Holdings:
        """What the idle tree holds now."""
        server = psutil.Process(self.process.pid)
        tree = [server, *server.children(recursive=True)]
        with urllib.request.urlopen(f"{self.url}/load", timeout=5) as answer:
            num_open = float(answer.read().split(b":")[1].strip(b" }"))
        return Holdings(
            num_running=self.metric("num_requests_running"),
            num_waiting=self.metric("num_requests_waiting"),
            kv_usage=self.metric("gpu_cache_usage_perc"),
            num_open=num_open,
            num_processes=len(tree),
            num_descriptors=sum(process.num_fds() for process in tree),
            num_threads=sum(process.num_threads() for process in tree),
            num_sockets=len(server.net_connections()),
            num_shared_memory=len(os.listdir("/dev/shm")),
        )


def _role_of(process: psutil.Process) -> str | None:
    line = process.cmdline()
    if "engine_core" in line:
        return "core" if "--core" in line else "supervisor"
    return "worker" if "executor" in line else None


@contextlib.contextmanager
def tree(*flags: str) -> Iterator[Tree]:
    """Serve the bundled model in float32; nothing of the tree outlives this."""
    port = free_port()
    command = [
        sys.executable, "-m", "frontend", "--model", str(TINY), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--worker-threads", "1",
        "--disable-log-requests", "--uvicorn-log-level", "warning", "--max-num-seqs", "64", *flags,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield Tree(process, f"http://127.0.0.1:{port}")
        finally:
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                process.kill()
            _, left = psutil.wait_procs(descendants, timeout=15)
            for each in left:
                each.kill()
            assert not left, f"left behind: {left}"
