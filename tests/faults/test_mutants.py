"""The oracle is silent on a healthy server, and finds every planted bug."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from frontend.launcher import Launch
from tests.e2e.engines import ROOT, tiny_args
from tests.faults.mutants import AT_RECOVERY, FIRST, MUTANTS
from tests.faults.traffic import Tally, Traffic, make_kinds
from tests.fuzz.servers import free_port, wait_until_ready

KINDS = make_kinds(temperature=0.0, max_tokens=24)
assert sum(kind.body["max_tokens"] for kind in KINDS) > 2 * FIRST


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    launch = Launch(tiny_args(max_num_seqs=32).create_engine_config(), shows_progress=False)
    try:
        yield launch.wait_ready(60)
    finally:
        launch.terminate()


@contextlib.contextmanager
def serving(address: str, *module: str) -> Iterator[str]:
    """A server on that engine, mutated or not; its URL."""
    port = free_port()
    command = [
        sys.executable, "-m", *module, "--attach", address, "--host", "127.0.0.1",
        "--port", str(port), "--uvicorn-log-level", "error", "--disable-log-requests",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def healthy(address: str) -> Iterator[Traffic]:
    """What must be heard."""
    with serving(address, "frontend") as url:
        traffic = Traffic(url, KINDS, 0)
        asyncio.run(traffic.listen_undisturbed())
        yield traffic


def listen_again(healthy: Traffic, url: str) -> Tally:
    """Every kind once more, somewhere else."""
    traffic = healthy.at(url)
    asyncio.run(traffic.listen_once())
    return traffic.tally


def test_a_healthy_server_passes(healthy: Traffic, address: str) -> None:
    with serving(address, "frontend") as url:
        tally = listen_again(healthy, url)
    assert tally.problems == []
    assert tally.num_ended == len(KINDS)


@pytest.mark.parametrize("mutant", [name for name in MUTANTS if name not in AT_RECOVERY])
def test_a_planted_bug_is_found(healthy: Traffic, address: str, mutant: str) -> None:
    with serving(address, "tests.faults.mutants", mutant) as url:
        tally = listen_again(healthy, url)
    assert tally.problems
    assert tally.num_ended == len(KINDS)
