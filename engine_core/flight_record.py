"""What a core was doing when it died, as the supervisor reads it afterwards: shared memory.

Before each step the core notes the step, and whose requests in it have brought no token since they
were sent to this core: if the step kills the core, these are the suspects. Memory outlives the
process, so the dead need not be trusted to say a last word. The other half of the memory is the
supervisor's, who tells the next core what it made of that.
"""

import mmap
import os
import struct
from typing import TypeVar

import msgspec

from ipc.records import Part

SIZE = 4 << 20
_HALF = SIZE // 2
_HEADER = struct.Struct("<QQ")  # step, bytes that follow
_STEP = struct.Struct("<Q")

Record = TypeVar("Record", bound=Part)


class Flight(Part, frozen=True):
    """The noted requests of a core's last step."""

    suspects: list[str] = []  # keys of requests that have brought no token yet
    alone: str | None = None  # key of the one that runs on trial
    fingerprint: str = ""  # of its content


class Verdicts(Part, frozen=True):
    """What the next core must know of the dead one's requests."""

    on_trial: list[str] = []  # keys: each is to run alone until it has brought a token
    guilty: list[str] = []  # keys: these have killed a core while they were alone
    refused: dict[str, float] = {}  # fingerprint -> time.monotonic() until which it is refused


class FlightRecord:
    """Owns the mapping of the shared memory."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, SIZE)
        self._noted = Flight()
        self.forget()

    @staticmethod
    def make_memory() -> int:
        """A descriptor of memory for records, to be handed to cores."""
        descriptor = os.memfd_create("heliograph-flight")
        os.ftruncate(descriptor, SIZE)
        return descriptor

    def note(self, step_id: int, flight: Flight | None) -> None:
        """Note a step before it runs; None: its requests are those of the step before."""
        if flight is not None and flight != self._noted:
            self._noted = flight
            self._write(0, flight)
        _STEP.pack_into(self._memory, 0, step_id)

    def read(self) -> Flight:
        """What was noted last."""
        return self._read(0, Flight)

    def forget(self) -> None:
        """Forget what was noted: a core that dies before its first step has no suspects."""
        self._noted = Flight()
        self._write(0, self._noted)

    def judge(self, verdicts: Verdicts) -> None:
        """Leave word for the next core."""
        self._write(_HALF, verdicts)

    def read_verdicts(self) -> Verdicts:
        """The word that was left for this core."""
        return self._read(_HALF, Verdicts)

    def _write(self, start: int, record: Part) -> None:
        data = msgspec.msgpack.encode(record)
        if len(data) > _HALF - _HEADER.size:
            data = msgspec.msgpack.encode(type(record)())  # too many to be told apart anyway
        _HEADER.pack_into(self._memory, start, 0, 0)
        begin = start + _HEADER.size
        self._memory[begin : begin + len(data)] = data
        _HEADER.pack_into(self._memory, start, 0, len(data))

    def _read(self, start: int, kind: type[Record]) -> Record:
        _, size = _HEADER.unpack_from(self._memory, start)
        begin = start + _HEADER.size
        data = self._memory[begin : begin + min(size, _HALF - _HEADER.size)]
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except msgspec.MsgspecError:  # nothing was written, or the core died while writing
            return kind()
