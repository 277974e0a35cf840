"""Children die with their parent's pipe, whatever they are doing; orphans find a new parent."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipc.processes import (
    SignalWatch,
    child_environment,
    describe_exit,
    is_alive,
    is_closed,
    kill_group,
    python_command,
)

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 10.0

ARM = "import sys; from ipc.processes import die_with; die_with(int(sys.argv[1]));"


def start_child(
    source: str, *arguments: str, keeps: tuple[int, ...] = ()
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", source, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, text=True, pass_fds=keeps)


def read_line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.mark.parametrize(
    "work",
    [
        pytest.param("import signal; signal.pause()", id="asleep"),
        pytest.param("while True: pass", id="busy"),
        pytest.param("int('9' * 4000) ** 99999", id="inside one long call that holds the GIL"),
    ],
)
def test_a_child_dies_when_its_parents_pipe_closes_whatever_it_does(work: str) -> None:
    read_end, write_end = os.pipe()
    source = f"{ARM} print('armed', flush=True); {work}"
    if work.startswith("while"):
        source = f"{ARM} print('armed', flush=True)\n{work}"
    with start_child(source, str(read_end), keeps=(read_end,)) as child:
        os.close(read_end)
        assert read_line(child) == "armed"
        os.close(write_end)

        assert child.wait(LIMIT_S) == -signal.SIGKILL


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    with start_child(f"{ARM} print('alive')", str(read_end), keeps=(read_end,)) as child:
        os.close(read_end)

        assert read_line(child) == ""
        assert child.wait(LIMIT_S) == -signal.SIGKILL


def test_a_pipe_knows_whether_its_other_end_is_open() -> None:
    read_end, write_end = os.pipe()
    assert not is_closed(read_end)
    os.close(write_end)
    assert is_closed(read_end)
    os.close(read_end)


def test_orphans_can_be_waited_for_by_who_adopts_them() -> None:
    source = """if True:
        import os, subprocess, sys
        from ipc.processes import adopt_orphans
        adopt_orphans()
        middle = subprocess.Popen([sys.executable, "-c", '''if True:
            import subprocess, sys
            child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
            print(child.pid, flush=True)
            import os
            os._exit(0)'''], stdout=subprocess.PIPE)
        orphan = int(middle.stdout.readline())
        middle.wait()
        _, status = os.waitpid(orphan, 0)
        print(os.waitstatus_to_exitcode(status))
    """
    with start_child(source) as child:
        assert read_line(child) == "7"


def test_a_group_is_killed_whole_and_a_missing_one_is_no_error() -> None:
    command = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with subprocess.Popen(command, process_group=0, stdout=subprocess.PIPE, text=True) as leader:
        member = int(read_line(leader))
        kill_group(leader.pid, signal.SIGKILL)
        assert leader.wait(LIMIT_S) == -signal.SIGKILL
    deadline = time.monotonic() + LIMIT_S
    while is_alive(member):
        assert time.monotonic() < deadline
    kill_group(leader.pid, signal.SIGKILL)


def test_a_process_that_only_waits_to_be_reaped_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(child.pid)
    pidfd = os.pidfd_open(child.pid)
    child.kill()
    assert select.select([pidfd], [], [], LIMIT_S)[0]
    assert not is_alive(child.pid)
    child.communicate()
    os.close(pidfd)
    assert not is_alive(child.pid)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL"),
        (-200, "was killed by signal 200"),
    ],
)
def test_exits_are_described_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_our_modules_are_found_by_children_wherever_they_run(tmp_path: Path) -> None:
    (tmp_path / "ipc.py").write_text("raise SystemExit('the wrong module')")
    command = python_command("ipc.errors")
    ended = subprocess.run(command, cwd=tmp_path, env=child_environment(), capture_output=True)

    assert (ended.returncode, ended.stderr) == (0, b"")


def test_signals_set_to_be_ignored_stay_ignored() -> None:
    former = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        watch = SignalWatch(signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert watch.take() == []
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR2, former)
        watch.close()
