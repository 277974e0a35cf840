"""Tensor parallelism: this rank's place in its group, and the few collectives that layers use.

A group of one needs no torch.distributed at all: every method is then the identity. Larger groups
are handed a process group (NCCL on GPUs, gloo on CPUs) that the worker has made.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from ipc.errors import ConfigError


class TensorParallel:
    """One rank's view of its tensor-parallel group. All ranks call the collectives in one order."""

    def __init__(
        self, rank: int = 0, size: int = 1, group: "dist.ProcessGroup | None" = None
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is outside a group of {size}")
        self.rank = rank
        self.size = size
        self._group = group

    def split(self, count: int) -> int:
        """This rank's share of ``count`` equal parts (heads, rows, columns).

        Raises:
            ConfigError: the parts cannot be dealt out evenly.
        """
        if count % self.size:
            raise ConfigError(
                f"--tensor-parallel-size {self.size} does not divide {count}: "
                f"choose a size that divides the model's heads and widths"
            )
        return count // self.size

    def split_kv_heads(self, num_kv_heads: int) -> int:
        """This rank's key/value heads; fewer heads than ranks are replicated, one per rank."""
        if num_kv_heads < self.size and self.size % num_kv_heads == 0:
            return 1
        return self.split(num_kv_heads)

    def kv_head_start(self, num_kv_heads: int) -> int:
        """The first key/value head of this rank, counted over the whole model."""
        return self.rank * num_kv_heads // self.size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the group. May write into ``tensor``; use only what is returned."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Every rank's ``tensor``, joined along ``dim`` in rank order."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts, dim=dim)
