"""What a starting or ending engine tells whoever started it: JSON lines through a pipe.

The core writes to the supervisor, the supervisor to the launcher. The last line of an engine that
fails is an ``EngineFailed`` with the real cause.
"""

import contextlib
import os

import msgspec

from ipc.messages import EngineFailed, LoadProgress
from ipc.records import Message

_READ_BYTES = 65536
_MAX_REASON_CHARS = 8192  # a line must fit into the pipe


class Listening(Message, frozen=True):
    """The core is ready and frontends may connect."""

    address: str
    core_pid: int
    epoch: int


Status = LoadProgress | Listening | EngineFailed

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Status)


class StatusWriter:
    """Owns the write end of a status pipe. A reader that is gone or slow holds nobody up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)

    def write(self, status: Status) -> None:
        """Write one line; it is lost when nobody reads."""
        if isinstance(status, EngineFailed):
            status = msgspec.structs.replace(status, reason=status.reason[:_MAX_REASON_CHARS])
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, _encoder.encode(status) + b"\n")


class StatusReader:
    """Owns the read end of a status pipe and the unfinished line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self.is_at_end = False
        os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        """Readable when there is something to read, the end included."""
        return self._descriptor

    def read(self) -> list[Status]:
        """Everything written since the last call, without waiting."""
        while True:
            try:
                data = os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                self.is_at_end = True
                break
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [_decoder.decode(line) for line in lines]

    def close(self) -> None:
        """Close the pipe. Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
