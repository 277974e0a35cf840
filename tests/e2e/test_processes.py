"""What the live processes hold: no torch in frontend and core, no work when there is none."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from frontend.engine_args import EngineArgs
from tests.e2e.engines import ROOT, tiny_args
from tests.e2e.processes import Traces, assert_nothing_left, engine_pids, modules_of, modules_spy
from tests.fuzz.servers import free_port, wait_until_ready

FORBIDDEN = {"torch", "transformers", "triton"}


def serve(environment: dict[str, str], port: int) -> "subprocess.Popen[bytes]":
    args: EngineArgs = tiny_args()
    return subprocess.Popen(
        [
            sys.executable, "-m", "frontend", "--model", args.model, "--dtype", "float32",
            "--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "error",
        ],
        cwd=ROOT,
        env=os.environ | environment,
    )  # fmt: skip


def package_of(pid: int) -> str:
    line = psutil.Process(pid).cmdline()
    return line[line.index("-m") + 1]


def test_live_frontend_and_core_hold_no_torch_and_idle_without_work(tmp_path: Path) -> None:
    before = Traces.now()
    port = free_port()
    with serve(modules_spy(tmp_path), port) as server:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", server)
            pids = [pid for pid in engine_pids() if pid not in before.pids]
            packages = sorted(package_of(pid) for pid in pids)
            assert packages == ["engine_core", "engine_core", "executor", "frontend"]
            for pid in pids:
                modules = modules_of(pid, tmp_path)
                if package_of(pid) == "executor":
                    assert "torch" in modules  # or the check itself would prove nothing
                else:
                    assert not modules & FORBIDDEN, package_of(pid)

            time.sleep(2.0)  # after two idle seconds a process may not spin
            processes = [psutil.Process(pid) for pid in pids]
            started = [sum(p.cpu_times()[:2]) for p in processes]
            time.sleep(3.0)
            for process, start in zip(processes, started, strict=True):
                share = (sum(process.cpu_times()[:2]) - start) / 3.0
                assert share <= 0.02, f"{package_of(process.pid)} uses {share:.1%} of a core"
        finally:
            server.terminate()
    assert server.returncode == 0
    assert_nothing_left(before)


def test_importing_the_frontend_is_quick() -> None:
    command = (
        "import time; t = time.perf_counter(); import frontend; print(time.perf_counter() - t)"
    )
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", command], cwd=ROOT)) for _ in range(5)
    ]

    assert min(seconds) <= 0.3


@pytest.mark.parametrize("name", ["LLM", "AsyncLLM", "EngineArgs", "SamplingParams"])
def test_public_names_bring_no_torch(name: str) -> None:
    command = (
        f"import sys; from frontend import {name}; "
        f"print(*({sorted(FORBIDDEN)!r} & sys.modules.keys()))".replace("[", "{").replace("]", "}")
    )
    out = subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, text=True)

    assert out.strip() == ""
