"""A page of shared memory that says how far an engine core has come, readable without its help.

The core writes it in passing, at each turn of its loop; the supervisor reads it. It is a mapped
file without a name, inherited as a descriptor, so nothing is left behind.
"""

import mmap
import os
import struct
import time
from enum import IntEnum
from typing import NamedTuple

_FORMAT = struct.Struct("=QdBB")  # less than a cache line: a torn read is off by one beat


class Phase(IntEnum):
    """What the core is at; each has its own limit."""

    STARTING = 0
    STEPPING = 1
    OPERATION = 2  # a control operation, which may move weights


class Progress(NamedTuple):
    """What the page says."""

    num_steps: int
    beat_s: float  # time.monotonic(), which all processes of a machine share
    phase: Phase
    has_work: bool


class ProgressPage:
    """Owns one mapping of the page."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, mmap.PAGESIZE)

    def write(self, phase: Phase, num_steps: int, has_work: bool) -> None:
        """Say where we are, now."""
        # Not pack_into, which clears its target first: a reader would see the time of 0.
        beat = _FORMAT.pack(num_steps, time.monotonic(), phase, has_work)
        self._map[: _FORMAT.size] = beat

    def read(self) -> Progress:
        """What was written last."""
        num_steps, beat_s, phase, has_work = _FORMAT.unpack_from(self._map)
        return Progress(num_steps, beat_s, Phase(phase), bool(has_work))

    def close(self) -> None:
        """Unmap the page."""
        self._map.close()


def make_page_file() -> int:
    """A descriptor of a new page, full of zeros; children inherit it where it is passed on."""
    descriptor = os.memfd_create("progress", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return descriptor
