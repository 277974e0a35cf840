"""The least time that each workload can take: its bytes over the read rate, its products over the
matmul rate, both measured in the same run.

Weights are read once a step while each token's products are computed, whichever takes longer; keys
and values are read after that. Attention of a prompt counts as products. Launches, sampling,
scheduling and the network are free.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import bench_workload
from bench_workload import Sizes

Figures = dict[str, float]
ITEM_BYTES = 2  # bfloat16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured rates."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model takes: parameters that a step reads, and what a token adds."""

    body: int  # parameters of all layers
    head: int  # of the output projection
    kv_bytes: int  # keys and values of one token, all layers
    attention_flop: int  # per query token and key, all layers

    @classmethod
    def of(cls, model_path: Path) -> "Cost":
        """Read the shape of a decoder with gated MLPs and grouped queries."""
        config = json.loads((model_path / "config.json").read_text())
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attention = (2 * heads + 2 * kv_heads) * head_dim * hidden
        return cls(
            body=layers * (attention + 3 * config["intermediate_size"] * hidden),
            head=config["vocab_size"] * hidden,
            kv_bytes=layers * 2 * kv_heads * head_dim * ITEM_BYTES,
            attention_flop=layers * 4 * heads * head_dim,
        )


class Floor:
    """Owns the arithmetic of one model on one machine. Times are in seconds."""

    def __init__(self, cost: Cost, machine: Machine) -> None:
        self._cost = cost
        self._machine = machine

    def all(self, sizes: Sizes) -> dict[str, Figures]:
        """The least figures of every measurement that has a floor."""
        floors = {
            f"decode.b{batch}": self.decode(batch, *sizes.decode_lens)
            for batch in sizes.decode_batches
        }
        for num_prompts, length in sizes.prefills:
            name = f"{length}" if num_prompts == 1 else f"{num_prompts}x{length}"
            floors[f"prefill.{name}"] = self.prefill(num_prompts, length)
        lens = bench_workload.sharegpt_lens(sizes.sharegpt_requests, sizes.scale)
        floors["offline.sharegpt"] = self.offline(*lens)
        for num_requests, input_len, output_len in sizes.fixed:
            floors[f"offline.{input_len}x{output_len}"] = self.offline(
                [input_len] * num_requests, [output_len] * num_requests
            )
        floors["prefix.warm"] = self.cached_prefix(sizes.prefix_requests, *sizes.prefix_lens[:2])
        return floors

    def decode(self, batch: int, input_len: int, output_len: int) -> Figures:
        """A step in the middle of the run."""
        context = input_len + output_len / 2
        step_s = max(self._weights_s, batch * self._token_s) + self._read_kv_s(batch * context)
        return {"step_ms_mean": 1e3 * step_s, "steady_tok_s": batch / step_s}

    def prefill(self, num_prompts: int, length: int) -> Figures:
        """Until the last prompt's first token."""
        seconds = max(self._weights_s, num_prompts * self._prompt_s(length))
        return {"ttft_ms": 1e3 * seconds, "prompt_tok_s": num_prompts * length / seconds}

    def offline(self, input_lens: list[int], output_lens: list[int]) -> Figures:
        """Everything at once, in steps that are as full as they can be."""
        num_tokens = sum(output_lens)
        num_decoded = num_tokens - len(output_lens)  # prompts bring the first ones
        pairs = zip(input_lens, output_lens, strict=True)
        keys = sum((n - 1) * input_len + n * (n - 1) / 2 for input_len, n in pairs)
        products_s = sum(map(self._prompt_s, input_lens)) + num_decoded * self._token_s
        weights_s = max(output_lens) * self._weights_s
        seconds = max(products_s, weights_s) + self._read_kv_s(keys)
        return {"seconds": seconds, "tok_s": num_tokens / seconds}

    def cached_prefix(self, num_requests: int, prefix_len: int, own_len: int) -> Figures:
        """First tokens of requests of which all but their own parts is in the cache."""
        keys = num_requests * own_len * (prefix_len + own_len / 2)
        attention_s = keys * self._cost.attention_flop / self._machine.flop_per_s
        seconds = attention_s + num_requests * (own_len * self._body_s + self._head_s)
        return {"ttft_ms_p50": 1e3 * seconds}

    @property
    def _weights_s(self) -> float:
        return (self._cost.body + self._cost.head) * ITEM_BYTES / self._machine.bytes_per_s

    @property
    def _body_s(self) -> float:
        return 2 * self._cost.body / self._machine.flop_per_s

    @property
    def _head_s(self) -> float:
        return 2 * self._cost.head / self._machine.flop_per_s

    @property
    def _token_s(self) -> float:
        """A token that is sampled from."""
        return self._body_s + self._head_s

    def _prompt_s(self, length: int) -> float:
        attention = length * length / 2 * self._cost.attention_flop / self._machine.flop_per_s
        return length * self._body_s + self._head_s + attention

    def _read_kv_s(self, num_tokens: float) -> float:
        return num_tokens * self._cost.kv_bytes / self._machine.bytes_per_s
