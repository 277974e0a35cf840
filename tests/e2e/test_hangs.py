"""A worker that hangs is named with its stack, ended and replaced; its streams go on."""

import asyncio

import pytest

from tests.faults.http_client import ask
from tests.faults.mixed_traffic import completion
from tests.faults.server_tree import serving

NUM_TOKENS = 14
HANG = "worker.in_forward=sleep:120@9"  # each worker in its ninth step


def test_a_hung_worker_is_named_with_its_stack_and_replaced(
    capfd: pytest.CaptureFixture[str],
) -> None:
    request = completion("a", "def add(a, b):", NUM_TOKENS)
    with serving() as server:
        undisturbed = asyncio.run(ask(server.port, request))
    flags = ("--debug-faults", "--failpoints", HANG, "--engine-iteration-timeout", "1")
    with serving(*flags) as server:
        heard = asyncio.run(ask(server.port, request))

    assert heard.branch(0).token_ids == undisturbed.branch(0).token_ids
    assert len(heard.branch(0).token_ids) == NUM_TOKENS
    log = capfd.readouterr().err
    assert "worker 0 (process" in log
    assert "seems stuck" in log
    assert 'failpoints.py", line' in log  # where it stands, by name
    assert "executor/model_runner.py" in log  # and how it came there
