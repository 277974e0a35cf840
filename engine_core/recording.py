"""What a recording of an engine core is made of, and its file.

A recording starts with a core's first moment and holds everything that went into it (messages,
answers, the times that it read) and what it decided (plans). The live file is memory-mapped, so
it outlives any death of its writer; what is saved of it is one msgpack array. Token ids are in it.
"""

import logging
import mmap
import os
from pathlib import Path

import msgspec

from ipc.errors import ConfigError
from ipc.messages import (
    AbortBranches,
    AbortRequests,
    AddRequest,
    ModelRunnerOutput,
    ProcessedLogits,
    SchedulerOutput,
    WorkerReady,
)
from ipc.operations import AnyOperation
from ipc.records import Message

VERSION = 1
MAX_KEPT = 10  # recordings in a directory
_MAGIC = b"HELIOREC"
_HEADER_BYTES = 16  # the magic word, then where the entries end
_LENGTH_BYTES = 4  # in front of each entry


logger = logging.getLogger(__name__)


class Begin(Message, frozen=True):
    """A core is made: with these it is as the recorded one was."""

    version: int
    config: bytes
    ready: WorkerReady
    epoch: int
    hash_key: bytes  # of the prefix hashes; worth nothing once the core is gone


class Event(Message, frozen=True):
    """One call into the core."""

    clocks: list[float]  # the times that it read meanwhile
    error: str | None  # what it raised


class Arrived(Event, frozen=True):
    """A message of a frontend about requests."""

    client: bytes
    message: AddRequest | AbortRequests | AbortBranches | ProcessedLogits
    frame_sizes: list[int] = []


class Left(Event, frozen=True):
    """A frontend went."""

    client: bytes


class Called(Event, frozen=True):
    """A control operation; ``results`` are what the workers said to it, msgpack each."""

    operation: AnyOperation
    results: list[bytes] = []


class NewName(Message, frozen=True):
    """Which request got a row, for readers."""

    row: int
    req_id: str
    index: int


class Planned(Event, frozen=True):
    """The core was asked for steps, and planned these."""

    plans: list[SchedulerOutput] = []
    names: list[list[NewName]] = []  # per plan, in the order of its new rows


class Answered(Event, frozen=True):
    """The workers' answer to a step came."""

    output: ModelRunnerOutput
    frame_sizes: list[int] = []


Entry = Begin | Arrived | Left | Called | Planned | Answered


class RecordingFile:
    """Owns the live file: entries behind each other, and where they end.

    The end is moved after an entry was written, so a death in between leaves a good recording.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, limit_bytes)  # sparse: costs memory as it fills
            self._map = mmap.mmap(descriptor, limit_bytes)
        finally:
            os.close(descriptor)
        self._limit_bytes = limit_bytes
        self._end = _HEADER_BYTES
        self._map[:_HEADER_BYTES] = _MAGIC + self._end.to_bytes(8, "little")
        self.is_full = False

    def append(self, entry: bytes) -> None:
        """Write an entry. From the first that does not fit, nothing is recorded any more."""
        start = self._end + _LENGTH_BYTES
        end = start + len(entry)
        if self.is_full or end > self._limit_bytes:
            self.is_full = True
            return
        self._map[self._end : start] = len(entry).to_bytes(_LENGTH_BYTES, "little")
        self._map[start:end] = entry
        self._end = end
        self._map[8:_HEADER_BYTES] = end.to_bytes(8, "little")

    def close(self) -> None:
        """Unmap the file; it stays where it is."""
        self._map.close()


def save_recording(live: Path, target: Path) -> None:
    """Make a recording out of a live file whose writer may be dead.

    Raises:
        ConfigError: it is no such file.
    """
    data = live.read_bytes()
    end = int.from_bytes(data[8:_HEADER_BYTES], "little")
    if data[:8] != _MAGIC or not _HEADER_BYTES <= end <= len(data):
        raise ConfigError(f"{live} is no recording in progress")
    entries: list[msgspec.Raw] = []
    position = _HEADER_BYTES
    while position + _LENGTH_BYTES <= end:
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(data[position:start], "little")
        if position > end:
            break
        entries.append(msgspec.Raw(data[start:position]))
    partial = target.with_name(f".{target.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.msgpack.encode(entries))
    partial.replace(target)


def read_recording(path: Path) -> list[Entry]:
    """The entries of a saved recording; whatever the file holds, it is only data.

    Raises:
        ConfigError: it is not a recording of this version.
    """
    try:
        entries = msgspec.msgpack.decode(path.read_bytes(), type=list[Entry])
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror}") from err
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as err:
        raise ConfigError(f"{path} is not a recording of this version: {err}") from err
    if not entries or not isinstance(entries[0], Begin) or entries[0].version != VERSION:
        raise ConfigError(f"{path} does not begin as a recording of version {VERSION}")
    return entries


def live_path(directory: str, pid: int) -> Path:
    """Where the core of this process records."""
    return Path(directory) / f".live-{pid}"


def settle_recording(directory: str | None, pid: int, epoch: int, *, is_clean: bool) -> Path | None:
    """Keep what a core that is gone has recorded, unless it ended well; the newest few are kept."""
    if directory is None or not (live := live_path(directory, pid)).exists():
        return None
    target = live.with_name(f"core-{pid}-epoch-{epoch}.flight")
    try:
        if is_clean:
            return None
        save_recording(live, target)
    except (OSError, ConfigError) as err:
        logger.warning("the recording of a lost core could not be kept: %s", err)
        return None
    finally:
        live.unlink(missing_ok=True)
    kept = sorted(Path(directory).glob("core-*.flight"), key=lambda path: path.stat().st_mtime)
    for path in kept[:-MAX_KEPT]:
        path.unlink(missing_ok=True)
    logger.warning("what the lost core did is recorded in %s (heliograph replay)", target)
    return target
