"""What a process tree holds and leaves behind: processes, sockets, shared memory, modules."""

import atexit
import os
import shutil
import signal
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.fuzz.fuzz_frames import listening_paths

GONE_LIMIT_S = 10.0
PACKAGES = {"frontend", "engine_core", "executor"}
MARK = "HELIOGRAPH_TEST_RUN"  # inherited by every process that the tests start
os.environ[MARK] = str(os.getpid())
# Sockets of these tests live here, and nobody else's do.
RUNTIME_DIR = tempfile.mkdtemp(prefix="run-")
os.environ["XDG_RUNTIME_DIR"] = RUNTIME_DIR
atexit.register(shutil.rmtree, RUNTIME_DIR, ignore_errors=True)


@dataclass(frozen=True)
class Traces:
    """What an engine can leave behind on a machine."""

    pids: frozenset[int]
    sockets: frozenset[str]
    shared_memory: frozenset[str]

    @staticmethod
    def now() -> "Traces":
        """Processes of this project, listening unix sockets and shared memory files."""
        return Traces(
            pids=frozenset(engine_pids()),
            sockets=frozenset(p for p in listening_paths() if p.startswith(RUNTIME_DIR)),
            shared_memory=frozenset(os.listdir("/dev/shm")),
        )


def engine_pids() -> list[int]:
    """Processes of the three packages that this test process, or a child of it, has started."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        modules = [line[i + 1] for i in range(len(line) - 1) if line[i] == "-m"]
        if process.info["status"] == psutil.STATUS_ZOMBIE or not PACKAGES & set(modules):
            continue
        try:
            if process.environ().get(MARK) == os.environ[MARK]:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended meanwhile, or belongs to somebody else
    return found


def assert_nothing_left(before: Traces) -> None:
    """Everything that came since ``before`` is gone within seconds."""
    limit = time.monotonic() + GONE_LIMIT_S
    while True:
        now = Traces.now()
        left = (
            now.pids - before.pids,
            now.sockets - before.sockets,
            now.shared_memory - before.shared_memory,
        )
        if not any(left):
            return
        assert time.monotonic() < limit, f"left behind: {left}"
        time.sleep(0.05)


def modules_spy(directory: Path) -> dict[str, str]:
    """Environment that makes every Python process write its ``sys.modules`` on SIGUSR1."""
    (directory / "sitecustomize.py").write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys

            def write(*_):
                path = {str(directory)!r} + "/" + str(os.getpid())
                with open(path + ".part", "w") as file:
                    file.write("\\n".join(sys.modules))
                os.rename(path + ".part", path)

            signal.signal(signal.SIGUSR1, write)
            """
        )
    )
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(directory) + (os.pathsep + path if path else "")}


def modules_of(pid: int, directory: Path) -> set[str]:
    """Names in ``sys.modules`` of a live process started with ``modules_spy``'s environment."""
    os.kill(pid, signal.SIGUSR1)
    limit = time.monotonic() + GONE_LIMIT_S
    while not (directory / str(pid)).exists():
        assert time.monotonic() < limit, f"process {pid} did not answer"
        time.sleep(0.02)
    return set((directory / str(pid)).read_text().split("\n"))
