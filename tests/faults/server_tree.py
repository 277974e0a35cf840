"""A server process under test: started with its tree, looked into from outside, ended and judged.

The tree is known by command lines: the API process, the supervisor, the core, the workers.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

from tests.e2e.engines import ROOT
from tests.faults import target
from tests.faults.mixed_traffic import MODEL
from tests.faults.oracles import Holdings, check_leaks
from tests.fuzz.servers import free_port, wait_until_ready

END_LIMIT_S = 45.0


@dataclass
class Server:
    """One server process and what is known of its tree."""

    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def tree(self) -> list[psutil.Process]:
        """Every live process of the server, itself first."""
        try:
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        return [p for p in found if _is_alive(p)]

    def pids(self, module: str) -> list[int]:
        """Processes of the tree that run this module, oldest first."""
        return [p.pid for p in self.tree() if module_of(p) == module]

    def core_pid(self) -> int:
        """The engine core: below the supervisor of the same module, where there is one."""
        pids = self.pids("engine_core")
        return pids[-1]

    def worker_pids(self) -> list[int]:
        """The workers."""
        return self.pids("executor")

    def holdings(self) -> Holdings:
        """What it holds now, from its metrics and from the kernel."""
        values = self.metrics()
        tree = self.tree()
        return Holdings(
            running=round(values["num_requests_running"]),
            waiting=round(values["num_requests_waiting"] + values["num_requests_swapped"]),
            leaked_blocks=round(values["num_leaked_blocks"]),
            blocks_in_use=values["kv_cache_usage_perc"],
            journal=self.num_open(),
            fds=sum(p.num_fds() for p in tree),
            threads=sum(p.num_threads() for p in tree),
            processes=len(tree),
            shared_memory=len(os.listdir("/dev/shm")),
        )

    def idle_holdings(self, before: Holdings, limit_s: float = 5.0) -> Holdings:
        """What it still holds when idle: of the next seconds, the moment at which that is least."""
        deadline = time.monotonic() + limit_s
        while True:
            now = self.holdings()
            if not check_leaks(before, now) or time.monotonic() >= deadline:
                return now
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        """Values by name, without labels; of several the sum."""
        values: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("heliograph:"):
                name = line.partition("{")[0].removeprefix("heliograph:")
                values[name] = values.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return values

    def num_open(self) -> int:
        """Requests that the server says it is working on."""
        load = json.loads(self.get("/load"))
        return int(load["server_load"])

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            body: bytes = answer.read()
        return body.decode()

    def is_ready(self) -> bool:
        """Whether it would take a request."""
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def rss_bytes(self) -> int:
        """Resident memory of the whole tree."""
        return sum(p.memory_info().rss for p in self.tree())

    def stop(self) -> int:
        """End it in order; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def serving(
    *flags: str,
    module: Sequence[str] = ("frontend",),
    expects_clean_end: bool = True,
    quiet: bool = True,
) -> Iterator[Server]:
    """A server of the ``target`` on a free port; nothing of it outlives the block.

    Args:
        module: what ``python -m`` runs, with leading arguments of its own.
        expects_clean_end: whether SIGTERM at the end must give exit code 0.
    """
    port = free_port()
    command = [
        sys.executable, "-m", *module, *target.chosen().flags,
        "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port),
        "--disable-log-requests", "--disable-log-stats",
        "--disable-access-log", "--uvicorn-log-level", "error" if quiet else "info", *flags,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        server = Server(port, process)
        tree: list[psutil.Process] = []
        try:
            wait_until_ready(f"{server.url}/health", process)
            tree = server.tree()
            yield server
            code = server.stop()
            assert not expects_clean_end or code == 0, f"exit code {code} after SIGTERM"
        finally:
            if process.poll() is None:
                tree = [*tree, *server.tree()]
                process.kill()
                process.wait()
            wait_gone(tree)


def wait_gone(tree: Sequence[psutil.Process], limit_s: float = 15.0) -> float:
    """Seconds until all of them were gone.

    Raises:
        AssertionError: some stayed; they are killed.
    """
    started = time.monotonic()
    while left := [p for p in tree if _is_alive(p)]:
        if time.monotonic() - started > limit_s:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            raise AssertionError(f"still there after {limit_s:g} s: {left}")
        time.sleep(0.02)
    return time.monotonic() - started


def module_of(process: psutil.Process) -> str | None:
    """What ``python -m`` runs there."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return None
    return next((line[i + 1] for i in range(len(line) - 1) if line[i] == "-m"), None)


async def until(condition: Callable[[], bool], limit_s: float, what: str) -> float:
    """Wait for a condition; seconds that it took.

    Raises:
        AssertionError: it did not come true in time.
    """
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s, f"no {what} within {limit_s:g} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
