"""Attacks by the clock: on API keys, and on what others have asked.

    python -m tests.attacks.timing keys --samples 100000
    python -m tests.attacks.timing prefixes --samples 300

``keys``: Welch's t between the times that two kinds of wrong keys take, one of which shares all but
its last character with a right one; above 4.5 would tell them apart. ``prefixes``: how well the
time of an answer tells prompts that another key has asked from prompts that nobody has; 0.5 is
guessing. Measures are taken in turns, so that a busy machine disturbs both kinds alike.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from frontend.openai.auth import Authentication
from tests.e2e.secured_server import KEYS, SecuredServer, secured_server

CROPPED_SHARE = 0.1  # of the slowest: interruptions by the machine
PROMPT_TOKENS = 384


def welch_t(first: Sequence[float], second: Sequence[float]) -> float:
    """How far two means are apart, in standard errors."""
    spread = statistics.variance(first) / len(first) + statistics.variance(second) / len(second)
    return (statistics.fmean(first) - statistics.fmean(second)) / spread**0.5


def separation(hits: Sequence[float], misses: Sequence[float]) -> float:
    """The share of pairs in which the hit was faster: the area under the curve of a classifier."""
    wins = sum((hit < miss) + 0.5 * (hit == miss) for hit in hits for miss in misses)
    return wins / (len(hits) * len(misses))


def compare(
    first: Callable[[], object], second: Callable[[], object], num_samples: int, seed: int = 0
) -> float:
    """Welch's t of two calls' times, in random turns, without the slowest of all."""
    rng = random.Random(seed)
    times: tuple[list[int], list[int]] = ([], [])
    calls = (first, second)
    for _ in range(num_samples):
        kind = rng.randrange(2)
        call = calls[kind]
        started = time.perf_counter_ns()
        call()
        times[kind].append(time.perf_counter_ns() - started)
    every = sorted([*times[0], *times[1]])
    limit = every[int(len(every) * (1 - CROPPED_SHARE))]
    kept = [[float(t) for t in each if t <= limit] for each in times]
    return welch_t(kept[0], kept[1])


def key_timing(num_samples: int, seed: int = 0) -> float:
    """Welch's t between nearly right keys and quite wrong ones."""
    key = "k" * 40
    guard = Authentication(None, [key, "another-key-of-the-same-server"])  # type: ignore[arg-type]

    def ask(guess: str) -> Callable[[], object]:
        scope: dict[str, Any] = {"headers": [(b"authorization", b"Bearer " + guess.encode())]}
        return lambda: guard._matching_digest(scope)

    near, far = ask(key[:-1] + "x"), ask("z" * 40)
    assert near() is None
    assert far() is None
    assert ask(key)() is not None
    return compare(near, far, num_samples, seed)


def naive_key_timing(num_samples: int, seed: int = 0) -> float:
    """The same of a comparison character by character: what the measure must be able to see."""
    key, near, far = "k" * 40, "k" * 39 + "x", "z" * 40

    def naive(guess: str) -> Callable[[], object]:
        return lambda: all(a == b for a, b in zip(key, guess, strict=True))

    return compare(naive(near), naive(far), num_samples, seed)


def prefix_timing(server: SecuredServer, num_samples: int, attacker: str, seed: int = 0) -> float:
    """Separation of prompts that KEYS[0] has asked from fresh ones, as ``attacker`` times them."""
    rng = random.Random(seed)

    def answer_s(prompt: list[int], key: str) -> float:
        started = time.perf_counter()
        status, body = server.ask(
            "POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1}, key
        )
        assert status == 200, body
        return time.perf_counter() - started

    hits, misses = [], []
    for _ in range(num_samples):
        asked, fresh = ([rng.randrange(100, 8000) for _ in range(PROMPT_TOKENS)] for _ in range(2))
        answer_s(asked, KEYS[0])
        for prompt, times in rng.sample([(asked, hits), (fresh, misses)], 2):
            times.append(answer_s(prompt, attacker))
    return separation(hits, misses)


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("attack", choices=("keys", "prefixes"))
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.attack == "keys":
        ours, naive = (f(args.samples, args.seed) for f in (key_timing, naive_key_timing))
        sys.stdout.write(
            f"|t| {abs(ours):.2f} (limit 4.5); character by character {abs(naive):.1f}\n"
        )
        return int(abs(ours) >= 4.5)
    with secured_server("--disable-log-requests", "--uvicorn-log-level", "warning") as server:
        across = prefix_timing(server, args.samples, KEYS[1], args.seed)
        within = prefix_timing(server, args.samples, KEYS[0], args.seed + 1)
    sys.stdout.write(f"AUC across keys {across:.3f} (limit 0.55); within one key {within:.3f}\n")
    return int(across > 0.55)


if __name__ == "__main__":
    sys.exit(main())
