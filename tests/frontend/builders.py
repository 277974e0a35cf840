"""Builders for tests of the frontend: a byte tokenizer, and cores that play from a script."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from frontend.inputs import AdmittedRequest, InputProcessor, NewRequest
from frontend.output_processor import OutputProcessor
from frontend.request_state import RequestState
from frontend.tokenizer import FastTokenizer
from frontend.tokenizer_config import TokenizerConfig
from ipc.config import EngineConfig, ModelConfig
from ipc.errors import EngineDeadError, EngineRestartingError
from ipc.messages import (
    PROTOCOL_VERSION,
    AbortBranches,
    AbortRequests,
    AddRequest,
    CoreToFrontend,
    EngineOutput,
    EngineOutputs,
    FinishReason,
    FrontendToCore,
    Limits,
    SchedulerStats,
    Welcome,
)
from ipc.operations import AnyOperation
from ipc.sampling_params import SamplingParams
from ipc.tensors import Frames

TINY = Path(__file__).resolve().parents[2] / "scripts" / "demo_models" / "tiny"
EOS = 256  # the byte tokenizer's end-of-text id; below it, an id is the value of a byte
VOCAB_SIZE = 260


def make_tokenizer() -> FastTokenizer:
    """One token per byte: ids are byte values."""
    alphabet = _byte_alphabet()
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    eos = AddedToken("<eos>", special=True, normalized=False)
    return FastTokenizer(backend, TokenizerConfig(named_tokens={"eos_token": eos}))


def make_limits(**overrides: int) -> Limits:
    """Roomy limits with a context of 1000 tokens."""
    values = {
        "max_model_len": 1000,
        "max_num_seqs": 8,
        "block_size": 16,
        "num_gpu_blocks": 100,
        "num_cpu_blocks": 0,
        "vocab_size": VOCAB_SIZE,
        "max_waiting_requests": 32,
        "credits": 16,
    }
    return Limits(**(values | overrides))


def make_config(**model_fields: Any) -> EngineConfig:
    """A config that needs no files."""
    fields = {"model": "bytes", "max_model_len": 1000, "hf_config": {"eos_token_id": EOS}}
    return EngineConfig(model_config=ModelConfig(**(fields | model_fields)))


def make_inputs(
    limits: Limits | None = None, *, tokenizer: bool = True, **model_fields: Any
) -> InputProcessor:
    """An input processor for the byte tokenizer."""
    config = make_config(**model_fields).model_config
    return InputProcessor(config, limits or make_limits(), make_tokenizer() if tokenizer else None)


def make_request(request_id: str = "a", prompt: Any = "hi", **params: Any) -> NewRequest:
    """A request with a token limit of 100."""
    return NewRequest(request_id, prompt, SamplingParams(**({"max_tokens": 100} | params)))


@dataclass
class ProcessorRig:
    """An output processor with the input processor that feeds it."""

    inputs: InputProcessor
    outputs: OutputProcessor
    now_s: float = 100.0

    def open(self, request_id: str = "a", prompt: Any = "hi", **params: Any) -> RequestState:
        """Admit and open a request."""
        return self.outputs.open(self.admit(request_id, prompt, **params), epoch=0)

    def admit(self, request_id: str = "a", prompt: Any = "hi", **params: Any) -> AdmittedRequest:
        """Admit a request."""
        new = make_request(request_id, prompt, **params)
        new.arrival_time = 90.0
        return self.inputs.admit(new)

    def feed(self, *outputs: EngineOutput, epoch: int = 0, **fields: Any) -> Any:
        """One message of these outputs; what came of it."""
        message = EngineOutputs(epoch, 0, list(outputs), **fields)
        self.now_s += 1.0
        return self.outputs.process(message, (), self.now_s)

    def say(self, state: RequestState, text: str | bytes | list[int], **fields: Any) -> Any:
        """The engine says a text on branch 0, all in one step."""
        ids = list(text.encode()) if isinstance(text, str) else list(text)
        first_index = len(state.branches[fields.get("index", 0)].record.token_ids)
        return self.feed(make_output(state.req_id, first_index, ids, **fields))


def make_rig(*, tokenizer: bool = True, log_stats: bool = False) -> ProcessorRig:
    """A rig on the byte tokenizer."""
    inputs = make_inputs(tokenizer=tokenizer)
    return ProcessorRig(inputs, OutputProcessor(inputs.tokenizer, log_stats=log_stats))


def make_output(
    req_id: str, first_index: int, ids: list[int], *, index: int = 0, **fields: Any
) -> EngineOutput:
    """What one branch gained."""
    return EngineOutput(req_id, index, first_index, ids, **fields)


Script = Callable[[AddRequest, int], Iterable[int]]  # (request, branch) -> its tokens


def always(text: str) -> Script:
    """Every branch says this text, then ends."""
    return lambda request, index: [*text.encode(), EOS]


@dataclass
class FakeCore:
    """A core that plays tokens from a script, one per branch and step. Checks what it is told."""

    script: Script
    limits: Limits = field(default_factory=make_limits)
    epoch: int = 0
    sent: list[FrontendToCore] = field(default_factory=list)  # all that the frontend said
    calls: list[AnyOperation] = field(default_factory=list)
    results: dict[type, Any] = field(default_factory=dict)  # of control operations
    max_seen: int = 0  # most requests held at a time
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.requests: dict[str, AddRequest] = {}
        self._branches: dict[tuple[str, int], tuple[Iterator[int], int]] = {}

    @property
    def welcome(self) -> Welcome:
        return Welcome(PROTOCOL_VERSION, "", self.epoch, "digest", self.limits, b"")

    @property
    def has_unfinished(self) -> bool:
        return bool(self._branches)

    def take_in(self, message: FrontendToCore) -> None:
        """Something the frontend says."""
        self.sent.append(message)
        match message:
            case AddRequest():
                assert message.req_id not in self.requests
                self.requests[message.req_id] = message
                for index in range(message.params.num_branches):
                    tokens = iter(self.script(message, index))
                    self._branches[message.req_id, index] = tokens, 0
            case AbortRequests():
                for req_id in message.req_ids:
                    self._forget(req_id)
            case AbortBranches():
                for req_id, index in message.branches:
                    self._branches.pop((req_id, index), None)
        self.max_seen = max(self.max_seen, len({req_id for req_id, _ in self._branches}))

    def step(self) -> EngineOutputs:
        """Every branch gains a token."""
        self.num_steps += 1
        outputs = [self._advance(req_id, index) for req_id, index in tuple(self._branches)]
        stats = SchedulerStats(num_running=len(outputs), num_steps=self.num_steps)
        return EngineOutputs(self.epoch, self.num_steps, outputs, stats=stats)

    def call(self, operation: AnyOperation) -> Any:
        """A control operation."""
        self.calls.append(operation)
        return self.results.get(type(operation))

    def _advance(self, req_id: str, index: int) -> EngineOutput:
        tokens, position = self._branches[req_id, index]
        request = self.requests[req_id]
        token = next(tokens)
        self._branches[req_id, index] = tokens, position + 1
        reason = stop_reason = None
        if token in request.eos_token_ids and not request.params.ignore_eos:
            reason = FinishReason.STOP
        elif token in (request.params.stop_token_ids or ()):
            reason, stop_reason = FinishReason.STOP, token
        elif position + 1 == request.params.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            del self._branches[req_id, index]
        return EngineOutput(req_id, index, position, [token], reason, stop_reason)

    def _forget(self, req_id: str) -> None:
        for key in [key for key in self._branches if key[0] == req_id]:
            del self._branches[key]


class FakeClient:
    """A synchronous client of a fake core: a step per ``receive``."""

    def __init__(self, core: FakeCore) -> None:
        self.core = core
        self.dies_at_step: int | None = None
        self.is_closed = False

    @property
    def welcome(self) -> Welcome:
        return self.core.welcome

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        assert not self.is_closed
        self.core.take_in(message)

    def receive(self, timeout_s: float | None) -> tuple[CoreToFrontend, Frames] | None:
        if self.core.num_steps == self.dies_at_step:
            raise EngineDeadError("worker 0 was killed by SIGKILL")
        return (self.core.step(), ()) if self.core.has_unfinished else None

    def call(self, operation: AnyOperation) -> Any:
        return self.core.call(operation)

    def close(self) -> None:
        self.is_closed = True


class FakeAsyncClient:
    """An asynchronous client of a fake core: a step whenever the loop has nothing else to do."""

    def __init__(self, core: FakeCore) -> None:
        self.core = core
        self.restarting: EngineRestartingError | None = None
        self.is_closed = False
        self.is_held = False  # True: no steps
        self._is_due = False

    @property
    def welcome(self) -> Welcome:
        return self.core.welcome

    def start(
        self,
        on_message: Callable[[CoreToFrontend, Frames], None],
        on_dead: Callable[[EngineDeadError], None],
    ) -> None:
        self.on_message, self.on_dead = on_message, on_dead

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        assert not self.is_closed
        self.core.take_in(message)
        self.pump()

    async def call(self, operation: AnyOperation) -> Any:
        return self.core.call(operation)

    def close(self) -> None:
        self.is_closed = True

    def pump(self) -> None:
        """Step soon, as long as there is something to do."""
        if not self._is_due and not self.is_held:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._is_due = False
        if self.core.has_unfinished and not self.is_held and not self.is_closed:
            self.on_message(self.core.step(), ())
            self.pump()


def _byte_alphabet() -> list[str]:
    """The printable stand-in of each byte, in the order of bytes, as byte-level BPE defines it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
