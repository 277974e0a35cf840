"""Short forms of the load runs; ``scripts/faults ROW`` runs them at full size."""

import asyncio
import os
import signal

import pytest

from tests.faults import oracles, rows_clients, schedule
from tests.faults.history import History
from tests.faults.http_client import ask_all
from tests.faults.mixed_traffic import decode, streams
from tests.faults.outcomes import Outcome, percentile
from tests.faults.rows_processes import upper_slope
from tests.faults.server_tree import Server, serving


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(lambda: rows_clients.d06_disconnects(24), id="D06"),
        pytest.param(lambda: rows_clients.d20_characters(24), id="D20"),
    ],
)
def test_a_row_is_passed(row: object) -> None:
    outcome: Outcome = asyncio.run(row())  # type: ignore[operator]

    assert outcome.is_passed, outcome.table()


@pytest.mark.slow
@pytest.mark.parametrize("is_mutant", [False, True], ids=["engine", "mutant"])
def test_a_token_repeated_at_resume_is_flagged(is_mutant: bool) -> None:
    module = ("tests.faults.run_mutant", "repeat-at-resume") if is_mutant else ("frontend",)
    with serving(module=module) as server:
        reference, histories = asyncio.run(_kill_in_the_middle(server))
    found = [words for h in histories for words in oracles.check_integrity(h, decode)]
    found += oracles.check_equality(histories, reference)

    assert bool(found) == is_mutant, found


async def _kill_in_the_middle(server: Server) -> tuple[dict[str, History], list[History]]:
    """Streams without, then with a killed core once they flow."""
    # The reference is the whole answer, so no core is killed in front of it.
    requests = streams("k", 8, 120)
    reference = {h.name: h for h in await ask_all(server.port, requests, at_once=8)}
    core, tokens = server.core_pid(), server.metrics()["generation_tokens_total"]
    running = asyncio.create_task(ask_all(server.port, requests, at_once=8))
    while (await asyncio.to_thread(server.metrics))["generation_tokens_total"] < tokens + 100:
        await asyncio.sleep(0.02)
    assert not running.done()
    os.kill(core, signal.SIGKILL)
    histories = await running
    assert server.core_pid() != core
    return reference, histories


def test_a_seed_plans_the_same_faults_again() -> None:
    kinds = (*schedule.GENTLE, *schedule.VIOLENT)

    faults = schedule.plan(600, 7, kinds=kinds)

    assert faults == schedule.plan(600, 7, kinds=kinds)
    assert faults != schedule.plan(600, 8, kinds=kinds)
    assert {fault.kind for fault in faults} == set(kinds)
    assert all(0 < fault.at_s < 600 for fault in faults)


def test_an_outcome_passes_only_with_every_threshold_met() -> None:
    outcome = Outcome("D00", "nothing")
    assert not outcome.is_passed
    outcome.at_most("a", 1, 1)
    outcome.at_least("b", 1, 1)
    outcome.none_of("c", [])
    assert outcome.is_passed
    outcome.none_of("d", ["bad"])
    assert not outcome.is_passed
    assert "FAIL" in outcome.table()
    assert "bad" in outcome.table()


def test_statistics_of_loads() -> None:
    assert percentile([], 0.99) == 0
    assert percentile(list(range(100)), 0.99) == 99
    assert upper_slope([(x, 5 * x + 3) for x in range(10)]) == pytest.approx(5)
