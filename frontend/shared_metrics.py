"""One set of metrics for the several API processes of one server, whichever of them is scraped.

Each process writes its numbers to a file of its own in a directory that they share, soon after they
changed; a scrape reads the others' files and merges. So a process that is busy or gone delays
nobody, and what it counted stays counted: files outlive their processes until the server ends.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ipc.messages import SchedulerStats

PUBLISH_DELAY_S = 0.5  # from a change to the file; how far the others may be behind
RATE_LIMIT_S = 10.0  # rates of a process that has written nothing for so long are zero

logger = logging.getLogger(__name__)

# Every process hears of these from the engine; the rest is what happened in a process itself.
ENGINE_WIDE = frozenset(
    {
        "num_preemptions",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "engine_steps",
        "iteration_tokens_total",
    }
)

Observations = tuple[list[int], float]  # of a histogram: count per bucket, sum


class Numbers(msgspec.Struct):
    """What one API process knows, or several together. Times are ``time.monotonic()``."""

    written_s: float
    stats: SchedulerStats  # the engine's state as this process heard it last, at ``stats_s``
    stats_s: float
    counters: dict[str, int]
    finished: dict[str, int]  # requests that ended, by reason
    rates: dict[str, float]  # tokens per second, lately
    histograms: dict[str, Observations]


def merge(numbers: Sequence[Numbers]) -> Numbers:
    """The numbers of a whole server: sums of its processes' own, and the engine's once."""
    now_s = max(each.written_s for each in numbers)
    newest = max(numbers, key=lambda each: each.stats_s)
    fresh = [each.rates for each in numbers if now_s - each.written_s < RATE_LIMIT_S]
    return Numbers(
        written_s=now_s,
        stats=newest.stats,
        stats_s=newest.stats_s,
        counters=_sums([each.counters for each in numbers]),
        finished=_sums([each.finished for each in numbers]),
        rates={name: sum(rates[name] for rates in fresh) for name in newest.rates},
        histograms={
            name: _joined(name, [each.histograms[name] for each in numbers])
            for name in newest.histograms
        },
    )


def _sums(counters: list[dict[str, int]]) -> dict[str, int]:
    return {
        name: (max if name in ENGINE_WIDE else sum)(each[name] for each in counters)
        for name in counters[0]
    }


def _joined(name: str, parts: list[Observations]) -> Observations:
    if name in ENGINE_WIDE:
        return max(parts, key=lambda observations: sum(observations[0]))
    counts = [sum(column) for column in zip(*(counts for counts, _ in parts), strict=True)]
    return counts, sum(total for _, total in parts)


class MetricsExchange:
    """This process's file among the others'. ``directory`` belongs to whoever started them all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / f"{os.getpid()}.metrics"
        self._is_due = False

    def publish_soon(self, get_numbers: Callable[[], Numbers]) -> None:
        """Write the numbers in a moment, once for all changes until then."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(PUBLISH_DELAY_S, self._publish_due, get_numbers)

    def publish(self, numbers: Numbers) -> None:
        """Write the numbers now. A full disk costs the others our news, not us our life."""
        draft = self._path.with_suffix(".part")
        try:
            draft.write_bytes(msgspec.msgpack.encode(numbers))
            draft.replace(self._path)
        except OSError as err:
            logger.warning("could not share metrics with the other API processes: %s", err)

    def read_others(self) -> list[Numbers]:
        """What the other processes wrote last, those that are gone included."""
        paths = [path for path in self._directory.glob("*.metrics") if path != self._path]
        return [_decoder.decode(path.read_bytes()) for path in paths]

    def _publish_due(self, get_numbers: Callable[[], Numbers]) -> None:
        self._is_due = False
        self.publish(get_numbers())


_decoder = msgspec.msgpack.Decoder(Numbers)
