"""A seeded random schedule of faults over mixed traffic; the same seed plans the same faults.

The plan is pure: kinds and times. What a fault meets depends on the moment, as outside.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults import oracles
from tests.faults.history import History
from tests.faults.http_client import Ask, ask, ask_all
from tests.faults.mixed_traffic import mixed, streams, undisturbed
from tests.faults.outcomes import Outcome
from tests.faults.rows_clients import by_name, check_well, integrity, reference_canaries
from tests.faults.server_tree import Server, serving
from tests.fuzz import fuzz_frames

GENTLE = ("leave", "abort storm", "hostile frames", "slow readers", "pause worker")
VIOLENT = ("kill core", "kill worker", "segv core")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, so many seconds after the start."""

    at_s: float
    kind: str


def plan(seconds: float, seed: int, *, kinds: Sequence[str], mean_s: float = 5.0) -> list[Fault]:
    """Which faults come when."""
    rng = random.Random(seed)
    faults, now = [], rng.expovariate(1 / mean_s)
    while now < seconds:
        faults.append(Fault(now, rng.choice(kinds)))
        now += rng.expovariate(1 / mean_s)
    return faults


async def run_schedule(
    seconds: float = 120.0, seed: int = 0, *, kinds: Sequence[str] = (*GENTLE, *VIOLENT)
) -> Outcome:
    """Mixed traffic under a plan of faults; all that was asked must be answered, and rightly."""
    faults = plan(seconds, seed, kinds=kinds)
    outcome = Outcome("random", f"{len(faults)} faults in {seconds:.0f} s, seed {seed}")
    requests = mixed("r-", 60, seed=seed, max_tokens=60)
    with serving("--max-num-seqs", "32", "--max-waiting-requests", "2048") as server:
        healthy = await reference_canaries(server)
        reference = by_name(await ask_all(server.port, undisturbed(requests), at_once=16))
        before, started = server.holdings(), time.monotonic()
        histories: list[History] = []
        done: Counter[str] = Counter()

        async def traffic() -> None:
            while time.monotonic() - started < seconds:
                histories.extend(await ask_all(server.port, requests, at_once=16))

        running = asyncio.create_task(traffic())
        for number, fault in enumerate(faults):
            await asyncio.sleep(max(0.0, started + fault.at_s - time.monotonic()))
            await strike(server, fault.kind, seed + number)
            done[fault.kind] += 1
        await running
        after = server.idle_holdings(before, 10.0)
        await check_well(server, healthy, server.core_pid(), outcome, 100)
    outcome.load += ": " + ", ".join(f"{n} x {kind}" for kind, n in sorted(done.items()))
    outcome.none_of(f"O1 of {len(histories)} answers", integrity(histories))
    outcome.none_of("O2 of the same", oracles.check_equality(histories, reference))
    outcome.none_of("O4 when idle", oracles.check_leaks(before, after))
    return outcome


async def strike(server: Server, kind: str, seed: int) -> None:
    """Let one thing go wrong."""
    match kind:
        case "kill core" | "segv core":
            how = signal.SIGKILL if kind == "kill core" else signal.SIGSEGV
            os.kill(server.core_pid(), how)
        case "kill worker":
            os.kill(server.worker_pids()[-1], signal.SIGKILL)
        case "pause worker":
            pid = server.worker_pids()[-1]
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(1.0)
            os.kill(pid, signal.SIGCONT)
        case "leave" | "abort storm":
            leavers = mixed("l-", 8 if kind == "leave" else 64, seed=seed, share_leaving=1.0)
            await ask_all(server.port, leavers, at_once=len(leavers))
        case "slow readers":
            await asyncio.gather(*(_read_slowly(server, r) for r in streams("s-", 8, 200)))
        case "hostile frames":
            await asyncio.to_thread(_send_frames, server, seed)


async def _read_slowly(server: Server, request: Ask) -> None:
    slow = Ask(request.name, request.body, reads_bytes_per_s=100.0, leaves_after_s=3.0)
    await ask(server.port, slow)


def _send_frames(server: Server, seed: int) -> None:
    """Noise on each socket of this server's tree."""
    fuzz_frames.attack(fuzz_frames.sockets_of(server.tree()), 100, seed)
