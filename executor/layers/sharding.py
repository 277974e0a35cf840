"""How a parameter is cut from checkpoint tensors: records that the loader executes.

A layer that splits or fuses weights carries ``sharding``: parameter name -> ``Sharding``. A
parameter that is absent from it is loaded whole, the same on every rank. So sharding is data,
which the loader, quantization and LoRA can all read, and each rank reads only its own bytes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor's share in a parameter, along the sharded dimension."""

    full: int  # size in the checkpoint
    start: int  # where this rank's range begins there
    length: int  # how much of it this rank holds


@dataclass(frozen=True, slots=True)
class Sharding:
    """A parameter's parts, laid end to end along ``dim``.

    A checkpoint holds the parts as separate tensors, or already fused in the same order.
    """

    dim: int
    parts: tuple[Part, ...]
    # True: rows past the parts are padding, which stays zero.
    padded: bool = False

    def target_start(self, index: int) -> int:
        """Where part ``index`` begins in the parameter."""
        return sum(part.length for part in self.parts[:index])

    def source_start(self, index: int) -> int:
        """Where part ``index`` begins in a checkpoint tensor that holds all parts fused."""
        return sum(part.full for part in self.parts[:index])

    @property
    def full(self) -> int:
        """The fused checkpoint tensor's size along ``dim``."""
        return sum(part.full for part in self.parts)
