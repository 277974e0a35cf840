"""The engine core: requests of clients in, plans to workers, results to clients out.

It owns who asked for what; what runs next is the scheduler's, blocks are the KV cache manager's.
It knows no sockets: whoever drives it passes messages in and carries the outputs away. It reads
the clock, so that the scheduler need not.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable

from engine_core.block_hash import BlockHasher
from engine_core.client_outputs import (
    ClientOutputs,
    Outputs,
    collect_outputs,
    last_words,
    make_messages,
    refusal,
)
from engine_core.control import Control
from engine_core.flight_record import FlightRecord
from engine_core.gate import REFUSALS, Gate
from engine_core.headroom import AdapterLimit
from engine_core.intake import Intake, make_limits
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.lingering import NOBODY, Lingering
from engine_core.request import Request, RequestGroup
from engine_core.request_checks import RequestLimits
from engine_core.scheduler import Scheduler
from engine_core.stats import scheduler_stats
from engine_core.trial import Trial
from executor.executor import Executor
from ipc.config import EngineConfig
from ipc.errors import EngineError, ProtocolError
from ipc.messages import (
    AddRequest,
    EngineOutput,
    FinishReason,
    ModelRunnerOutput,
    ProcessedLogits,
    SchedulerStats,
    WorkerReady,
)
from ipc.operations import AnyOperation
from ipc.tensors import Frames

logger = logging.getLogger(__name__)


class EngineCore:
    """Owns the open requests of every client, and the parts that serve them. Not thread-safe.

    A request that is open is in ``_groups`` until all of its branches ended, or nobody is left
    to be told. No fault of a request raises: its client gets an ERROR output.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        ready: WorkerReady,
        *,
        epoch: int = 0,
        record: FlightRecord | None = None,
        hash_key: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scheduling, cache = config.scheduler_config, config.cache_config
        hasher = BlockHasher(hash_key or os.urandom(32), cache.block_size)
        kv_cache = KVCacheManager(
            cache,
            hasher,
            num_gpu_blocks=ready.num_gpu_blocks,
            num_cpu_blocks=ready.num_cpu_blocks,
            num_lookahead_slots=scheduling.num_lookahead_slots,
            max_step_tokens=scheduling.max_num_batched_tokens,
        )
        lora = config.lora_config
        adapter_limit = None if lora is None else AdapterLimit(lora.max_loras)
        self.limits = make_limits(config, kv_cache, ready)
        request_limits = RequestLimits(
            vocab_size=ready.vocab_size,
            max_model_len=self.limits.max_model_len,
            max_logprobs=config.model_config.max_logprobs,
            num_usable_blocks=kv_cache.gpu_pool.num_usable,
            block_size=cache.block_size,
        )
        self.scheduler = Scheduler(
            scheduling, kv_cache, vocab_size=ready.vocab_size, adapter_limit=adapter_limit
        )
        self.gate = Gate(self.limits)
        is_caching = cache.enable_prefix_caching
        self._intake = Intake(scheduling, hasher, request_limits, is_caching=is_caching)
        self._trial = Trial(self, record)
        self._executor = executor
        self._epoch = epoch
        self._clock = clock
        self._groups: dict[bytes, dict[str, RequestGroup]] = {}
        self._undelivered: dict[bytes, ClientOutputs] = {}  # made without a step
        self.lingering = Lingering()
        self._control = Control(self, executor)

    # ------------------------------------------------------------ messages about requests

    def add_request(self, client: bytes, request: AddRequest) -> None:
        """Admit a request, or tell its client why not."""
        groups = self._groups.setdefault(client, {})
        if request.req_id in groups:
            # Answering under this id would end the request that already has it.
            logger.warning("request id %r came twice from one client: ignored", request.req_id)
            return
        now_s, room = self._clock(), self.scheduler.lifecycle.room
        try:
            self._trial.check(request)
            self.lingering.check(request)
            self.gate.check(request, room, num_open=self.num_open, now_s=now_s)
            group = self._intake.admit(client, request, now_s=now_s, newest_place=room.newest_place)
        except REFUSALS as err:
            self._tell(client, refusal(request.req_id, err))
            return
        for branch in group.branches:
            if branch.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._tell(client, last_words(branch))  # its last output was lost on the way
        if not group.is_finished:
            groups[request.req_id] = group
            self.lingering.add(request, group)
            self._trial.add(group, request)
            self.gate.watch(group)

    def abort_requests(self, client: bytes, req_ids: Iterable[str]) -> None:
        """Forget requests; ids that are not open are passed over."""
        groups = self._groups.get(client, {})
        for req_id in req_ids:
            group = groups.pop(req_id, None)
            if group is not None:
                self.lingering.forget(group)
                self._end(group, FinishReason.ABORT)
                self._undelivered.setdefault(client, ClientOutputs())  # the state has changed

    def abort_branches(self, client: bytes, branches: Iterable[tuple[str, int]]) -> None:
        """Stop single branches silently."""
        groups = self._groups.get(client, {})
        for req_id, index in branches:
            group = groups.get(req_id)
            if group is None or not 0 <= index < len(group.branches):
                continue
            self._trial.release(group)
            self.scheduler.end(group.branches[index], FinishReason.ABORT)
            if group.is_finished:
                del groups[req_id]
                self.lingering.note_end(group, self._clock())

    def add_processed_logits(self, client: bytes, message: ProcessedLogits, frames: Frames) -> None:
        """Take a row of logits back from the user's processors; their failure is the request's."""
        group = self._groups.get(client, {}).get(message.req_id)
        if group is None or not 0 <= message.index < len(group.branches):
            return
        try:
            logits = self._intake.read_logits(message, frames)
        except ProtocolError as err:
            self.end_group(group, FinishReason.ERROR, f"logits processor: {err}")
            return
        self.scheduler.add_processed_logits(group.branches[message.index], message.position, logits)

    def remove_client(self, client: bytes) -> None:
        """Forget a client and everything it has open, but for what lingers without it."""
        now_s = self._clock()
        for group in self._groups.pop(client, {}).values():
            if self.lingering.orphan(group, now_s):
                self._groups.setdefault(NOBODY, {})[group.req_id] = group
            else:
                self._end(group, FinishReason.ABORT)
        self._undelivered.pop(client, None)

    def end_group(
        self,
        group: RequestGroup,
        reason: FinishReason,
        error: str | None = None,
        error_kind: str = "EngineGenerateError",
    ) -> None:
        """End a whole request that is open, for good, and tell its client."""
        self._groups[group.client].pop(group.req_id)
        self.lingering.forget(group)
        for branch in self._end(group, reason, error):
            self._tell(group.client, last_words(branch, error_kind))

    def abort_all(self) -> None:
        """End every open request and tell the clients."""
        for group in self._open_groups():
            self.end_group(group, FinishReason.ABORT)

    def call(self, operation: AnyOperation) -> object:
        """Run a control operation; what it returns is documented with the operation.

        Raises:
            RequestError: the operation cannot be done now, or failed in a worker.
        """
        return self._control.run(operation)

    # ------------------------------------------------------------ steps

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return sum(map(len, self._groups.values()))

    @property
    def has_unfinished(self) -> bool:
        """Whether steps are in flight or could be planned sooner or later."""
        if self.scheduler.num_steps_in_flight:
            return True
        return not self._control.is_holding and any(self._groups.values())

    def submit_steps(self) -> bool:
        """Plan and submit until enough steps are in flight for now; False when none was.

        Raises:
            EngineError: nothing moves and nothing ever will. Dying of it is better than waiting:
                a new core starts over with every open request.
        """
        now_s = self._clock()
        for group in self.lingering.expire(now_s) if len(self.lingering) else ():
            self.end_group(group, FinishReason.ABORT)
        for group, (reason, error, kind) in self.gate.take_overdue(now_s):
            self.end_group(group, reason, error, kind)
        if self._control.is_holding:
            return False
        has_submitted = False
        self._trial.advance()
        while self.scheduler.pipeline.wants_step(now_s := self._clock()):
            planned = self.scheduler.schedule(now_s)
            if planned is None:
                break
            self._trial.note_step(planned[0])
            self._executor.submit(*planned)
            has_submitted = True
        if not has_submitted and self.scheduler.is_stuck:
            raise EngineError(f"no step can be planned for {self.num_open} open requests")
        return has_submitted

    def take_output(self, output: ModelRunnerOutput, frames: Frames) -> Outputs:
        """Take in the answer to a step; what each client is told of it.

        Raises:
            ProtocolError: it is not the answer that is due.
        """
        now_s = self._clock()
        result = self.scheduler.update_from_output(output, now_s)
        told, self._undelivered = self._undelivered, {}
        collect_outputs(result, frames, told, time.time() - now_s)
        if not told and not self.scheduler.has_requests:  # the last ones were aborted: say so
            told = {client: ClientOutputs() for client in self._groups}
        for request in (*result.finished, *result.failed):
            group = request.group
            self._intake.note_output(len(request.output_token_ids))
            if group.is_finished:
                self._groups.get(group.client, {}).pop(group.req_id, None)
                self.lingering.note_end(group, now_s)
        return make_messages(told, self._epoch, result.step_id, self.stats())

    def drain_outputs(self) -> Outputs:
        """What clients are told without a step: refusals, failures, aborts."""
        if not self._undelivered:
            return []
        told, self._undelivered = self._undelivered, {}
        return make_messages(told, self._epoch, self.scheduler.num_planned_steps, self.stats())

    def step(self, timeout_s: float | None = None) -> Outputs:
        """Submit what can be, and take in one answer if one is due; the in-process way.

        Raises:
            EngineDeadError: a worker is gone.
        """
        self.submit_steps()
        outputs = self.drain_outputs()
        if self.scheduler.num_steps_in_flight:
            answer = self._executor.receive(timeout_s)
            if answer is not None:
                outputs += self.take_output(*answer)
        return outputs

    def stats(self) -> SchedulerStats:
        """The engine's state now."""
        is_idle = not self.scheduler.has_requests
        return scheduler_stats(self.scheduler, is_idle=is_idle, num_restarts=self._epoch)

    def check_invariants(self) -> None:
        """Raise AssertionError unless requests, rows and blocks add up. For tests."""
        branches = [branch for group in self._open_groups() for branch in group.branches]
        self.scheduler.lifecycle.check_invariants(branches)

    # ------------------------------------------------------------ inside

    def _open_groups(self) -> list[RequestGroup]:
        return [group for groups in self._groups.values() for group in groups.values()]

    def _end(
        self, group: RequestGroup, reason: FinishReason, error: str | None = None
    ) -> list[Request]:
        """End a group's branches, last first so that none steps up; those that were open."""
        self._trial.release(group)
        branches = reversed(group.branches)
        return [b for b in branches if self.scheduler.end(b, reason, error)]

    def _tell(self, client: bytes, output: EngineOutput) -> None:
        self._undelivered.setdefault(client, ClientOutputs()).outputs.append(output)
