"""Launching a tree: real causes when it cannot start, and nothing left whoever is killed."""

import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from frontend.launcher import Launch, ProgressLine
from ipc.addresses import sweep_stale_directories
from ipc.errors import ConfigError, DeviceStartError, EngineDeadError, EngineStartError
from ipc.messages import LoadProgress
from tests.engine_core.process_tree import (
    assert_gone,
    descendants,
    find_core,
    make_faulty_config,
    make_scripted_config,
    watched_runtime_directory,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with watched_runtime_directory(monkeypatch) as directory:
        yield directory


def make_launch() -> Launch:
    launch = Launch(make_scripted_config())
    launch.wait_ready()
    return launch


def test_a_launch_ends_without_a_trace() -> None:
    launch = make_launch()
    processes = descendants(launch.pid)
    assert len(processes) == 2
    assert launch.describe_end() is None

    launch.terminate()
    assert_gone(processes, limit_s=0)
    assert launch.describe_end() == "the engine was stopped"
    launch.terminate()  # harmless
    with pytest.raises(EngineDeadError):
        launch.update()


@pytest.mark.parametrize(
    ("name", "kind", "cause"),
    [
        ("StartErrorExecutor", EngineStartError, "rank 0, loading weights: ValueError: shape [3]"),
        ("BadConfigExecutor", ConfigError, "--max-model-len 4096 does not fit"),
        ("NoDeviceExecutor", DeviceStartError, "rank 0, device: CUDA error: out of order"),
        ("RaisingExecutor", EngineStartError, "allocating: MemoryError: no room for 7 blocks"),
        (
            "KilledAtStartExecutor",
            EngineStartError,
            "the engine core was killed by SIGKILL while it was starting (loading weights)",
        ),
        ("NoSuchExecutor", ConfigError, "executor_class must be"),
    ],
)
def test_a_start_that_fails_names_the_real_cause(
    name: str, kind: type[Exception], cause: str
) -> None:
    launch = Launch(make_faulty_config(name))

    with pytest.raises(kind) as caught:
        launch.wait_ready()
    assert cause in str(caught.value)
    assert isinstance(caught.value, kind)
    assert not psutil.pid_exists(launch.pid)


def test_the_cause_is_also_the_supervisors_exit_code() -> None:
    for name, code in [
        ("BadConfigExecutor", 2),
        ("StartErrorExecutor", 3),
        ("NoDeviceExecutor", 6),
    ]:
        launch = Launch(make_faulty_config(name))
        assert launch._process.wait() == code
        launch.terminate()


def test_a_start_that_takes_too_long_is_ended() -> None:
    launch = Launch(make_scripted_config())

    with pytest.raises(EngineStartError, match=r"not ready within 0 s"):
        launch.wait_ready(timeout_s=0.0)
    assert not psutil.pid_exists(launch.pid)


def test_a_killed_core_is_reported_and_the_tree_ends() -> None:
    launch = Launch(make_faulty_config("ChildExecutor", enable_recovery=False))
    launch.wait_ready()
    processes = descendants(launch.pid)
    assert len(processes) == 3
    find_core(launch.pid).kill()

    assert_gone(processes)
    assert launch.describe_end() == "the engine core was killed by SIGKILL"
    assert launch._process.wait() == 4
    launch.terminate()


def test_a_killed_supervisor_takes_the_tree_with_it() -> None:
    launch = Launch(make_faulty_config("ChildExecutor"))
    launch.wait_ready()
    processes = descendants(launch.pid)
    os.kill(launch.pid, signal.SIGKILL)

    assert_gone(processes)
    assert launch.describe_end() == "the engine's supervisor was killed by SIGKILL"
    launch.terminate()  # sweeps what the supervisor could not


def run_script(script: str) -> "subprocess.Popen[str]":
    """A user's program, with a launched engine in ``launch`` and its pids printed."""
    prologue = """
        import os, signal, sys, gc
        from frontend.launcher import Launch
        from tests.engine_core.process_tree import descendants, make_faulty_config
        launch = Launch(make_faulty_config("ChildExecutor"))
        launch.wait_ready()
        print(*[process.pid for process in descendants(launch.pid)], flush=True)
        sys.stdin.readline()
    """
    source = textwrap.dedent(prologue) + textwrap.dedent(script)
    command = [sys.executable, "-c", source]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def read_processes(program: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes of the program's engine; the program goes on when they are known."""
    assert program.stdout is not None
    assert program.stdin is not None
    processes = [psutil.Process(int(pid)) for pid in program.stdout.readline().split()]
    assert len(processes) == 3
    program.stdin.write("\n")
    program.stdin.flush()
    return processes


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("", id="it just ends"),
        pytest.param("raise SystemExit(3)", id="it exits"),
        pytest.param("1 / 0", id="it raises"),
        pytest.param("launch = None; gc.collect(); signal.pause()", id="the engine is collected"),
        pytest.param("os._exit(0)", id="it skips its clean-up"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", id="it is killed"),
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", id="it crashes"),
        pytest.param(
            "if os.fork() == 0: signal.alarm(15); signal.pause()\n"
            "os.kill(os.getpid(), signal.SIGKILL)",
            id="it is killed while a forked copy holds its pipes",
        ),
    ],
)
def test_nothing_outlives_the_users_program(script: str) -> None:
    with run_script(script) as program:
        group = [psutil.Process(program.pid), *read_processes(program)]
        copies = [p for p in psutil.process_iter() if p.ppid() == program.pid and p not in group]
        assert_gone(group[1:])
        for process in [*copies, group[0]]:
            if process.is_running():
                process.kill()


def test_a_forked_copy_of_the_program_may_end_without_ending_the_engine() -> None:
    script = """
        from frontend.core_client import ProcessCoreClient
        from ipc.operations import IsPaused
        client = ProcessCoreClient(launch)
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        print(launch.describe_end(), client.call(IsPaused()), flush=True)
        client.close()
    """
    with run_script(script) as program:
        processes = read_processes(program)
        assert program.stdout is not None
        assert program.stdout.readline() == "None False\n"
    assert program.returncode == 0
    assert_gone(processes)


def test_deleting_the_launch_ends_the_tree() -> None:
    launch = make_launch()
    processes = descendants(launch.pid)
    del launch
    gc.collect()

    assert_gone(processes)


def test_a_launch_cannot_be_pickled() -> None:
    launch = make_launch()
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        pickle.dumps(launch)
    launch.terminate()


def test_two_launches_have_nothing_to_do_with_each_other() -> None:
    first, second = make_launch(), make_launch()
    assert first.address != second.address
    first.terminate()

    assert second.describe_end() is None
    second.terminate()


def test_directories_of_trees_that_were_killed_whole_are_swept_later(
    runtime_directory: Path,
) -> None:
    with run_script("signal.pause()") as program:
        processes = read_processes(program)
        for process in [*processes, psutil.Process(program.pid)]:
            process.kill()
    assert_gone(processes)

    assert len(sweep_stale_directories(runtime_directory)) == 1


def test_without_a_terminal_each_phase_is_one_log_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "frontend.launcher")
    line = ProgressLine()
    line.show(LoadProgress(0, "loading weights", 0, 2, 0.1))
    line.show(LoadProgress(1, "memory", 1, 2, 0.2))  # rank 0 speaks for all
    line.show(LoadProgress(0, "loading weights", 2, 2, 6.0))
    line.close(is_ready=True)
    assert capsys.readouterr().err == ""
    phases = [record.getMessage().rsplit(" took ", 1)[0] for record in caplog.records]
    assert phases == ["start-up phase 'starting'", "start-up phase 'loading weights'"]


def test_a_phase_in_which_the_start_failed_is_not_said_to_have_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "frontend.launcher")
    ProgressLine().close()
    assert caplog.records == []


def test_on_a_terminal_a_bar_is_shown_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = ProgressLine()
    line.show(LoadProgress(0, "loading weights", 1, 2, 6.0))
    line.close(is_ready=True)
    assert "loading weights (6 s)" in terminal.getvalue()
    assert terminal.getvalue().rpartition("\r")[0].endswith(" "), "the bar was wiped"
