"""Moving a model's weights between the GPU and the host, for sleeping and waking."""

from itertools import chain

import torch
from torch import Tensor, nn

from executor.models.interface import CausalLM


def move_weights(model: CausalLM, device: torch.device) -> None:
    """Move every parameter and buffer; what shared memory before shares it afterwards.

    The parameters stay the same objects. On the host they are pinned when they come from a GPU,
    so that the way back runs at the link's full speed. Nothing happens when they are there.
    """
    assert isinstance(model, nn.Module)
    moved: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device == device:
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if key not in moved:
            moved[key] = _copy(tensor.data, device)
        tensor.data = moved[key]
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    is_pinned = device.type == "cpu" and tensor.device.type == "cuda"
    copy = torch.empty_like(tensor, device=device, pin_memory=is_pinned)
    return copy.copy_(tensor, non_blocking=True)
