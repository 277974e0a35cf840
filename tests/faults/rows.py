"""Runs of faults against a server under load, each with a threshold that it must reach."""

import asyncio
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass

from tests.faults.oracle import Holdings, check_leaks
from tests.faults.servers import Tree, tree
from tests.faults.traffic import Traffic, make_kinds

SETTLE_S = 5.0


@dataclass(frozen=True)
class Load:
    """How much of everything."""

    num_faults: int = 50
    num_streams: int = 64
    pause_s: tuple[float, float] = (5.0, 15.0)  # after tokens flow again, until the next fault
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and what it found wrong."""

    name: str
    measured: dict[str, float]
    problems: list[str]

    def lines(self) -> list[str]:
        """For people."""
        figures = ", ".join(f"{name} {value:g}" for name, value in self.measured.items())
        verdict = "PASS" if not self.problems else f"FAIL ({len(self.problems)} problems)"
        return [f"{self.name}: {verdict}; {figures}", *(f"  - {p}" for p in self.problems[:12])]


async def kill(name: str, role: str, how: signal.Signals, load: Load) -> Outcome:
    """Send a signal to a process again and again, under streams that must not notice."""
    with tree() as server:
        traffic = Traffic(server.url, make_kinds(temperature=load.temperature), load.num_streams)
        await traffic.listen_undisturbed()
        await asyncio.sleep(1.0)
        before = server.holdings()
        started_s = time.monotonic()
        running = asyncio.create_task(traffic.run())
        await traffic.wait_for_tokens(load.num_streams)
        faults = Faults(server, traffic, random.Random(load.seed))
        try:
            for _ in range(load.num_faults):
                await asyncio.sleep(faults.order.uniform(*load.pause_s))
                await faults.strike(role, how)
        finally:
            traffic.stop()
        async with asyncio.timeout(180):
            await running
        seconds = time.monotonic() - started_s
        problems = list(traffic.tally.problems) + faults.problems
        problems += await leaks(server, before)
    recoveries = faults.recoveries_s or [0.0]
    tally = traffic.tally
    refused = tally.statuses[429] + tally.statuses[503]
    problems += [f"{n} answers of status {s}" for s, n in tally.statuses.items() if s in (0, 500)]
    measured = {
        "faults": load.num_faults,
        "streams": tally.num_ended,
        "tokens": tally.num_tokens,
        "refused": refused,
        "seconds": round(seconds, 1),
        "next token p50 s": round(statistics.median(recoveries), 2),
        "next token max s": round(max(recoveries), 2),
        "503 after s, max": round(max(faults.unhealthy_s or [0.0]), 2),
    }
    return Outcome(name, measured, problems)


async def leaks(server: Tree, before: Holdings) -> list[str]:
    """What an idle server still holds a moment after its last request, and did not before."""
    # Connections that were closed linger for a moment; a new core maps its own libraries.
    slack = {"num_descriptors": 8, "num_threads": 8, "num_sockets": 4}
    found: list[str] = []
    limit_s = time.monotonic() + 4 * SETTLE_S
    while time.monotonic() < limit_s:
        await asyncio.sleep(SETTLE_S / 5)
        found = check_leaks(before, server.holdings(), slack)
        if not found:
            break
    return found


class Faults:
    """Owns what was done to a server, and how it took it."""

    def __init__(self, server: Tree, traffic: Traffic, order: random.Random) -> None:
        self._server = server
        self._traffic = traffic
        self.order = order
        self.recoveries_s: list[float] = []  # from the signal to the next token
        self.unhealthy_s: list[float] = []  # from the signal to the first 503
        self.problems: list[str] = []

    async def strike(self, role: str, how: signal.Signals) -> None:
        """Send the signal, and wait until tokens flow again."""
        victim = self._server.find(role)
        if victim is None:
            self.problems.append(f"there was no {role} to strike")
            return
        core = self._server.find("core")
        struck_s = time.monotonic()
        os.kill(victim.pid, how)
        health = asyncio.create_task(self._watch_health(struck_s))
        await self._server.wait_for("core", other_than=-1 if core is None else core.pid)
        await self._traffic.wait_for_tokens()
        self.recoveries_s.append(time.monotonic() - struck_s)
        health.cancel()

    async def _watch_health(self, struck_s: float) -> None:
        while await asyncio.to_thread(self._server.health) == 200:
            await asyncio.sleep(0.02)
        self.unhealthy_s.append(time.monotonic() - struck_s)
