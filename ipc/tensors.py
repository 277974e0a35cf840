"""Arrays beside a message: raw buffers in extra frames, each named by a ``TensorRef``.

This file knows no array library. A sender adds any contiguous buffer to a ``FrameWriter``; a
receiver gets a checked ``memoryview`` of bytes and gives it to numpy or torch itself.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from ipc.errors import ProtocolError
from ipc.records import TensorRef

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

Frames = Sequence[bytes | memoryview]

ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}


class FrameWriter:
    """Collects the extra frames of one message; frames are referenced, not copied."""

    def __init__(self) -> None:
        self.frames: list[bytes | memoryview] = []

    def add(self, buffer: "Buffer", dtype: str, shape: Sequence[int]) -> TensorRef:
        """Append one array as a frame.

        Args:
            buffer: C-contiguous memory that must not change until the message was sent.
            dtype: numpy's name of the item type.
            shape: the array's shape; its size must be the buffer's.
        """
        view = memoryview(buffer)
        frame = view.cast("B") if view.nbytes else memoryview(b"")
        _check_size(dtype, shape, frame.nbytes)
        self.frames.append(frame)
        return TensorRef(len(self.frames) - 1, dtype, list(shape))


def read(ref: TensorRef, frames: Frames) -> memoryview:
    """The bytes of the array that ``ref`` names, exactly as many as its shape says.

    Raises:
        ProtocolError: the frame is missing, the type unknown, or the size is another.
    """
    if not 0 <= ref.frame < len(frames):
        raise ProtocolError(f"tensor wants frame {ref.frame}, the message has {len(frames)}")
    view = memoryview(frames[ref.frame])
    _check_size(ref.dtype, ref.shape, view.nbytes)
    return view


def _check_size(dtype: str, shape: Sequence[int], num_bytes: int) -> None:
    item_size = ITEM_SIZES.get(dtype)
    if item_size is None:
        raise ProtocolError(f"unknown tensor type {dtype!r}")
    if any(extent < 0 for extent in shape):
        raise ProtocolError(f"tensor shape {list(shape)} has a negative extent")
    expected = prod(shape) * item_size
    if expected != num_bytes:
        raise ProtocolError(
            f"tensor {dtype}{list(shape)} needs {expected} bytes, its frame has {num_bytes}"
        )
