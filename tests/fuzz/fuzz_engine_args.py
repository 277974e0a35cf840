"""Engine arguments with random values: a sound config, or an error that names the flag, at once.

In this process through ``EngineArgs``, so that 20 000 inputs take a minute; nothing may be started.
"""

import argparse
import contextlib
import io
import random
import time
from dataclasses import fields
from typing import Any

import psutil

from frontend import EngineArgs
from ipc.errors import ConfigError
from tests.e2e.engines import TINY
from tests.fuzz.values import any_value

MAX_SECONDS = 2.0
NAMES = [f.name for f in fields(EngineArgs) if f.name not in ("model", "tokenizer", "download_dir")]


def fuzz(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Half of the inputs as keyword arguments, half as a command line."""
    rng = random.Random(seed)
    counts = {"accepted": 0, "refused": 0}
    children = len(psutil.Process().children(recursive=True))
    for i in range(num_inputs):
        started = time.perf_counter()
        accepted = _as_keywords(rng) if i % 2 else _as_command_line(rng)
        counts["accepted" if accepted else "refused"] += 1
        seconds = time.perf_counter() - started
        assert seconds < MAX_SECONDS, f"input {i} of seed {seed} took {seconds:.1f} s"
    assert len(psutil.Process().children(recursive=True)) == children, "a process was started"
    return counts


def _as_keywords(rng: random.Random) -> bool:
    options: dict[str, Any] = {n: any_value(rng) for n in rng.sample(NAMES, rng.randrange(1, 4))}
    refusal = None
    try:
        EngineArgs(model=str(TINY), **options).create_engine_config()
    except (ConfigError, ValueError, TypeError) as err:
        refusal = str(err)
    assert refusal is None or names_one_of(refusal, list(options)), f"{options}: {refusal}"
    return refusal is None


def _as_command_line(rng: random.Random) -> bool:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    names = rng.sample(NAMES, rng.randrange(1, 4))
    line = ["--model", str(TINY)]
    for name in names:
        line += ["--" + name.replace("_", "-"), str(any_value(rng)).replace("\x00", "")]
    refusal = None
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = parser.parse_args(line)
        EngineArgs.from_cli_args(args).create_engine_config()
    except (ConfigError, ValueError, TypeError) as err:
        refusal = str(err)
    except SystemExit:
        refusal = errors.getvalue()
    assert refusal is None or names_one_of(refusal, [*names, "arguments"]), f"{line}: {refusal}"
    return refusal is None


def names_one_of(message: str, names: list[str]) -> bool:
    """Whether a message tells the user which argument to change."""
    text = message.lower().replace("-", "_")
    return any(name in text or name.split("_", 1)[-1] in text for name in names)
