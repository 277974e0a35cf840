"""Seeded mixed traffic for the model under test: one seed asks the same, so runs can be compared.

Prompts, lengths, sampling and the form of the answer are drawn; every request returns token ids.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from tests.e2e.engines import load_expected
from tests.faults import target
from tests.faults.http_client import Ask

MODEL = "tiny"
WORDS = "the engine reads a short list of tokens and writes code for tests in Python".split()  # noqa: SIM905


def _tokenizer() -> tokenizers.Tokenizer:
    return _read_tokenizer(target.chosen().tokenizer)


@functools.cache
def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path))


def decode(ids: Sequence[int]) -> str:
    """The text of ids in one go, without special tokens, as answers have it."""
    text: str = _tokenizer().decode(list(ids), skip_special_tokens=True)
    return text


def encode(text: str) -> list[int]:
    """The ids of a text."""
    ids: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def completion(name: str, prompt: Any, max_tokens: int, **fields: Any) -> Ask:
    """A streamed greedy completion that goes to its full length unless ``fields`` differ."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        **fields,
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    return Ask(name, body)


def streams(
    prefix: str, count: int, max_tokens: int, *, seed: int = 0, is_sampled: bool = False
) -> list[Ask]:
    """Plain streams of one length: greedy, or at temperature 1 with a seed each."""
    rng = random.Random(seed)
    sampling = {"temperature": 1.0} if is_sampled else {}
    return [
        completion(
            f"{prefix}{i}",
            a_prompt(rng),
            max_tokens,
            **sampling,
            **({"seed": rng.randrange(2**31)} if is_sampled else {}),
        )
        for i in range(count)
    ]


def a_prompt(rng: random.Random) -> str:
    """A prompt of a few to some dozens of tokens."""
    start = rng.choice(load_expected()).prompt if rng.random() < 0.5 else ""
    return start + " ".join(rng.choices(WORDS, k=rng.randrange(1, 24)))


def mixed(
    prefix: str, count: int, *, seed: int, max_tokens: int = 24, share_leaving: float = 0.0
) -> list[Ask]:
    """Streams, whole answers, chats and n=4, greedy or seeded; some clients leave half-way."""
    rng = random.Random(seed)
    return [_one(f"{prefix}{i}", rng, max_tokens, share_leaving) for i in range(count)]


def _one(name: str, rng: random.Random, max_tokens: int, share_leaving: float) -> Ask:
    fields: dict[str, Any] = {"stream": rng.random() < 0.6}
    if rng.random() < 0.5:
        fields |= {"temperature": 1.0, "seed": rng.randrange(2**31)}
        fields["n"] = rng.choice([1, 1, 4])
        if rng.random() < 0.2:
            fields["frequency_penalty"] = 0.5
    request = completion(name, a_prompt(rng), rng.randrange(1, max_tokens + 1), **fields)
    if rng.random() < 0.25:
        body = dict(request.body)
        content = body.pop("prompt")
        body["messages"] = [{"role": "user", "content": content}]
        request = replace(request, body=body, path="/v1/chat/completions")
    if rng.random() >= share_leaving:
        return request
    if fields["stream"] and rng.random() < 0.5:
        return replace(request, leaves_after_events=rng.randrange(1, 6))
    return replace(request, leaves_after_s=rng.uniform(0.0, 0.5))


def undisturbed(requests: Sequence[Ask]) -> list[Ask]:
    """The same requests from clients that stay and read at once."""
    return [
        replace(r, leaves_after_events=None, leaves_after_s=None, reads_bytes_per_s=None)
        for r in requests
    ]


def canaries(count: int, *, seed: int = 4711) -> list[Ask]:
    """Short requests of few kinds, to see whether an engine is still well."""
    kinds = mixed("canary-", 20, seed=seed, max_tokens=8)
    return [kinds[i % len(kinds)] for i in range(count)]
