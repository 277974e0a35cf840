"""Builders with defaults, and a client that checks what it is told."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine_core.client_outputs import Outputs
from engine_core.core import EngineCore
from engine_core.scheduler import Scheduler
from ipc.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from ipc.messages import (
    AddRequest,
    EngineOutput,
    EngineOutputs,
    FinishReason,
    LogitsRow,
    ProcessedLogits,
    SchedulerStats,
    TokenLogprobs,
)
from ipc.records import TensorRef
from ipc.sampling_params import SamplingParams
from ipc.tensors import Frames, read
from tests.engine_core.simulated_executor import (
    VOCAB_SIZE,
    SimulatedExecutor,
    UserProcessor,
    solo_run,
)

CLIENT = b"client"


@dataclass(kw_only=True)
class Setup:
    """What a test may want to differ from."""

    block_size: int = 8
    num_gpu_blocks: int = 41
    num_cpu_blocks: int = 0
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    max_model_len: int = 128
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    sliding_window: int | None = None
    max_steps_in_flight: int | None = 2
    max_waiting_requests: int | None = 1000
    max_waiting_tokens: int | None = None
    max_prefill_slowdown: float = 0.0
    plans_late: bool = False
    policy: str = "fcfs"
    preemption_mode: str | None = None
    num_lookahead_slots: int = 0
    delay_factor: float = 0.0
    growth_tokens: int | None = None  # 0: admit whoever fits now, so that preemption is common
    is_nan: Callable[..., bool] = field(default=lambda params, position: False)

    def config(self) -> EngineConfig:
        return EngineConfig(
            model_config=ModelConfig("simulated", max_model_len=self.max_model_len),
            cache_config=CacheConfig(
                block_size=self.block_size,
                enable_prefix_caching=self.enable_prefix_caching,
                sliding_window=self.sliding_window,
            ),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_num_seqs=self.max_num_seqs,
                max_model_len=self.max_model_len,
                num_lookahead_slots=self.num_lookahead_slots,
                delay_factor=self.delay_factor,
                enable_chunked_prefill=self.enable_chunked_prefill,
                policy=self.policy,
                preemption_mode=self.preemption_mode,
                max_steps_in_flight=self.max_steps_in_flight,
                max_waiting_requests=self.max_waiting_requests,
                max_waiting_tokens=self.max_waiting_tokens,
                max_prefill_slowdown=self.max_prefill_slowdown,
                plans_late=self.plans_late,
            ),
        )

    def executor(self) -> SimulatedExecutor:
        return SimulatedExecutor(
            block_size=self.block_size,
            num_gpu_blocks=self.num_gpu_blocks,
            num_cpu_blocks=self.num_cpu_blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            sliding_window=self.sliding_window,
            is_nan=self.is_nan,
        )


def make_request(req_id: str, prompt: list[int] | int = 4, **fields: Any) -> AddRequest:
    """A request; fields of AddRequest are taken as such, the others are sampling parameters."""
    message = {k: fields.pop(k) for k in list(fields) if k in AddRequest.__struct_fields__}
    fields.setdefault("seed", 7)
    fields.setdefault("max_tokens", 4)
    fields.setdefault("ignore_eos", not message.get("eos_token_ids"))
    if isinstance(prompt, int):
        prompt = [(len(req_id) + i * 7) % VOCAB_SIZE for i in range(prompt)]
    return AddRequest(req_id, prompt, SamplingParams(**fields), 0.0, **message)


@dataclass
class Branch:
    """What a client knows of one branch."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None
    first_scheduled_time_s: float | None = None


