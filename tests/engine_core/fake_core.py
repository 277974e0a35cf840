"""A core without a scheduler, with the methods that ``CoreServer`` uses.

Each request gets one token a step, as many as it asked for; token i of a request is i.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ipc.config import EngineConfig, ModelConfig
from ipc.errors import RequestError
from ipc.messages import (
    AbortBranches,
    AddRequest,
    EngineOutput,
    EngineOutputs,
    FinishReason,
    Limits,
    ModelRunnerOutput,
    ProcessedLogits,
    SchedulerOutput,
    SchedulerStats,
)
from ipc.operations import AnyOperation, GetStats, IsPaused, ResetPrefixCache, Sleep
from ipc.tensors import Frames, read

Results = list[tuple[bytes, EngineOutputs, Frames]]


def make_limits(credits: int = 64) -> Limits:
    """Limits with round numbers."""
    return Limits(
        max_model_len=2048,
        max_num_seqs=256,
        block_size=16,
        num_gpu_blocks=1024,
        num_cpu_blocks=0,
        vocab_size=8192,
        max_waiting_requests=1024,
        credits=credits,
    )


def make_config(**parallel: Any) -> EngineConfig:
    """A config that no model stands behind."""
    from ipc.config import ParallelConfig

    model = ModelConfig(
        model="scripted",
        model_path="/nonexistent",
        dtype="float32",
        max_model_len=2048,
        hf_config={"vocab_size": 8192, "eos_token_id": None},
    )
    return EngineConfig(model_config=model, parallel_config=ParallelConfig(**parallel))


class FakeExecutor:
    """Answers the fake core's empty plans."""

    def __init__(self) -> None:
        self.num_submitted = 0
        self.channels: list[Any] = []

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """One answer per submitted step."""
        if self.num_submitted == 0:
            return None
        self.num_submitted -= 1
        return ModelRunnerOutput(0, []), []

    def submit(self, plan: SchedulerOutput) -> None:
        """Note that a step is owed."""
        self.num_submitted += 1


@dataclass
class FakeGate:
    """Open until the core drains; requests have no deadlines."""

    is_draining: bool = False
    next_deadline_s: float | None = None


class FakeCore:
    """Owns the open requests of every client: (client, request) with tokens given so far."""

    def __init__(self, executor: FakeExecutor) -> None:
        self.executor = executor
        self.open: dict[tuple[bytes, str], list[int]] = {}  # given, wanted
        self.removed_clients: list[bytes] = []
        self.aborted: list[tuple[bytes, str]] = []
        self.processed_logits: list[bytes] = []
        self.gate = FakeGate()
        self.num_tries = 0
        self.has_nothing_to_plan = False
        self.planned_s: float | None = None  # when the step of ``pipeline.plan_due_s`` was
        self._step_id = 0
        self.pipeline = SimpleNamespace(plan_due_s=None)
        # The counter is checked by nobody.
        self.scheduler = SimpleNamespace(num_planned_steps=0, pipeline=self.pipeline)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request is open."""
        return bool(self.open)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self.open)

    def abort_all(self) -> None:
        """End every open request."""
        self.aborted += list(self.open)
        self.open.clear()

    def add_request(self, client: bytes, request: AddRequest) -> None:
        """Open a request."""
        self.open[client, request.req_id] = [0, request.params.max_tokens or 1]

    def abort_requests(self, client: bytes, req_ids: Sequence[str]) -> None:
        """Forget requests."""
        for req_id in req_ids:
            self.open.pop((client, req_id), None)

    def abort_branches(self, client: bytes, branches: AbortBranches) -> None:
        """Requests have one branch here."""

    def add_processed_logits(self, client: bytes, message: ProcessedLogits, frames: Frames) -> None:
        """Keep the bytes."""
        assert message.logits is not None
        self.processed_logits.append(bytes(read(message.logits, frames)))

    def remove_client(self, client: bytes) -> None:
        """Forget a client's requests."""
        self.removed_clients.append(client)
        for key in [key for key in self.open if key[0] == client]:
            del self.open[key]

    def call(self, operation: AnyOperation) -> Any:
        """One operation per kind of answer."""
        match operation:
            case GetStats():
                return SchedulerStats(num_running=len(self.open), num_steps=self._step_id)
            case Sleep():
                raise RequestError("this core cannot sleep")
            case ResetPrefixCache():
                raise ZeroDivisionError("a bug in an operation")
            case IsPaused():
                return False
        return None

    def submit_steps(self) -> bool:
        """Submit a step if a request is open and none is in flight."""
        self.num_tries += 1
        due_s = None if self.has_nothing_to_plan else self.pipeline.plan_due_s
        if due_s is not None and time.monotonic() >= due_s:
            self.pipeline.plan_due_s = None
            self.planned_s = time.monotonic()
        if not self.open or self.executor.num_submitted:
            return False
        self.executor.submit(SchedulerOutput(0, [], []))
        return True

    def take_output(self, output: ModelRunnerOutput, frames: Frames) -> Results:
        """One token for each request."""
        self._step_id += 1
        outputs: dict[bytes, list[EngineOutput]] = {}
        for (client, req_id), state in list(self.open.items()):
            given, wanted = state
            state[0] += 1
            is_last = given + 1 == wanted
            if is_last:
                del self.open[client, req_id]
            outputs.setdefault(client, []).append(
                EngineOutput(req_id, 0, given, [given], FinishReason.LENGTH if is_last else None)
            )
        return [
            (client, EngineOutputs(0, self._step_id, moved), [])
            for client, moved in outputs.items()
        ]

    def drain_outputs(self) -> Results:
        """What was aborted is told."""
        aborted, self.aborted = self.aborted, []
        return [
            (
                client,
                EngineOutputs(
                    0, self._step_id, [EngineOutput(req_id, 0, 0, [], FinishReason.ABORT)]
                ),
                [],
            )
            for client, req_id in aborted
        ]
