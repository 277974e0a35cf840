"""Two ranks in two threads: together they compute what one rank computes alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor.parallel import TensorParallel
from tests.executor.forward_driver import Driver, load
from tests.executor.models.test_families import CASES, PROMPT, SMALL, make_model


class ThreadGroup:
    """Collectives between threads: each puts its tensor down, waits, and reads all."""

    def __init__(self, size: int) -> None:
        self.slots: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.slots[rank] = tensor
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


class ThreadParallel(TensorParallel):
    """One thread's place in a ``ThreadGroup``."""

    def __init__(self, rank: int, size: int, group: ThreadGroup) -> None:
        super().__init__(rank, size)
        self._threads = group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._threads.exchange(self.rank, tensor)).sum(dim=0)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return torch.cat(self._threads.exchange(self.rank, tensor), dim=dim)


def prefill_on_two_ranks(path: Path) -> list[Tensor]:
    group = ThreadGroup(2)

    def rank_logits(rank: int) -> Tensor:
        driver = Driver(load(path, tp=ThreadParallel(rank, 2, group)).model)
        return driver.prefill(PROMPT, chunk=9)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank_logits, (0, 1)))


TP_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": CASES["llama with biases and tied embeddings"],
    "llama with one key/value head": ("Llama", SMALL | {"num_key_value_heads": 1}),
    "gemma3": CASES["gemma3"],
    "phi3": CASES["phi3"],
    "opt": CASES["opt with norms after, and a smaller embedding"],
    "gpt2": CASES["gpt2"],
}


@pytest.mark.parametrize("case", TP_CASES)
def test_two_ranks_compute_what_one_computes(case: str, tmp_path: Path) -> None:
    make_model(*TP_CASES[case]).save_pretrained(tmp_path)
    whole = Driver(load(tmp_path).model).prefill(PROMPT)
    for logits in prefill_on_two_ranks(tmp_path):
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
