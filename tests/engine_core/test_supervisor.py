"""The daemon and its supervisor: exit codes, endpoints, frontends that come and go, idle cost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from frontend.core_client import ProcessCoreClient
from ipc.curve import load_client_keys, make_key_directory
from ipc.errors import EngineDeadError
from ipc.messages import AddRequest
from ipc.operations import GetStats
from ipc.sampling_params import SamplingParams
from tests.engine_core.process_tree import (
    assert_gone,
    descendants,
    find_core,
    watched_runtime_directory,
)

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "scripts" / "demo_models" / "tiny"
FORBIDDEN = ("torch", "transformers", "triton", "safetensors", "numpy")
LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with watched_runtime_directory(monkeypatch) as directory:
        yield directory


def start_daemon(*flags: str, executor: str = "scripted_executor:ScriptedExecutor") -> "Daemon":
    """A daemon with an executor that needs no model; flags come last and win."""
    command = [sys.executable, "-m", "engine_core", "--model", str(MODEL)]
    command += ["--executor-class", f"tests.engine_core.{executor}", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


Daemon = subprocess.Popen[str]


def read_address(daemon: Daemon) -> str:
    assert daemon.stdout is not None
    line = daemon.stdout.readline()
    match = re.fullmatch(r"listening at (\S+)\n", line)
    assert match is not None, (line, daemon.communicate()[1])
    return match[1]


@contextmanager
def running_daemon(*flags: str) -> Iterator[tuple[Daemon, str]]:
    daemon = start_daemon(*flags)
    try:
        yield daemon, read_address(daemon)
    finally:
        processes = descendants(daemon.pid) if daemon.poll() is None else []
        daemon.terminate()
        daemon.communicate(timeout=LIMIT_S)
        if processes:
            assert_gone(processes)


def fail_daemon(*flags: str, **options: str) -> tuple[int, str]:
    """Exit code and stderr of a daemon that cannot start."""
    daemon = start_daemon(*flags, **options)
    _, errors = daemon.communicate(timeout=LIMIT_S)
    return daemon.returncode, errors


def generate(client: ProcessCoreClient, num_tokens: int) -> int:
    params = SamplingParams(max_tokens=num_tokens, seed=1, ignore_eos=True)
    client.send(AddRequest("a", [1, 2], params, time.time()))
    num_received = 0
    while num_received < num_tokens:
        received = client.receive(LIMIT_S)
        assert received is not None
        num_received += sum(len(o.new_token_ids) for o in received[0].outputs)
    return num_received


def test_a_daemon_serves_frontend_after_frontend_even_when_one_is_killed(
    runtime_directory: Path,
) -> None:
    with running_daemon("--listen", f"ipc://{runtime_directory}/engine") as (daemon, address):
        assert address == f"ipc://{runtime_directory}/engine"
        script = f"""if True:
            import os, time
            from frontend.core_client import ProcessCoreClient
            from ipc.messages import AddRequest
            from ipc.sampling_params import SamplingParams
            client = ProcessCoreClient({address!r})
            params = SamplingParams(max_tokens=10**6, seed=1, ignore_eos=True)
            client.send(AddRequest("long", [1], params, time.time()))
            client.receive(None)
            os.kill(os.getpid(), 9)
        """
        killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=LIMIT_S)
        assert killed.returncode == -signal.SIGKILL

        with closing(ProcessCoreClient(address)) as client:
            assert generate(client, 10) == 10
            deadline = time.monotonic() + LIMIT_S
            while client.call(GetStats()).num_running:
                assert time.monotonic() < deadline, "the dead frontend's request still runs"
        assert daemon.poll() is None


def test_a_stopped_daemon_tells_its_frontends_and_ends_cleanly() -> None:
    with running_daemon() as (daemon, address), closing(ProcessCoreClient(address)) as client:
        processes = descendants(daemon.pid)
        daemon.send_signal(signal.SIGINT)

        with pytest.raises(EngineDeadError, match="the engine was stopped by SIGTERM"):
            client.receive(LIMIT_S)
        assert daemon.wait(LIMIT_S) == 0
        assert_gone(processes, limit_s=0)


def test_a_second_signal_ends_a_stuck_core_at_once() -> None:
    with running_daemon() as (daemon, _):
        core = find_core(daemon.pid)
        core.suspend()
        daemon.send_signal(signal.SIGTERM)
        daemon.send_signal(signal.SIGINT)

        assert daemon.wait(5.0) == 0
        assert_gone([core], limit_s=0)


def test_a_daemon_without_recovery_whose_core_is_killed_says_so_and_fails() -> None:
    daemon = start_daemon("--no-recovery")
    read_address(daemon)
    find_core(daemon.pid).kill()
    _, errors = daemon.communicate(timeout=LIMIT_S)

    assert daemon.returncode == 4
    assert "the engine ended: the engine core was killed by SIGKILL" in errors


@pytest.mark.parametrize(
    ("name", "exit_code", "cause"),
    [
        ("BadConfigExecutor", 2, "--max-model-len 4096 does not fit"),
        ("StartErrorExecutor", 3, "rank 0, loading weights: ValueError"),
        ("RaisingExecutor", 3, "allocating: MemoryError: no room for 7 blocks"),
        ("NoDeviceExecutor", 6, "rank 0, device: CUDA error"),
    ],
)
def test_a_failed_start_has_its_own_exit_code(name: str, exit_code: int, cause: str) -> None:
    code, errors = fail_daemon(executor=f"faulty_executors:{name}")

    assert code == exit_code
    assert cause in errors.strip().splitlines()[-1]


def test_flags_that_cannot_work_are_refused_before_anything_starts() -> None:
    code, errors = fail_daemon("--block-size", "7")

    assert code == 2
    assert "--block-size" in errors


@pytest.mark.parametrize(
    ("address", "cause"),
    [
        pytest.param("tcp://0.0.0.0:0", "--curve-keys", id="open to the network without keys"),
        pytest.param("http://x", "an address is ipc:///path or tcp://host:port", id="no address"),
        pytest.param("ipc:///nowhere/engine", "does not exist", id="no directory"),
    ],
)
def test_an_address_that_cannot_work_is_refused(address: str, cause: str) -> None:
    code, errors = fail_daemon("--listen", address)

    assert code == 2
    assert cause in errors


def test_an_address_in_use_is_refused(runtime_directory: Path) -> None:
    listen = f"ipc://{runtime_directory}/engine"
    with running_daemon("--listen", listen) as (_, address):
        code, errors = fail_daemon("--listen", listen)
        assert code == 2
        assert f"another process listens at {listen}" in errors

        with closing(ProcessCoreClient(address)) as client:
            assert generate(client, 3) == 3


def test_a_daemon_open_to_the_network_serves_who_has_a_key(tmp_path: Path) -> None:
    make_key_directory(tmp_path / "keys")
    flags = ["--listen", "tcp://0.0.0.0:0", "--curve-keys", str(tmp_path / "keys")]
    with running_daemon(*flags) as (_, address):
        local = address.replace("0.0.0.0", "127.0.0.1")
        with closing(ProcessCoreClient(local, load_client_keys(tmp_path / "keys"))) as client:
            assert generate(client, 20) == 20


def test_an_idle_engine_uses_no_processor_time_and_maps_no_torch() -> None:
    with running_daemon() as (daemon, address), closing(ProcessCoreClient(address)) as client:
        generate(client, 5)
        processes = descendants(daemon.pid)
        assert len(processes) == 2
        while client.receive(1.5) is not None:  # the garbage collection after work is over
            pass
        started = [sum(process.cpu_times()[:2]) for process in processes]
        client.receive(2.0)
        shares = [
            (sum(process.cpu_times()[:2]) - start) / 2.0
            for process, start in zip(processes, started, strict=True)
        ]
        assert max(shares) < 0.02
        for process in processes:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "msgspec" in maps  # or the check itself would prove nothing
            assert not [name for name in FORBIDDEN if f"/{name}/" in maps]


@pytest.mark.parametrize(
    ("module", "also"),
    [
        pytest.param("engine_core.supervisor", ("zmq", "engine_core.core"), id="supervisor"),
        pytest.param("engine_core.core_process", (), id="core"),
        pytest.param("frontend.core_client", ("engine_core", "executor"), id="frontend"),
    ],
)
def test_modules_of_a_process_import_no_model_library(module: str, also: tuple[str, ...]) -> None:
    command = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, text=True)

    assert module in output.split()
    assert not set(output.split()) & {*FORBIDDEN, *also}


def test_killing_every_single_process_of_a_daemon_leaves_none_of_the_others() -> None:
    for victim in range(3):
        daemon = start_daemon("--no-recovery", executor="faulty_executors:ChildExecutor")
        read_address(daemon)
        processes = descendants(daemon.pid)
        assert len(processes) == 3
        os.kill(processes[victim].pid, signal.SIGKILL)
        others = [process for process in processes if process is not processes[victim]]
        if victim == 2:  # this executor does not watch its child; the mp executor's tests do
            daemon.terminate()
        assert_gone(others)
        daemon.communicate(timeout=LIMIT_S)
        assert psutil.pid_exists(daemon.pid) is False
    subprocess.run([sys.executable, "-c", SWEEP], cwd=ROOT, check=True)


SWEEP = """if True:
    from ipc.addresses import find_runtime_directory, sweep_stale_directories
    sweep_stale_directories(find_runtime_directory())
"""
