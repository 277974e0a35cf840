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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large every workload of the suite is. Lengths are in tokens."""

    decode_batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    decode_lens: tuple[int, int] = (128, 256)
    sharegpt_requests: int = 1000
    fixed: tuple[tuple[int, int, int], ...] = ((512, 1024, 128), (256, 128, 1024))
    prefills: tuple[tuple[int, int], ...] = ((1, 2048), (1, 8192), (1, 32_768), (16, 2048))
    prefix_requests: int = 64
    prefix_lens: tuple[int, int, int] = (8192, 64, 64)
    serve_rates: tuple[float, ...] = (10, 40)
    serve_s: float = 60.0
    scale: float = 1.0  # of chat-like lengths
    settle_s: float = 1.5  # an engine's idle moment after its start, for what it put off till then
    max_num_seqs: int = 1024
    offline_tokens: int = 16_384  # max_num_batched_tokens
    serve_tokens: int = 8192


FULL = Sizes()
SMOKE = Sizes(
    decode_batches=(1, 2),
    decode_lens=(8, 12),
    sharegpt_requests=6,
    fixed=((4, 32, 8),),
    prefills=((1, 48),),
    prefix_requests=4,
    prefix_lens=(64, 16, 4),
    serve_rates=(8,),
    serve_s=1.5,
    scale=0.05,
    settle_s=0.0,
    max_num_seqs=16,
    offline_tokens=256,
    serve_tokens=256,
)


def sharegpt_like(num_requests: int, id_range: tuple[int, int], scale: float = 1.0) -> Work:
    """Requests whose lengths are spread as in chat traffic: input mean 226, output mean 201.

    Args:
        id_range: token ids are drawn from [low, high).
        scale: shrinks both lengths, for small models and slow machines.
    """
    input_lens, output_lens = sharegpt_lens(num_requests, scale)
    return Work(prompts=_token_prompts(input_lens, id_range), output_lens=output_lens)


def sharegpt_lens(num_requests: int, scale: float = 1.0) -> tuple[list[int], list[int]]:
    """Tokens in and out of ``sharegpt_like``'s requests."""
    rng = np.random.default_rng(0)
    inputs = np.clip(np.rint(rng.lognormal(5.05, 1.00, num_requests)), 4, MAX_LENGTH)
    outputs = np.clip(np.rint(rng.lognormal(4.92, 0.90, num_requests)), 4, MAX_LENGTH)
    return [max(4, int(n * scale)) for n in inputs], [max(4, int(n * scale)) for n in outputs]


def fixed(num_requests: int, input_len: int, output_len: int, id_range: tuple[int, int]) -> Work:
    """Equal requests."""
    prompts = _token_prompts([input_len] * num_requests, id_range)
    return Work(prompts=prompts, output_lens=[output_len] * num_requests)


def shared_prefix(
    num_requests: int,
    lens: tuple[int, int, int],
    id_range: tuple[int, int],
    *,
    prefix_seed: int,
    seed: int,
) -> Work:
    """Requests that begin alike and go on each in its own way.

    Args:
        lens: tokens of the common prefix, of each request's own part, and to generate.
        prefix_seed: of the common part.
        seed: of the requests' own parts: another one gives new requests behind a known prefix.
    """
    prefix_len, own_len, output_len = lens
    (prefix,) = _token_prompts([prefix_len], id_range, prefix_seed)
    own_parts = _token_prompts([own_len] * num_requests, id_range, seed)
    return Work(
        prompts=[prefix + own for own in own_parts], output_lens=[output_len] * num_requests
    )


def poisson_arrivals_s(rate_per_s: float, duration_s: float) -> list[float]:
    """Arrival times in seconds from the start, all below ``duration_s``."""
    rng = np.random.default_rng(2)
    num_drawn = int(rate_per_s * duration_s * 1.5) + 50
    times = np.cumsum(rng.exponential(1.0 / rate_per_s, num_drawn))
    return [float(t) for t in times if t < duration_s]


def _token_prompts(lens: list[int], id_range: tuple[int, int], seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    low, high = id_range
    return [rng.integers(low, high, size=n).tolist() for n in lens]
