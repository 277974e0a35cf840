"""What tests of process trees need: trees that are quick to start, and proof that they are gone."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ipc.config import EngineConfig
from ipc.processes import is_alive
from tests.engine_core.fake_core import make_config

GONE_LIMIT_S = 5.0


def make_scripted_config(**parallel: Any) -> EngineConfig:
    """An engine that starts in a moment."""
    return make_config(
        executor_class="tests.engine_core.scripted_executor:ScriptedExecutor", **parallel
    )


def make_faulty_config(name: str, **parallel: Any) -> EngineConfig:
    """An engine that fails in the way of this class of ``faulty_executors``."""
    return make_config(executor_class=f"tests.engine_core.faulty_executors:{name}", **parallel)


@contextmanager
def watched_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, which must be empty again at the end."""
    directory = Path(tempfile.mkdtemp(prefix="rt"))  # short: socket paths have a limit
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    try:
        yield directory
        assert [path.name for path in directory.iterdir()] == []
    finally:
        shutil.rmtree(directory)


def descendants(pid: int) -> list[psutil.Process]:
    """The tree below a process, and the process itself."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def is_running(process: psutil.Process) -> bool:
    """Whether a process lives, with all of its threads; one not yet reaped does not."""
    return process.is_running() and is_alive(process.pid)


def assert_gone(processes: list[psutil.Process], limit_s: float = GONE_LIMIT_S) -> None:
    """All of them end within seconds."""
    assert processes
    deadline = time.monotonic() + limit_s
    while left := [process for process in processes if is_running(process)]:
        if time.monotonic() >= deadline:
            for process in left:
                os.kill(process.pid, signal.SIGKILL)
            raise AssertionError(f"still running: {left}")
        time.sleep(0.02)


def find_core(supervisor: int) -> psutil.Process:
    """The core of a supervisor."""
    (core,) = psutil.Process(supervisor).children()
    return core
