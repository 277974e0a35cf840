"""From a client's message to the branches that the scheduler runs."""

import logging

from engine_core.block_hash import BlockHasher, ExtraKeys
from engine_core.fair_share import FairShare
from engine_core.gate import deadline_of
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import RequestGroup, make_branch
from engine_core.request_checks import RequestLimits, check_request
from engine_core.row_params import make_row_params
from engine_core.stop_checker import check_stop
from ipc.config import EngineConfig, SchedulerConfig
from ipc.errors import ProtocolError
from ipc.messages import AddRequest, FinishReason, Limits, ProcessedLogits, WorkerReady
from ipc.tensors import Frames, read

CREDITS = 128  # EngineOutputs that a frontend may leave unacknowledged
TOKENS_PER_WAITING_REQUEST = 1024  # by default; so the bound bites where prompts are long

logger = logging.getLogger(__name__)


class Intake:
    """Owns the order of arrival and what a request may ask."""

    def __init__(
        self,
        config: SchedulerConfig,
        hasher: BlockHasher,
        request_limits: RequestLimits,
        *,
        is_caching: bool,
    ) -> None:
        self._is_by_priority = config.policy == "priority"
        self._hasher = hasher
        self._is_caching = is_caching
        self._limits = request_limits
        self._num_arrived = 0
        self._fair_share = FairShare()

    def admit(
        self, client: bytes, request: AddRequest, *, now_s: float, newest_place: int
    ) -> RequestGroup:
        """Check a request and build its branches; those that a former epoch ended have finished.

        Args:
            newest_place: the largest leading part of ``Request.order`` that has begun.

        Raises:
            RequestError: it cannot be served; says what to change.
        """
        check_request(request, self._limits)
        extra = ExtraKeys(
            adapter_id=None if request.lora is None else request.lora.adapter_id,
            cache_salt=request.cache_salt,
        )
        group = RequestGroup(
            client=client,
            req_id=request.req_id,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            eos_token_ids=frozenset(request.eos_token_ids),
            arrival_s=now_s,
            root_hash=self._hasher.root(extra),
            adapter_id=extra.adapter_id,
            deadline_s=deadline_of(request, now_s),
        )
        if self._is_caching:  # now: when its step is planned, the device waits
            ids = request.prompt_token_ids
            group.prompt_hashes = self._hasher.extend(group.root_hash, ids)
        self._num_arrived += 1
        max_output_tokens = self._limits.max_model_len - len(request.prompt_token_ids)
        if request.params.max_tokens is not None:
            max_output_tokens = min(max_output_tokens, request.params.max_tokens)
        place = request.priority
        if not self._is_by_priority:
            place = self._fair_share.place(
                request.tenant,
                request.tenant_weight,
                num_prompt_tokens=len(request.prompt_token_ids),
                max_output_tokens=max_output_tokens * request.params.num_branches,
                newest_place=newest_place,
            )
        for index in range(request.params.num_branches):
            make_branch(
                group,
                index,
                make_row_params(request, index, self._limits.vocab_size),
                order=(place, self._num_arrived, index),
                max_output_tokens=max_output_tokens,
            )
        for resumed in request.resumed:
            branch = group.branches[resumed.index]
            branch.output_token_ids.extend(resumed.token_ids)
            if resumed.is_finished:
                branch.finish(FinishReason.ABORT)
            elif resumed.token_ids and (stop := check_stop(branch)) is not None:
                branch.finish(stop[0], stop[1])
        return group

    def note_output(self, num_tokens: int) -> None:
        """Learn from a branch that ended how long outputs are."""
        self._fair_share.note_output(num_tokens)

    def read_logits(self, message: ProcessedLogits, frames: Frames) -> memoryview:
        """The row that the user's processors gave back.

        Raises:
            ProtocolError: they failed, or it is not a row of logits.
        """
        if message.error is not None or message.logits is None:
            raise ProtocolError(message.error or "gave no logits")
        ref, vocab_size = message.logits, self._limits.vocab_size
        if ref.dtype != "float32" or list(ref.shape) != [vocab_size]:
            raise ProtocolError(
                f"wants float32[{vocab_size}] back, got {ref.dtype}{list(ref.shape)}"
            )
        return read(ref, frames)


def make_limits(config: EngineConfig, kv_cache: KVCacheManager, ready: WorkerReady) -> Limits:
    """What this core can serve. A cache too small for the longest request lowers the limit."""
    scheduling = config.scheduler_config
    wanted = config.model_config.resolved_max_model_len
    max_model_len = kv_cache.max_tokens_that_fit(wanted)
    if max_model_len < wanted:
        logger.warning(
            "max_model_len is lowered from %d to %d: the KV cache has %d blocks of %d tokens",
            wanted,
            max_model_len,
            kv_cache.gpu_pool.num_usable,
            kv_cache.block_size,
        )
    max_waiting, max_tokens = scheduling.max_waiting_requests, scheduling.max_waiting_tokens
    if max_waiting is None:
        max_waiting = 4 * scheduling.max_num_seqs
    if max_tokens is None:
        max_tokens = TOKENS_PER_WAITING_REQUEST * max(max_waiting, scheduling.max_num_seqs)
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=scheduling.max_num_seqs,
        block_size=kv_cache.block_size,
        num_gpu_blocks=ready.num_gpu_blocks,
        num_cpu_blocks=ready.num_cpu_blocks,
        vocab_size=ready.vocab_size,
        max_waiting_requests=max_waiting,
        credits=CREDITS,
        max_waiting_tokens=max_tokens,
    )
