"""Copies between host and device that do not stop the device.

Up: several small index vectors travel as one pinned buffer and one copy. Down: into pinned memory,
read after an event. On the CPU device nothing is copied: tensors share the arrays' memory.
PyTorch's pinned allocator keeps a buffer until the copies that use it are done, so a pinned
temporary may be dropped at once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_ALIGNMENT = 16  # what allocators keep too: a kernel compiled for one address fits the next


def upload(array: Array, device: torch.device) -> Tensor:
    """The array on the device. On the CPU it is shared, so the caller must not change it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_all(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Several one-dimensional arrays in one copy; the tensors are views of one buffer."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    offsets, total = [], 0
    for array in arrays:
        offsets.append(total)
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    staging = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    staged = staging.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        staged[offset : offset + array.nbytes] = array.view(np.uint8)
    buffer = staging.to(device, non_blocking=True)
    return [
        buffer[offset : offset + array.nbytes].view(_torch_dtype(array))
        for array, offset in zip(arrays, offsets, strict=True)
    ]


def update(tensor: Tensor, array: Array) -> None:
    """Copy the array into a tensor that exists; afterwards the caller may change the array."""
    source = torch.from_numpy(array)
    if tensor.is_cuda:
        source = source.pin_memory()  # a copy, which the transfer may read later
    tensor.copy_(source, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """The tensor in host memory. From a GPU it is there only once the stream got that far."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _torch_dtype(array: Array) -> torch.dtype:
    dtypes = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}
    return dtypes[array.dtype.name]
