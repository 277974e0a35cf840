"""Builders for whole engines on the bundled tiny model, and the oracle's continuations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontend import EngineArgs, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "scripts" / "demo_models" / "tiny"


@dataclass(frozen=True)
class Expected:
    """One continuation by Hugging Face in float32."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    text: str
    top_logprobs: dict[int, float]


def load_expected() -> list[Expected]:
    """Every base case of the oracle."""
    cases = json.loads((ROOT / "tests" / "expected.json").read_text())["base"]
    return [
        Expected(
            prompt=case["prompt"],
            prompt_ids=case["prompt_ids"],
            ids=case["ids"],
            text=case["text"],
            top_logprobs={top["id"]: top["logprob"] for top in case["top5_first"]},
        )
        for case in cases
    ]


def tiny_args(**overrides: Any) -> EngineArgs:
    """The tiny model in float32 on the CPU, small enough to start many times."""
    options: dict[str, Any] = {
        "model": str(TINY),
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 16,
        "disable_log_stats": True,
        "worker_threads": 1,
    }
    return EngineArgs(**(options | overrides))


def greedy(max_tokens: int = 32, **overrides: Any) -> SamplingParams:
    """Greedy decoding past the end-of-text tokens and with them in the text, as the oracle did."""
    options: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    return SamplingParams(**(options | overrides))
