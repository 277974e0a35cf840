"""The oracles are silent on the engine, and flag every mutant of it: a test of the tests.

One engine core serves them all: each mutant is an API process of its own, attached to it.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from frontend.launcher import Launch
from tests.e2e.engines import tiny_args
from tests.faults import oracles
from tests.faults.history import History
from tests.faults.http_client import Ask, ask_all
from tests.faults.mixed_traffic import MODEL, decode, streams
from tests.faults.mutant_engines import IN_CORE
from tests.faults.server_tree import Server, serving

AT_ONCE = 24
REQUESTS = streams("m", AT_ONCE, 96)  # 2304 tokens: a mutant that errs once in 1000 errs twice
LEAVERS = [replace(r, leaves_after_events=3) for r in REQUESTS[:8]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    config = tiny_args(max_num_seqs=32, served_model_name=MODEL).create_engine_config()
    launch = Launch(config, shows_progress=False)
    try:
        yield launch.wait_ready(60)
    finally:
        launch.terminate()


@pytest.fixture(scope="module")
def reference(address: str) -> dict[str, History]:
    with serving("--attach", address) as server:
        return {h.name: h for h in asyncio.run(ask_all(server.port, REQUESTS, at_once=AT_ONCE))}


def judge(server: Server, requests: list[Ask], reference: dict[str, History]) -> list[str]:
    """Everything that the oracles find wrong with a server."""
    histories = asyncio.run(ask_all(server.port, requests, at_once=AT_ONCE))
    found = [words for history in histories for words in oracles.check_integrity(history, decode)]
    return found + oracles.check_equality(histories, reference)


def judge_leaks(server: Server, requests: list[Ask]) -> list[str]:
    """What a server still holds after clients have left it."""
    asyncio.run(ask_all(server.port, requests[:4], at_once=4))  # whatever is made once is made
    before = server.holdings()
    asyncio.run(ask_all(server.port, requests, at_once=AT_ONCE))
    return oracles.check_leaks(before, server.idle_holdings(before))


def test_the_engine_itself_is_not_flagged(address: str, reference: dict[str, History]) -> None:
    with serving("--attach", address) as server:
        assert judge(server, REQUESTS, reference) == []
        assert judge_leaks(server, LEAVERS) == []


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("drop-token", "O2"),
        ("repeat-token", "O2"),
        ("change-text", "is not that of its ids"),
        ("finish-twice", "ended 2 times"),
        ("miscount-usage", "usage tells"),
        ("forget-done", "0 x [DONE]"),
    ],
)  # fmt: skip
def test_a_mutant_of_the_frontend_is_flagged(
    name: str, oracle: str, address: str, reference: dict[str, History]
) -> None:
    module = ("tests.faults.run_mutant", name)
    with serving("--attach", address, module=module) as server:
        found = judge(server, REQUESTS, reference)

    assert any(oracle in words for words in found), found


@pytest.mark.slow
def test_a_file_left_open_per_disconnect_is_flagged(address: str) -> None:
    module = ("tests.faults.run_mutant", "leak-file")
    with serving("--attach", address, module=module) as server:
        found = judge_leaks(server, LEAVERS)

    assert any("O4 fds" in words for words in found), found


def test_a_block_left_behind_per_abort_is_flagged() -> None:
    with serving("--executor-class", IN_CORE["leak-block"]) as server:
        found = judge_leaks(server, LEAVERS)

    assert any("leaked_blocks" in words for words in found), found


@pytest.mark.slow
def test_a_wrong_token_now_and_then_is_flagged(reference: dict[str, History]) -> None:
    with serving("--executor-class", IN_CORE["wrong-token"]) as server:
        found = judge(server, REQUESTS, reference)

    assert any("O2" in words for words in found), found
