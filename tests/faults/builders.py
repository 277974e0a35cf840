"""Histories with defaults, for tests of the oracles."""

from typing import Any

from tests.faults.history import Branch, History
from tests.faults.mixed_traffic import decode

IDS = (391, 1077, 202, 4, 1983)


def make_history(
    ids: tuple[int, ...] = IDS,
    *,
    name: str = "a",
    body: dict[str, Any] | None = None,
    **fields: Any,
) -> History:
    """A stream as it should be."""
    options = {"stream": True, "max_tokens": len(IDS)} | (body or {})
    branch = Branch(list(ids), decode(ids), ["length"], num_prompts_told=1)
    values: dict[str, Any] = {
        "status": 200,
        "branches": {0: branch},
        "usages": [{"completion_tokens": len(ids)}],
        "answer_ids": {"cmpl-1"},
        "created": {1},
        "num_done": 1,
    }
    return History(name, "/v1/completions", options, **(values | fields))


def two_choices() -> History:
    """A stream with n=2 whose second choice is missing."""
    return make_history(body={"n": 2})
