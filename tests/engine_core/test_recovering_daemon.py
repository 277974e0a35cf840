"""A daemon that loses its cores: the same address, the next epoch, and an end to trying."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from frontend.core_client import ProcessCoreClient
from frontend.launcher import Launch
from ipc.errors import EngineDeadError, EngineRestartingError
from ipc.messages import AddRequest, Welcome
from ipc.operations import GetStats
from ipc.sampling_params import SamplingParams
from tests.engine_core.process_tree import (
    assert_gone,
    descendants,
    find_core,
    make_faulty_config,
    make_scripted_config,
    watched_runtime_directory,
)

LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with watched_runtime_directory(monkeypatch) as directory:
        yield directory


def until_welcome(client: ProcessCoreClient) -> Welcome:
    deadline = time.monotonic() + LIMIT_S
    while True:
        received = client.receive(1.0)
        if received is not None and isinstance(received[0], Welcome):
            return received[0]
        assert time.monotonic() < deadline, "no other core came"


def make_request(req_id: str = "a") -> AddRequest:
    params = SamplingParams(max_tokens=4, seed=5, ignore_eos=True)
    return AddRequest(req_id, [1, 2, 3], params, time.time())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_another_core_takes_the_place_of_one_that_died(number: signal.Signals) -> None:
    launch = Launch(make_scripted_config())
    with closing(ProcessCoreClient(launch)) as client:
        assert client.welcome.epoch == 0
        for epoch in (1, 2):
            core = find_core(launch.pid)
            core.send_signal(number)
            welcome = until_welcome(client)
            assert welcome.epoch == epoch
            assert welcome.core_pid != core.pid
            assert client.call(GetStats()).num_restarts == epoch
            client.send(make_request(f"r{epoch}"))
            assert client.receive(LIMIT_S) is not None
        processes = descendants(launch.pid)
    assert_gone(processes)


def test_a_call_is_answered_refused_or_waits_for_the_next_core() -> None:
    launch = Launch(make_scripted_config())
    with closing(ProcessCoreClient(launch)) as client:
        core = find_core(launch.pid)
        core.kill()
        deadline = time.monotonic() + LIMIT_S
        num_restarts = 0
        while num_restarts == 0:
            with contextlib.suppress(EngineRestartingError):  # sent before the death was seen
                num_restarts = client.call(GetStats()).num_restarts
            assert time.monotonic() < deadline
        assert num_restarts == 1


@pytest.mark.slow
def test_a_core_that_dies_by_itself_again_and_again_is_given_up() -> None:
    launch = Launch(make_faulty_config("CrashingStepExecutor"))
    with closing(ProcessCoreClient(launch)) as client:
        restarts: list[Welcome] = []

        def serve() -> None:
            client.send(make_request())
            while True:
                received = client.receive(LIMIT_S)
                assert received is not None
                if isinstance(received[0], Welcome):
                    restarts.append(received[0])
                    client.send(make_request())

        with pytest.raises(EngineDeadError, match=r"step exploded.*given up after 5 restarts"):
            serve()
        assert [welcome.epoch for welcome in restarts] == [1, 2, 3, 4, 5]
        assert launch._process.wait(LIMIT_S) == 4


def test_a_daemon_listens_at_the_same_port_again() -> None:
    command = [sys.executable, "-m", "engine_core", "--listen", "tcp://127.0.0.1:0"]
    command += ["--model", "scripts/demo_models/tiny"]
    command += ["--executor-class", "tests.engine_core.scripted_executor:ScriptedExecutor"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as daemon:
        assert daemon.stdout is not None
        match = re.fullmatch(r"listening at (\S+)\n", daemon.stdout.readline())
        assert match is not None
        with closing(ProcessCoreClient(match[1])) as client:
            find_core(daemon.pid).kill()
            assert until_welcome(client).epoch == 1
        daemon.terminate()
        assert daemon.wait(LIMIT_S) == 0


def test_a_stop_during_the_wait_for_a_restart_is_obeyed() -> None:
    launch = Launch(make_faulty_config("CrashingStepExecutor"))
    with closing(ProcessCoreClient(launch)) as client:
        core = find_core(launch.pid)
        client.send(make_request())
        psutil.wait_procs([core], timeout=LIMIT_S)
        os.kill(launch.pid, signal.SIGTERM)
        assert launch._process.wait(LIMIT_S) == 0
