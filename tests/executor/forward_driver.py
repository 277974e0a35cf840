"""Drive a model's forward by hand: a small paged cache, packed steps, greedy decoding.

A stand-in for the runner, with one request after the other in blocks that are deliberately out of
order. Builders for checkpoints and configs of the tests live here too.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executor.attention_metadata import AttentionMetadata, LayerKVCache
from executor.loader.loader import LoadedModel, load_model
from executor.parallel import TensorParallel
from ipc.config import LoadConfig, ModelConfig

BLOCK_SIZE = 16


def model_config(path: Path, **changes: Any) -> ModelConfig:
    """A resolved config for the checkpoint in ``path``."""
    hf_config = json.loads((path / "config.json").read_text())
    values = {"dtype": "float32", "max_model_len": 512, "deterministic": True} | changes
    hf_config |= values.pop("hf_overrides", {})
    return ModelConfig(model=str(path), model_path=str(path), hf_config=hf_config, **values)


def load(
    path: Path, load_format: str = "auto", tp: TensorParallel | None = None, **changes: Any
) -> LoadedModel:
    """Load the checkpoint on the CPU."""
    return load_model(
        model_config(path, **changes),
        LoadConfig(load_format=load_format),
        device=torch.device("cpu"),
        tp=tp or TensorParallel(),
        on_progress=lambda stage, done, total: None,
    )


@dataclass
class Sequence:
    """One request: its tokens, and its place in the cache."""

    token_ids: list[int]
    blocks: list[int]
    num_computed: int = 0


@dataclass
class Driver:
    """A loaded model with a cache of its own."""

    model: Any
    num_blocks: int = 64
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caches = []
        for spec in self.model.kv_cache_specs():
            shape = (self.num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
            self.caches.append(LayerKVCache(torch.zeros(shape), torch.zeros(shape)))
        self.free = list(range(self.num_blocks - 1, 0, -1))[::2]
        self.free += [i for i in range(1, self.num_blocks) if i not in self.free]

    def add(self, token_ids: list[int], max_tokens: int = 128) -> Sequence:
        """Give a request its blocks."""
        count = -(-(len(token_ids) + max_tokens) // BLOCK_SIZE)
        blocks, self.free = self.free[:count], self.free[count:]
        assert len(blocks) == count, "the test needs a larger cache"
        sequence = Sequence(list(token_ids), blocks)
        self.sequences.append(sequence)
        return sequence

    def step(self, work: list[tuple[Sequence, int]]) -> list[Tensor]:
        """Compute the next tokens of some sequences; each one's logits for all its new tokens."""
        tokens: list[int] = []
        positions: list[int] = []
        starts = [0]
        for sequence, count in work:
            first = sequence.num_computed
            tokens += sequence.token_ids[first : first + count]
            positions += range(first, first + count)
            starts.append(starts[-1] + count)
            sequence.num_computed += count
        slots = [
            sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for sequence, count in work
            for p in range(sequence.num_computed - count, sequence.num_computed)
        ]
        widest = max(len(sequence.blocks) for sequence, _ in work)
        table = [s.blocks + [0] * (widest - len(s.blocks)) for s, _ in work]
        seq_lens = [sequence.num_computed for sequence, _ in work]
        meta = AttentionMetadata(
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            block_table=torch.tensor(table, dtype=torch.int32),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            max_query_len=max(count for _, count in work),
            max_seq_len=max(seq_lens),
        )
        with torch.inference_mode():
            hidden = self.model.forward(
                torch.tensor(tokens), torch.tensor(positions), self.caches, meta
            )
            logits = self.model.compute_logits(hidden)
        return [logits[a:b] for a, b in itertools.pairwise(starts)]

    def prefill(self, token_ids: list[int], chunk: int = 10**9) -> Tensor:
        """All prompt logits of a new request, computed in chunks."""
        sequence = self.add(token_ids)
        parts = []
        while sequence.num_computed < len(token_ids):
            count = min(chunk, len(token_ids) - sequence.num_computed)
            parts += self.step([(sequence, count)])
        return torch.cat(parts)

    def greedy(self, prompt: list[int], num_tokens: int, chunk: int = 10**9) -> list[int]:
        """The next ``num_tokens`` most likely tokens."""
        logits = self.prefill(prompt, chunk)
        sequence = self.sequences[-1]
        for _ in range(num_tokens):
            sequence.token_ids.append(int(logits[-1].argmax()))
            if len(sequence.token_ids) < len(prompt) + num_tokens:
                logits = self.step([(sequence, 1)])[0]
        return sequence.token_ids[len(prompt) :]
