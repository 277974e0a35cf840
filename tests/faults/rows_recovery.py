"""Runs in which the core or a worker is killed again and again under streams: D01 to D04.

Readers ask for one kind of stream after another, all the time. Whatever dies meanwhile, each stream
must say what it says undisturbed.
"""

import asyncio
import os
import random
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tests.faults import oracles
from tests.faults.history import History
from tests.faults.http_client import Ask, ask, ask_all
from tests.faults.mixed_traffic import streams
from tests.faults.outcomes import Outcome, percentile
from tests.faults.rows_clients import by_name, integrity
from tests.faults.server_tree import Server, serving, until

Seconds = tuple[float, float]
_FLOW_LIMIT_S = 120.0
_RETRY_S = 0.2
_REFUSALS = (429, 503)

# What has to survive besides a prompt and its tokens.
_TWISTS: list[dict[str, Any]] = [
    {},
    {"n": 2, "temperature": 0.8, "seed": 3},
    {"stop": ["\n\n", "return"], "ignore_eos": False},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"repetition_penalty": 1.2, "min_tokens": 30, "ignore_eos": False},
    {"logit_bias": {"300": 5.0}, "top_k": 40},
    {"max_tokens": 3},
]


@dataclass
class Traffic:
    """Owns the readers: ``num_streams`` at a time, until told to stop."""

    server: Server
    kinds: list[Ask]
    num_streams: int
    histories: list[History] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    is_stopping: bool = False

    async def run(self) -> None:
        """Read; the last streams are heard to their end."""
        await asyncio.gather(*(self._read(random.Random(i)) for i in range(self.num_streams)))

    async def _read(self, order: random.Random) -> None:
        while not self.is_stopping:
            history = await ask(self.server.port, order.choice(self.kinds))
            self.statuses[history.status] += 1
            if history.status in _REFUSALS:  # in order: come again
                await asyncio.sleep(_RETRY_S)
            else:
                self.histories.append(history)


@dataclass
class Recovery:
    """Seconds from a death on until each thing happened."""

    unhealthy: float  # /health says so
    restarted: float  # another core process is there
    ready: float  # /health is well again: the model is loaded
    token: float  # streams go on

    def parts(self) -> dict[str, float]:
        """What each stage took."""
        return {
            "detect": self.unhealthy,
            "restart": self.restarted - self.unhealthy,
            "load": self.ready - self.restarted,
            "first token": self.token - self.ready,
        }


async def kill_again_and_again(
    row: str,
    victim: str,
    how: signal.Signals = signal.SIGKILL,
    *,
    num_kills: int = 50,
    num_streams: int = 64,
    pause_s: Seconds = (5.0, 15.0),
    is_sampled: bool = False,
    seed: int = 0,
) -> Outcome:
    """Send a signal to the ``victim``, "core" or "worker", each time tokens have flowed a while."""
    kinds = [
        replace(kind, body=kind.body | _TWISTS[i % len(_TWISTS)])
        for i, kind in enumerate(streams("r", 28, 160, seed=seed, is_sampled=is_sampled))
    ]
    outcome = Outcome(row, f"{num_kills} x {how.name} of the {victim} under {num_streams} streams")
    order, recoveries = random.Random(seed), list[Recovery]()
    with serving("--max-num-seqs", "64") as server:
        reference = by_name(await ask_all(server.port, kinds, at_once=8))
        before = server.holdings()
        traffic = Traffic(server, kinds, num_streams)
        running = asyncio.create_task(traffic.run())
        await until_tokens_flow(server)
        for _ in range(num_kills):
            await asyncio.sleep(order.uniform(*pause_s))
            core = server.core_pid()
            pid = core if victim == "core" else server.worker_pids()[-1]
            struck_s = time.monotonic()
            os.kill(pid, how)
            recoveries.append(await _follow_recovery(server, core, struck_s))
        traffic.is_stopping = True
        await running
        after = server.idle_holdings(before, 10.0)
    outcome.none_of(f"O1 of {len(traffic.histories)} streams", integrity(traffic.histories))
    outcome.none_of("O2 of the same", oracles.check_equality(traffic.histories, reference))
    outcome.none_of("O4 when idle", oracles.check_leaks(before, after))
    wrong = [f"{n} x status {s}" for s, n in traffic.statuses.items() if s not in (200, *_REFUSALS)]
    outcome.none_of("answers of another status", wrong)
    outcome.at_most("/health 503 after, max", max(r.unhealthy for r in recoveries), 1.0, "s")
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        token_s = percentile([r.token for r in recoveries], share)
        outcome.at_most(f"next token {name}", token_s, 60.0, "s")
    for part in recoveries[0].parts():
        outcome.note(f"  {part}, p50", percentile([r.parts()[part] for r in recoveries], 0.5), "s")
    return outcome


async def _follow_recovery(server: Server, core: int, struck_s: float) -> Recovery:
    """Watch a server get well after a death; ``core`` is the process that was the core then."""
    watch = asyncio.create_task(asyncio.to_thread(_seconds_until_unhealthy, server))
    await until(lambda: server.pids("engine_core")[1:] not in ([], [core]),
                _FLOW_LIMIT_S, "other core")  # fmt: skip
    restarted_s = time.monotonic() - struck_s
    unhealthy_s = await watch
    while not await asyncio.to_thread(server.is_ready):
        assert time.monotonic() < struck_s + _FLOW_LIMIT_S, "the server did not get ready"
        await asyncio.sleep(0.02)
    ready_s = time.monotonic() - struck_s
    await until_tokens_flow(server)
    return Recovery(unhealthy_s, restarted_s, ready_s, time.monotonic() - struck_s)


async def until_tokens_flow(server: Server) -> None:
    """Return when a token came that was not there before."""
    num_before = await asyncio.to_thread(_num_tokens, server)
    deadline = time.monotonic() + _FLOW_LIMIT_S
    while await asyncio.to_thread(_num_tokens, server) <= num_before:
        assert time.monotonic() < deadline, "no token came"
        await asyncio.sleep(0.02)


def _num_tokens(server: Server) -> float:
    return server.metrics()["generation_tokens_total"]


def _seconds_until_unhealthy(server: Server) -> float:
    started = time.monotonic()
    while time.monotonic() < started + 5.0:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                time.sleep(0.02)
        except urllib.error.HTTPError:
            break
    return time.monotonic() - started
