"""Run a recorded engine core again, without workers, and stop where it decides differently.

``python -m engine_core.replay FILE``. Sampled tokens come from the recording. Plans are
differences, so equal plans up to a step mean equal rows, block tables and tokens at that step.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine_core.core import EngineCore
from engine_core.dispatch import dispatch
from engine_core.flight_recorder import name_rows
from engine_core.recording import (
    Answered,
    Arrived,
    Begin,
    Called,
    Entry,
    Event,
    Left,
    NewName,
    Planned,
    read_recording,
)
from executor.executor import Frames, OnProgress
from ipc.channel import MAX_EXTRA_FRAMES, MAX_MESSAGE_BYTES
from ipc.config import decode_config
from ipc.errors import ConfigError, EngineError
from ipc.messages import SchedulerOutput, WorkerReady
from ipc.operations import AnyOperation

DIFFERENT = 1  # the exit code
MAX_BLOCKS = 2**22  # in one pool: a file must not make us build more
MAX_ROWS = 2**16


class DivergenceError(EngineError):
    """The replayed core did something else than the recorded one."""


@dataclass(slots=True)
class ReplayCounts:
    """How far a replay has come."""

    events: int = 0
    steps: int = 0
    preemptions: int = 0


class ReplayedExecutor:
    """Stands for the workers: collects plans, and says to operations what was recorded."""

    def __init__(self) -> None:
        self.channels: list[Any] = []
        self.plans: list[SchedulerOutput] = []
        self.results: list[bytes] = []
        self.error = ""

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Never called: the recording holds what the workers said at their start."""
        raise EngineError("a replay starts no workers")

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Collect a plan."""
        self.plans.append(plan)

    def receive(self, timeout_s: float | None) -> None:
        """Nothing: answers come from the recording."""

    def call(self, operation: AnyOperation) -> list[Any]:
        """What the workers said, or the failure that they reported."""
        if not self.results:
            raise EngineError(self.error or "the recorded core asked no worker")
        results: list[Any] = msgspec.msgpack.decode(self.results.pop(0), type=list[Any])
        return results

    def check_health(self) -> None:
        """Always well."""

    def shutdown(self) -> None:
        """Nothing to end."""


class Replay:
    """Owns the replayed core and compares it with the recording, entry by entry.

    Raises:
        ConfigError: the recording cannot be one of a core.
    """

    def __init__(self, begin: Begin) -> None:
        ready = begin.ready
        config = decode_config(begin.config)
        if not (0 < ready.num_gpu_blocks <= MAX_BLOCKS and 0 <= ready.num_cpu_blocks <= MAX_BLOCKS):
            raise ConfigError(f"pools of {ready.num_gpu_blocks} and {ready.num_cpu_blocks} blocks")
        if config.scheduler_config.max_num_seqs > MAX_ROWS or not 0 < len(begin.hash_key) <= 64:
            raise ConfigError("more rows, or a longer key, than a core has")
        self._executor = ReplayedExecutor()
        self._clocks: list[float] = []
        self.counts = ReplayCounts()
        self._names: dict[int, str] = {}  # by row, as the recording tells
        self.core = EngineCore(
            config,
            self._executor,
            ready,
            epoch=begin.epoch,
            hash_key=begin.hash_key,
            clock=self._next_clock,
        )

    def take(self, event: Event) -> None:
        """Repeat one call, and compare what came of it.

        Raises:
            DivergenceError: it was something else.
        """
        self._clocks = event.clocks[::-1]
        self._executor.plans = []
        error = None
        try:
            self._repeat(event)
        except DivergenceError:
            raise
        except Exception as err:
            error = f"{type(err).__name__}: {err}"
        self.core.drain_outputs()
        if isinstance(event, Planned):
            self._compare_plans(event)
        if error != event.error:
            raise DivergenceError(
                f"recorded: {event.error or 'no failure'}\nreplayed: {error or 'no failure'}"
            )
        if self._clocks:
            raise DivergenceError(f"the replayed core read the time {len(self._clocks)} times less")
        self.counts.events += 1
        self.counts.preemptions = self.core.scheduler.lifecycle.counters.num_preemptions

    def _repeat(self, event: Event) -> None:
        match event:
            case Arrived():
                dispatch(self.core, event.client, event.message, _blank(event.frame_sizes))
            case Left():
                self.core.remove_client(event.client)
            case Called():
                self._executor.results = list(event.results)
                self._executor.error = event.error or ""
                self.core.call(event.operation)
            case Planned():
                self.core.submit_steps()
            case Answered():
                self.core.take_output(event.output, _blank(event.frame_sizes))

    def _compare_plans(self, event: Planned) -> None:
        plans = self._executor.plans
        replayed_names = name_rows(self.core, plans)
        for i in range(max(len(plans), len(event.plans))):
            recorded = event.plans[i] if i < len(event.plans) else None
            replayed = plans[i] if i < len(plans) else None
            names = event.names[i] if i < len(event.names) else []
            others = replayed_names[i] if i < len(replayed_names) else []
            self._names |= {name.row: f"{name.req_id}/{name.index}" for name in names}
            if recorded != replayed or names != others:
                raise DivergenceError(self._describe(recorded, replayed, names, others))
            self.counts.steps += 1

    def _describe(
        self,
        recorded: SchedulerOutput | None,
        replayed: SchedulerOutput | None,
        names: list[NewName],
        others: list[NewName],
    ) -> str:
        if recorded is None or replayed is None:
            one, other = ("no step", "a step") if recorded is None else ("a step", "no step")
            plan = replayed if recorded is None else recorded
            return f"recorded: {one}\nreplayed: {other}\n  the step: {plan!r:.600}"
        lines = [f"step {recorded.step_id}"]
        for field in SchedulerOutput.__struct_fields__:
            old, new = getattr(recorded, field), getattr(replayed, field)
            if old != new:
                lines += [
                    f"  {field}",
                    f"    recorded: {old!r:.400}",
                    f"    replayed: {new!r:.400}",
                ]
        if names != others:
            lines += [
                "  new requests",
                f"    recorded: {names!r:.400}",
                f"    replayed: {others!r:.400}",
            ]
        rows = sorted({*recorded.rows, *replayed.rows})
        lines.append("  rows: " + ", ".join(f"{r}={self._names.get(r, '?')}" for r in rows)[:400])
        return "\n".join(lines)

    def _next_clock(self) -> float:
        if not self._clocks:
            raise DivergenceError(
                "the replayed core reads the time more often than the recorded one"
            )
        return self._clocks.pop()


def replay(entries: Sequence[Entry]) -> ReplayCounts:
    """Run a recording to its end.

    Raises:
        DivergenceError: says at which event and step, and what differs.
        ConfigError: the recording cannot be one of a core.
    """
    begin, *events = entries
    assert isinstance(begin, Begin)
    try:
        run = Replay(begin)
    except Exception as err:  # a file may hold any numbers
        raise ConfigError(f"the recording cannot be replayed: {type(err).__name__}: {err}") from err
    for number, event in enumerate(events, 1):
        if isinstance(event, Begin):
            raise ConfigError("the recording begins twice")
        try:
            run.take(event)
        except DivergenceError as err:
            where = f"event {number} ({type(event).__name__}), after {run.counts.steps} steps"
            raise DivergenceError(f"first difference at {where}\n{err}") from err
    return run.counts


def _blank(sizes: list[int]) -> list[memoryview]:
    """Arrays of the recorded sizes: what is in them moves no decision."""
    if len(sizes) > MAX_EXTRA_FRAMES or any(not 0 <= n <= MAX_MESSAGE_BYTES for n in sizes):
        raise ConfigError("the recording holds arrays that no message can carry")
    if not sizes:
        return []
    zeros = memoryview(bytes(max(sizes)))
    return [zeros[:size] for size in sizes]


def main(arguments: list[str]) -> int:
    """Replay a file; the exit code: 0 all equal, 1 a difference, 2 no recording."""
    parser = argparse.ArgumentParser(
        prog="heliograph replay",
        description="Run a recorded engine's scheduler again; stop at the first difference.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="a recording, as --flight-record-dir keeps them")
    path = parser.parse_args(arguments).file
    logging.disable(logging.ERROR)  # the replayed core's own
    try:
        counts = replay(read_recording(path))
    except DivergenceError as err:
        sys.stdout.write(f"{err}\n")
        return DIFFERENT
    except ConfigError as err:
        sys.stderr.write(f"{err}\n")
        return 2
    did = f"{counts.steps} steps in {counts.events} events, {counts.preemptions} preemptions"
    sys.stdout.write(f"{did}: equal\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
