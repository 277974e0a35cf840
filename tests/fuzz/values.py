"""Values that break things: boundaries, wrong types, wrong sizes. Seeded, so every run repeats."""

import random
from typing import Any

BOUNDARIES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 16, 127, 128, 129, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1,
    2**63, -(2**63), -(2**63) - 1, 10**30, 0.0, -0.0, 0.5, 1.0, 1.5, 2.0, -2.0, 1e-9, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "1e9", "auto", "none", "null", "true",
    "\x00", "\ud800", "ünï🙂", "a" * 300, "{}", "[]", "../../etc/passwd", [], [None], [0], [-1],
    [1, "a"], ["a"] * 20, [[1, 2], [3]], list(range(3000)), {}, {"a": 1}, {"1": 2.5},
    {"x": {"y": []}},
]  # fmt: skip


def any_value(rng: random.Random) -> Any:
    """A boundary, or something random near one."""
    choice = rng.random()
    if choice < 0.7:
        return rng.choice(BOUNDARIES)
    if choice < 0.8:
        return rng.randrange(-(10 ** rng.randrange(1, 20)), 10 ** rng.randrange(1, 20))
    if choice < 0.9:
        return rng.uniform(-3, 3) * 10 ** rng.randrange(-3, 6)
    return "".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(rng.randrange(0, 40)))
