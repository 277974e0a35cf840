"""The command behind ``scripts/faults``: one run of faults, at any size, with its seed printed."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tests.faults.rows import Load, Outcome, kill

Row = Callable[[Load], Awaitable[Outcome]]


def _kill(name: str, role: str, how: signal.Signals, temperature: float = 0.0) -> Row:
    return lambda load: kill(name, role, how, replace(load, temperature=temperature))


ROWS: dict[str, tuple[str, Row]] = {
    "kill-core": ("kill -9 the core, greedy", _kill("kill-core", "core", signal.SIGKILL)),
    "kill-core-sampled": (
        "the same at temperature 1 with seeds",
        _kill("kill-core-sampled", "core", signal.SIGKILL, 1.0),
    ),
    "kill-worker": ("kill -9 the worker", _kill("kill-worker", "worker", signal.SIGKILL)),
    "crash-core": ("SIGSEGV in the core", _kill("crash-core", "core", signal.SIGSEGV)),
}


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument(
        "row", choices=sorted(ROWS), help="; ".join(f"{k}: {v[0]}" for k, v in ROWS.items())
    )
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--pause-s", type=float, nargs=2, default=(5.0, 15.0), metavar=("MIN", "MAX")
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load = Load(args.faults, args.streams, tuple(args.pause_s), seed=args.seed)
    sys.stdout.write(f"{args.row}, seed {args.seed}\n")
    sys.stdout.flush()
    outcome = asyncio.run(ROWS[args.row][1](load))
    sys.stdout.write("\n".join(outcome.lines()) + "\n")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
