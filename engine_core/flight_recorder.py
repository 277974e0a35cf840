"""An engine core that writes down what goes into it and what it decides.

It is the core, with a recording door in front of each method that changes it: what happens inside
follows from what passed the doors, so a replay needs nothing else.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from engine_core.client_outputs import Outputs
from engine_core.core import EngineCore
from engine_core.flight_record import FlightRecord
from engine_core.recording import (
    VERSION,
    Answered,
    Arrived,
    Begin,
    Called,
    Event,
    Left,
    NewName,
    Planned,
    RecordingFile,
    live_path,
)
from executor.executor import Executor
from ipc.config import EngineConfig, encode_config
from ipc.errors import ConfigError
from ipc.messages import (
    AbortBranches,
    AbortRequests,
    AddRequest,
    ModelRunnerOutput,
    ProcessedLogits,
    SchedulerOutput,
    WorkerReady,
    encoder,
)
from ipc.operations import AnyOperation
from ipc.tensors import Frames


class Tape:
    """Owns what the call under way has brought so far, and writes it down at its end."""

    def __init__(self, file: RecordingFile) -> None:
        self.file = file
        self.clocks: list[float] = []
        self.plans: list[SchedulerOutput] = []
        self.results: list[bytes] = []

    def clock(self) -> float:
        """The time, remembered."""
        now_s = time.monotonic()
        self.clocks.append(now_s)
        return now_s

    @contextmanager
    def event(self, kind: type[Event], *fields: Any) -> Iterator[None]:
        """Write the event down when the block ends, however it does."""
        error = None
        try:
            yield
        except Exception as err:
            error = f"{type(err).__name__}: {err}"
            raise
        finally:
            self.write(kind, error, *fields)

    def write(self, kind: type[Event], error: str | None, *fields: Any) -> None:
        """Append an event with the times that were read since the last one."""
        self.file.append(encoder.encode(kind(self.clocks, error, *fields)))
        self.clocks.clear()


class RecordedExecutor:
    """An executor whose plans and answers to operations are remembered on the way."""

    def __init__(self, executor: Executor, tape: Tape) -> None:
        self._executor = executor
        self._tape = tape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Pass a plan on."""
        self._tape.plans.append(plan)
        self._executor.submit(plan, frames)

    def call(self, operation: AnyOperation) -> list[Any]:
        """Pass an operation on."""
        results = self._executor.call(operation)
        self._tape.results.append(encoder.encode(results))
        return results


class RecordedCore(EngineCore):
    """An engine core, recorded into a file from its first moment."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        ready: WorkerReady,
        *,
        file: RecordingFile,
        epoch: int = 0,
        record: FlightRecord | None = None,
    ) -> None:
        self._tape = tape = Tape(file)
        key = os.urandom(32)
        file.append(encoder.encode(Begin(VERSION, encode_config(config), ready, epoch, key)))
        recorded: Any = RecordedExecutor(executor, tape)
        super().__init__(
            config, recorded, ready, epoch=epoch, record=record, hash_key=key, clock=tape.clock
        )

    def add_request(self, client: bytes, request: AddRequest) -> None:
        """As the core's."""
        with self._tape.event(Arrived, client, request):
            super().add_request(client, request)

    def abort_requests(self, client: bytes, req_ids: Iterable[str]) -> None:
        """As the core's."""
        req_ids = list(req_ids)
        with self._tape.event(Arrived, client, AbortRequests(req_ids)):
            super().abort_requests(client, req_ids)

    def abort_branches(self, client: bytes, branches: Iterable[tuple[str, int]]) -> None:
        """As the core's."""
        branches = list(branches)
        with self._tape.event(Arrived, client, AbortBranches(branches)):
            super().abort_branches(client, branches)

    def add_processed_logits(self, client: bytes, message: ProcessedLogits, frames: Frames) -> None:
        """As the core's."""
        with self._tape.event(Arrived, client, message, _sizes(frames)):
            super().add_processed_logits(client, message, frames)

    def remove_client(self, client: bytes) -> None:
        """As the core's."""
        with self._tape.event(Left, client):
            super().remove_client(client)

    def call(self, operation: AnyOperation) -> object:
        """As the core's."""
        results = self._tape.results = []
        with self._tape.event(Called, operation, results):
            return super().call(operation)

    def submit_steps(self) -> bool:
        """As the core's."""
        tape = self._tape
        error: str | None = None
        try:
            return super().submit_steps()
        except Exception as err:
            error = f"{type(err).__name__}: {err}"
            raise
        finally:
            if tape.plans or tape.clocks or error:
                tape.write(Planned, error, tape.plans, name_rows(self, tape.plans))
                tape.plans.clear()

    def take_output(self, output: ModelRunnerOutput, frames: Frames) -> Outputs:
        """As the core's."""
        error: str | None = None
        try:
            return super().take_output(output, frames)
        except Exception as err:
            error = f"{type(err).__name__}: {err}"
            raise
        finally:
            self._tape.write(Answered, error, output, _sizes(frames) if frames else [])


def name_rows(core: EngineCore, plans: list[SchedulerOutput]) -> list[list[NewName]]:
    """The requests of each plan's new rows."""
    if not any(plan.new_rows for plan in plans):
        return []
    running = core.scheduler.lifecycle.running
    by_row = {r.row: NewName(r.row, r.req_id, r.index) for r in running if r.row is not None}
    unknown = NewName(-1, "", 0)
    return [[by_row.get(new.row, unknown) for new in plan.new_rows] for plan in plans]


def _sizes(frames: Frames) -> list[int]:
    return [memoryview(frame).nbytes for frame in frames]


def make_core(
    config: EngineConfig,
    executor: Executor,
    ready: WorkerReady,
    *,
    epoch: int,
    record: FlightRecord | None = None,
) -> EngineCore:
    """A core, recorded where the config asks for it.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    directory = config.parallel_config.flight_record_dir
    if directory is None:
        return EngineCore(config, executor, ready, epoch=epoch, record=record)
    path = live_path(directory, os.getpid())
    try:
        path.unlink(missing_ok=True)
        file = RecordingFile(path, config.parallel_config.flight_recorder_mb * 2**20)
    except OSError as err:
        raise ConfigError(f"--flight-record-dir {directory}: {err.strerror}") from err
    return RecordedCore(config, executor, ready, file=file, epoch=epoch, record=record)
