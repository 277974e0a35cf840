"""A core that stops moving with work to do is found, named, its stack printed, and replaced."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine_core.hang_watch import HangWatch
from engine_core.progress import Phase, ProgressPage, make_page_file
from engine_core.recording import read_recording
from engine_core.replay import replay
from frontend.core_client import ProcessCoreClient
from ipc.config import ParallelConfig
from ipc.messages import AddRequest
from ipc.sampling_params import SamplingParams
from tests.engine_core.process_tree import find_core, watched_runtime_directory
from tests.engine_core.test_supervisor import Daemon, read_address, start_daemon

LIMIT_S = 30.0
BUDGETS = ParallelConfig(loading_hang_s=300.0, compiling_hang_s=200.0, stepping_hang_s=100.0)


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with watched_runtime_directory(monkeypatch) as directory:
        yield directory


def send_long_request(client: ProcessCoreClient) -> None:
    params = SamplingParams(max_tokens=10**6, seed=1, ignore_eos=True)
    client.send(AddRequest("a", [1, 2], params, time.time()))


def wait_for_another_core(daemon: Daemon, first: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            if find_core(daemon.pid).pid != first:
                return
        except ValueError:  # none at this moment
            pass
        time.sleep(0.05)
    raise AssertionError("the hung core was not replaced")


def end(daemon: Daemon) -> str:
    daemon.terminate()
    return daemon.communicate(timeout=LIMIT_S)[1]


def test_a_step_that_never_ends_is_found_with_its_stack_and_the_core_replaced() -> None:
    daemon = start_daemon(
        "--stepping-hang-s", "1", executor="faulty_executors:SleepingStepExecutor"
    )
    with closing(ProcessCoreClient(read_address(daemon))) as client:
        core = find_core(daemon.pid).pid
        send_long_request(client)
        wait_for_another_core(daemon, core)
    errors = end(daemon)
    found = re.search(rf"hang: the engine core \(process {core}\) hangs while stepping: no", errors)
    assert found is not None, errors
    assert "in sleep_for_ever" in errors


def test_a_stopped_core_is_found_and_what_it_did_replays(tmp_path: Path) -> None:
    daemon = start_daemon("--stepping-hang-s", "1", "--flight-record-dir", str(tmp_path))
    with closing(ProcessCoreClient(read_address(daemon))) as client:
        core = find_core(daemon.pid).pid
        send_long_request(client)
        assert client.receive(LIMIT_S) is not None
        os.kill(core, signal.SIGSTOP)
        wait_for_another_core(daemon, core)
    errors = end(daemon)
    assert f"(process {core}) is stopped while stepping" in errors
    (kept,) = tmp_path.glob("*")  # the second core ended well: nothing is kept of it
    assert kept.name == f"core-{core}-epoch-0.flight"
    assert replay(read_recording(kept)).steps > 0


@pytest.mark.parametrize(
    ("phase", "loading", "has_work", "silent_s", "is_hung"),
    [
        pytest.param(Phase.STEPPING, "", True, 99.0, False, id="a step within its budget"),
        pytest.param(Phase.STEPPING, "", True, 101.0, True, id="a step beyond it"),
        pytest.param(Phase.STEPPING, "", False, 10**6, False, id="idle"),
        pytest.param(Phase.OPERATION, "", True, 299.0, False, id="an operation within its budget"),
        pytest.param(Phase.OPERATION, "", True, 301.0, True, id="an operation beyond it"),
        pytest.param(Phase.STARTING, "warming up", False, 201.0, True, id="compiling"),
        pytest.param(Phase.STARTING, "loading weights", False, 201.0, False, id="loading"),
    ],
)
def test_each_phase_has_its_budget(
    phase: Phase,
    loading: str,
    has_work: bool,
    silent_s: float,
    is_hung: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    descriptor = make_page_file()
    nobody = 2**22 + 1  # above the largest process id: the signal reaches nobody
    watch = HangWatch(descriptor, nobody, BUDGETS)
    if phase is not Phase.STARTING:
        ProgressPage(descriptor).write(phase, 7, has_work)
    watch.note_loading(loading)
    later_s = time.monotonic() + silent_s
    monkeypatch.setattr("engine_core.hang_watch.time.monotonic", lambda: later_s)
    assert (watch.find() is not None) == is_hung
    watch.close()
    os.close(descriptor)
