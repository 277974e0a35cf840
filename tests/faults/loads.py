"""Load tests with faults, one row each:  scripts/faults ROW [--scale S] [--seed N] [--shape NAME].

At scale 1 a row runs at the load and threshold of the scoreboard; a smaller scale is for a quick
look. The exit code is 0 only when every threshold was met. With ``--shape`` servers run a shape of
``scripts/bench_models`` with random weights in place of the bundled model.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable

from tests.faults import rows_clients, rows_processes, rows_recovery, schedule
from tests.faults.outcomes import Outcome
from tests.faults.target import running_shape

Row = Callable[[float, int], Awaitable[Outcome]]


def sized(count: int, scale: float) -> int:
    """A share of a load, and something at least."""
    return max(8, round(count * scale))


def _kills(row: str, victim: str, how: signal.Signals, *, is_sampled: bool = False) -> Row:
    async def run(scale: float, seed: int) -> Outcome:
        return await rows_recovery.kill_again_and_again(
            row,
            victim,
            how,
            num_kills=max(1, round(50 * scale)),
            num_streams=sized(64, min(1.0, 5 * scale)),
            pause_s=(5.0, 15.0) if scale >= 1 else (1.0, 3.0),
            is_sampled=is_sampled,
            seed=seed,
        )

    return run


ROWS: dict[str, Row] = {
    "D01": _kills("D01, D04", "core", signal.SIGKILL),
    "D02": _kills("D02", "core", signal.SIGKILL, is_sampled=True),
    "D03": _kills("D03 with one worker", "worker", signal.SIGKILL),
    "crash": _kills("crash", "core", signal.SIGSEGV),
    "D05": lambda scale, seed: rows_processes.d05_stopped_core(max(1, round(5 * scale))),
    "D06": lambda scale, seed: rows_clients.d06_disconnects(sized(10_000, scale), seed),
    "D07": lambda scale, seed: rows_clients.d07_aborts(sized(10_000, scale), seed),
    "D08": lambda scale, seed: rows_processes.d08_poison(sized(63, scale)),
    "D12": lambda scale, seed: rows_clients.d12_burst(sized(10_000, scale), sized(1000, scale)),
    "D14": lambda scale, seed: rows_processes.d14_drain(sized(64, scale)),
    "D15": lambda scale, seed: rows_processes.d15_lost_frontend(),
    "D16": lambda scale, seed: rows_processes.d16_lost_parent(),
    "D17": lambda scale, seed: rows_processes.d17_slow_clients(sized(1000, scale)),
    "D18": lambda scale, seed: rows_clients.d18_pressure(sized(2000, scale), seed),
    "D19": lambda scale, seed: rows_clients.d19_impossible(sized(200, scale)),
    "D20": lambda scale, seed: rows_clients.d20_characters(sized(2000, scale), seed),
    "D23": lambda scale, seed: rows_processes.d23_soak(300 * scale, seed),
    "D24": lambda scale, seed: rows_processes.d24_starts(sized(8, scale)),
    "random": lambda scale, seed: schedule.run_schedule(120 * scale, seed),
}


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("rows", nargs="+", choices=[*ROWS, "all"])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", help="of scripts/bench_models; unset: the bundled model")
    args = parser.parse_args()
    with running_shape(args.shape) if args.shape else contextlib.nullcontext():
        return 0 if run_rows(args) else 1


def run_rows(args: argparse.Namespace) -> bool:
    """Run rows and print what came of each; whether all were passed."""
    is_passed = True
    for row in ROWS if "all" in args.rows else args.rows:
        sys.stdout.write(f"{row}: scale {args.scale:g}, seed {args.seed}\n")
        sys.stdout.flush()
        started = time.monotonic()
        try:
            outcome = asyncio.run(ROWS[row](args.scale, args.seed))
        except AssertionError as err:  # the run could not go on: that is a result too
            outcome = Outcome(row, "not finished")
            outcome.none_of("what ended the run", [str(err)])
        is_passed = is_passed and outcome.is_passed
        sys.stdout.write(f"{outcome.table()}\n  took {time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()
    return is_passed


if __name__ == "__main__":
    sys.exit(main())
