"""The benchmarks' inputs: pure functions of fixed seeds, so that any engine can be given the same.

Lengths are lognormal, as chat traffic's are; arrivals are a Poisson process.
"""

from dataclasses import dataclass

import numpy as np

MAX_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Work:
    """A list of requests: prompts as token ids and how many tokens each is to generate."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_input_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate, all requests."""
        return sum(self.output_lens)


def sharegpt_like(num_requests: int, id_range: tuple[int, int], scale: float = 1.0) -> Work:
    """Requests whose lengths are spread as in chat traffic: input mean 226, output mean 201.

    Args:
        id_range: token ids are drawn from [low, high).
        scale: shrinks both lengths, for small models and slow machines.
    """
    rng = np.random.default_rng(0)
    inputs = np.clip(np.rint(rng.lognormal(5.05, 1.00, num_requests)), 4, MAX_LENGTH)
    outputs = np.clip(np.rint(rng.lognormal(4.92, 0.90, num_requests)), 4, MAX_LENGTH)
    input_lens = [max(4, int(n * scale)) for n in inputs]
    output_lens = [max(4, int(n * scale)) for n in outputs]
    return Work(prompts=_token_prompts(input_lens, id_range), output_lens=output_lens)


def fixed(num_requests: int, input_len: int, output_len: int, id_range: tuple[int, int]) -> Work:
    """Equal requests."""
    prompts = _token_prompts([input_len] * num_requests, id_range)
    return Work(prompts=prompts, output_lens=[output_len] * num_requests)


def poisson_arrivals_s(rate_per_s: float, duration_s: float) -> list[float]:
    """Arrival times in seconds from the start, all below ``duration_s``."""
    rng = np.random.default_rng(2)
    num_drawn = int(rate_per_s * duration_s * 1.5) + 50
    times = np.cumsum(rng.exponential(1.0 / rate_per_s, num_drawn))
    return [float(t) for t in times if t < duration_s]


def _token_prompts(lens: list[int], id_range: tuple[int, int]) -> list[list[int]]:
    rng = np.random.default_rng(1)
    low, high = id_range
    return [rng.integers(low, high, size=n).tolist() for n in lens]
