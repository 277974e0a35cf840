"""What messages are made of: the bases of their structs, and the reference to an array beside."""

import msgspec


class Part(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Base of structs nested in a message. ``gc=False`` is safe: a message is a tree."""


class Message(Part, frozen=True, tag=True):
    """Base of top-level messages: the class name travels as the tag, so unions decode."""


class TensorRef(Part, frozen=True):
    """An array in an extra frame of the same multipart message; row-major, native byte order."""

    frame: int  # index among the extra frames
    dtype: str  # numpy's name: "float32", "int32", ...
    shape: list[int]
