"""Where a parameter's values come from: tensors that are read in pieces, or made up.

A source knows its shape before anything is read, and reads only the ranges asked for; so a rank
reads its own bytes, and only once.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ipc.errors import EngineStartError

Ranges = tuple[slice, ...]  # one per dimension, each with start and stop


class TensorSource(Protocol):
    """One tensor of a checkpoint, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size in the checkpoint."""

    @property
    def dtype(self) -> str:
        """Its element type as the checkpoint names it; part of the digest."""

    def read(self, ranges: Ranges) -> Tensor:
        """The values in ``ranges``, on any device and in any dtype."""


class SafetensorsSource:
    """A tensor in a safetensors file, which is mapped into memory."""

    def __init__(self, path: Path, name: str, lazy: Any) -> None:
        self._path = path
        self._name = name
        self._lazy = lazy
        self.shape: tuple[int, ...] = tuple(lazy.get_shape())
        self.dtype: str = str(lazy.get_dtype())

    def read(self, ranges: Ranges) -> Tensor:
        """Read from the file; only the pages of ``ranges`` are touched."""
        try:
            return self._lazy[ranges] if ranges else self._lazy[:]
        except (OSError, ValueError, RuntimeError) as err:
            raise EngineStartError(f"cannot read {self._name} from {self._path}: {err}") from err


class MemorySource:
    """A tensor that is in memory, or mapped into it, already."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.dtype: str = str(tensor.dtype).removeprefix("torch.")

    def read(self, ranges: Ranges) -> Tensor:
        """A view."""
        return self._tensor[ranges] if ranges else self._tensor


class TransposedSource:
    """A matrix that the checkpoint stores the other way round."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.shape: tuple[int, ...] = source.shape[::-1]
        self.dtype: str = source.dtype

    def read(self, ranges: Ranges) -> Tensor:
        """Read the mirrored ranges."""
        return self._source.read(ranges[::-1]).t()


class DummySource:
    """Made-up values: a function of seed, name and place in the whole tensor.

    So they do not depend on the device or on how many ranks share the tensor. Matrices and biases
    are uniform around zero, norm weights around one.
    """

    _ROWS_AT_ONCE = 1 << 24  # values made per call: bounds the int32 temporaries

    def __init__(self, seed: int, name: str, shape: tuple[int, ...], device: torch.device) -> None:
        digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
        self._key = int.from_bytes(digest[:4], "little", signed=True)
        self._device = device
        is_norm = len(shape) == 1 and name.endswith("weight")
        self._centre, self._spread = (1.0, 0.1) if is_norm else (0.0, 0.05)
        self.shape = shape
        self.dtype = "dummy"

    def read(self, ranges: Ranges) -> Tensor:
        """Compute the values on the device, a slab of rows at a time."""
        if not ranges:
            ranges = (slice(0, 1),)
        sizes = [r.stop - r.start for r in ranges]
        out = torch.empty(sizes, dtype=torch.float32, device=self._device)
        row_size = max(out[0].numel(), 1) if sizes[0] else 1
        step = max(self._ROWS_AT_ONCE // row_size, 1)
        first = ranges[0].start
        for start in range(0, sizes[0], step):
            stop = min(start + step, sizes[0])
            rows = slice(first + start, first + stop)
            out[start:stop] = self._uniform(self._indices((rows, *ranges[1:])))
        return out if self.shape else out[0]

    def _indices(self, ranges: Ranges) -> Tensor:
        """Each value's flat index in the whole tensor, modulo 2**32."""
        index = torch.zeros((), dtype=torch.int32, device=self._device)
        stride = 1
        for dim in reversed(range(len(ranges))):
            places = torch.arange(ranges[dim].start, ranges[dim].stop, device=self._device)
            places = (places * stride).to(torch.int32)
            index = index + places.view(-1, *[1] * (len(ranges) - 1 - dim))
            stride *= self.shape[dim] if self.shape else 1
        return index

    def _uniform(self, x: Tensor) -> Tensor:
        """Mix the bits of each index with the key; integers wrap the same on every device."""
        x = x ^ self._key
        x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
        x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B, signed
        x = x ^ ((x >> 16) & 0xFFFF)
        return (x >> 8).float() * (self._spread * 2.0**-23) + self._centre
