"""How worker processes start and fail to, and that none outlives its parent."""

import contextlib
import subprocess
import sys

import psutil
import pytest

from executor.multiproc import MultiprocExecutor
from ipc.errors import ConfigError, EngineStartError
from ipc.processes import child_environment
from tests.executor.configs import make_config

FAKE = "tests.executor.fake_worker"


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        pytest.param(
            "corrupt",
            EngineStartError,
            "worker 0 failed at stage 'loading weights': model-00001.safetensors is cut short",
            id="a broken file",
        ),
        pytest.param("misconfigured", ConfigError, "--dtype float13", id="a wrong value"),
        pytest.param(
            "crash", EngineStartError, "exited with code 7 before it was ready", id="a crash"
        ),
    ],
)
def test_a_failed_start_names_stage_and_cause(model: str, error: type, text: str) -> None:
    executor = MultiprocExecutor(make_config(model), FAKE)

    with pytest.raises(error, match=text):
        executor.start(lambda _: None)

    assert not any(psutil.pid_exists(pid) for pid in executor.pids)


def test_a_module_that_does_not_exist_is_a_failed_start() -> None:
    executor = MultiprocExecutor(make_config(), "no_such_module")

    with pytest.raises(EngineStartError, match="exited with code 1 before it was ready"):
        executor.start(lambda _: None)


def test_no_worker_outlives_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, env=child_environment()
    )
    assert parent.stdout is not None
    with parent.stdout:
        worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()

    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(timeout=5)
    assert not worker.is_running()


_PARENT = """
import signal
from executor.multiproc import MultiprocExecutor
from tests.executor.configs import make_config
executor = MultiprocExecutor(make_config(), "tests.executor.fake_worker")
executor.start(lambda _: None)
print(executor.pids[0], flush=True)
signal.pause()
"""