class Client:
    """Takes outputs in and refuses gaps, repetitions and tokens after the end."""

    def __init__(self) -> None:
        self.branches: dict[tuple[str, int], Branch] = {}
        self.logits_rows: list[tuple[LogitsRow, list[float]]] = []
        self.stats: SchedulerStats | None = None

    def expect(self, request: AddRequest) -> None:
        """Open a request's branches; what resumed ones had is there from the start."""
        for index in range(request.params.num_branches):
            self.branches[request.req_id, index] = Branch()
        for resumed in request.resumed:
            branch = self.branches[request.req_id, resumed.index]
            branch.token_ids.extend(resumed.token_ids)

    def take(self, message: EngineOutputs, frames: Frames) -> None:
        self.stats = message.stats or self.stats
        for output in message.outputs:
            self._take_output(output)
        for row in message.logits_rows:
            self.logits_rows.append((row, read(row.logits, frames).cast("f").tolist()))

    def _take_output(self, output: EngineOutput) -> None:
        branch = self.branches[output.req_id, output.index]
        assert branch.finish_reason is None, f"{output.req_id} goes on after its end"
        assert output.first_index == len(branch.token_ids), f"{output.req_id} has a gap"
        assert (output.error is None) == (output.finish_reason is not FinishReason.ERROR)
        branch.token_ids.extend(output.new_token_ids)
        branch.finish_reason, branch.stop_reason = output.finish_reason, output.stop_reason
        branch.error = output.error
        branch.logprobs.extend(output.logprobs or ())
        if output.prompt_logprobs is not None:
            assert branch.prompt_logprobs is None, "prompt log-probabilities came twice"
            branch.prompt_logprobs = output.prompt_logprobs
        if output.first_scheduled_time_s is not None:
            assert branch.first_scheduled_time_s is None
            branch.first_scheduled_time_s = output.first_scheduled_time_s
            branch.num_cached_tokens = output.num_cached_tokens


class Rig:
    """A core over a simulated executor, with a checking client."""

    def __init__(self, setup: Setup | None = None, **differences: Any) -> None:
        self.setup = setup or Setup(**differences)
        self.executor = self.setup.executor()
        self.core = EngineCore(self.setup.config(), self.executor, self.executor.ready)
        if self.setup.growth_tokens is not None:
            self._replace_scheduler(self.setup.growth_tokens)
        self.client = Client()
        self.requests: dict[str, AddRequest] = {}

    def _replace_scheduler(self, growth_tokens: int) -> None:
        self.core.scheduler = Scheduler(
            self.setup.config().scheduler_config,
            self.core.scheduler.kv_cache,
            vocab_size=VOCAB_SIZE,
            growth_tokens=growth_tokens,
        )

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def gpu_pool(self) -> Any:
        return self.core.scheduler.kv_cache.gpu_pool

    def add(self, request: AddRequest) -> None:
        self.requests[request.req_id] = request
        self.client.expect(request)
        self.core.add_request(CLIENT, request)

    def step(self) -> None:
        """One turn of the loop, all invariants checked after it."""
        self.deliver(self.core.step())
        self.core.check_invariants()

    def deliver(self, outputs: Outputs) -> None:
        for peer, message, frames in outputs:
            assert peer == CLIENT
            self.client.take(message, frames)

    def answer_logits(self, process: UserProcessor) -> None:
        """Give every row of logits that waits back to the core."""
        rows, self.client.logits_rows = self.client.logits_rows, []
        for row, logits in rows:
            ref = TensorRef(0, "float32", [VOCAB_SIZE])
            answer = ProcessedLogits(row.req_id, row.index, row.position, ref)
            frame = memoryview(array("f", process(logits))).cast("B")
            self.core.add_processed_logits(CLIENT, answer, [frame])

    def run(self, process: UserProcessor | None = None, max_steps: int = 5000) -> None:
        """Step until nothing is open."""
        for _ in range(max_steps):
            if not self.core.has_unfinished:
                self.deliver(self.core.drain_outputs())
                self.check_idle()
                return
            self.step()
            if process is not None:
                self.answer_logits(process)
        raise AssertionError(f"still busy after {max_steps} steps")

    def check_idle(self) -> None:
        """Nothing is held by anybody."""
        assert self.core.stats().num_leaked_blocks == 0
        assert self.gpu_pool.num_held == 0
        assert self.scheduler.kv_cache.cpu_pool.num_held == 0
        assert self.scheduler.lifecycle.rows.num_free == self.setup.max_num_seqs

    def branch(self, req_id: str, index: int = 0) -> Branch:
        return self.client.branches[req_id, index]

    def check_solo(self, req_id: str, process: UserProcessor | None = None) -> None:
        """Every branch of a finished request has what a solo run gives."""
        request = self.requests[req_id]
        for index in range(request.params.num_branches):
            expected = solo_run(request, index, self.core.limits.max_model_len, process)
            branch = self.branch(req_id, index)
            assert branch.token_ids == expected.token_ids, f"{req_id}/{index}"
            assert branch.finish_reason == expected.finish_reason
            assert branch.stop_reason == expected.stop_reason
