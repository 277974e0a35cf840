"""Every message that crosses a process boundary, and nothing else.

Messages are plain data: no tensors, no pickles, no methods that act. They travel as positional
arrays, so fields are only ever appended, always with a default. Big arrays travel beside the
message as extra frames, named by a ``TensorRef``.

Wires (design: two ROUTER/DEALER pairs, both ends of each typed by a union below):
    frontend -> core   FrontendToCore        core -> frontend   CoreToFrontend
    core -> worker     CoreToWorker          worker -> core     WorkerToCore
"""

import hashlib
from enum import IntEnum
from functools import cache

import msgspec
from msgspec.inspect import multi_type_info

from ipc.operations import AnyOperation
from ipc.records import Message, Part, TensorRef
from ipc.sampling_params import SamplingParams

PROTOCOL_VERSION = 1


class FinishReason(IntEnum):
    """Why a request ended."""

    STOP = 0  # end-of-text token, stop token or stop string
    LENGTH = 1  # max_tokens or max_model_len
    ABORT = 2  # the client's wish, or its disappearance
    ERROR = 3  # the request failed alone; EngineOutput.error says why


class Limits(Part, frozen=True):
    """What the core can serve; every frontend learns it from ``Welcome``."""

    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_gpu_blocks: int
    num_cpu_blocks: int
    vocab_size: int
    max_waiting_requests: int  # more than these: refused with EngineOverloadedError
    credits: int  # EngineOutputs that may be unacknowledged before the core coalesces


class Hello(Message, frozen=True):
    """First message of a frontend, and again after a ``Goodbye`` or a new epoch."""

    protocol_version: int
    schema_hash: str
    name: str  # for logs
    pid: int


class Welcome(Message, frozen=True):
    """The core accepts a frontend."""

    protocol_version: int
    schema_hash: str
    epoch: int  # raised at each restart of the core; stamps every output
    model_digest: str
    limits: Limits
    config: bytes  # the effective EngineConfig, msgpack
    core_pid: int = 0
    supervisor_pid: int = 0  # of who starts another core when this one is lost; 0: nobody does


class Refused(Message, frozen=True):
    """The core does not accept a frontend; ``reason`` holds both sides' values."""

    reason: str


# ---------------------------------------------------------------- frontend -> core


class LoRASpec(Part, frozen=True):
    """An adapter, as the wire names it."""

    name: str
    adapter_id: int
    path: str
    long_lora_max_len: int | None = None


class ResumedBranch(Part, frozen=True):
    """Output of a branch that a former epoch already produced; counts as output, not prompt."""

    index: int
    token_ids: list[int]
    is_finished: bool = False


class Linger(Part, frozen=True):
    """A stream that may be taken up again when its reader, or its frontend, was lost."""

    stream_id: str  # nobody can guess it: who knows it may take the stream up
    seconds: float  # how long it waits for that, running or finished
    presentation: bytes = b""  # the frontend's own: how the stream's events look


class AddRequest(Message, frozen=True):
    """Admit one tokenised request. All branches (``params.num_branches``) run in the core."""

    req_id: str  # unique among this frontend's requests in flight
    prompt_token_ids: list[int]  # never empty; already checked against max_model_len
    params: SamplingParams  # ``seed`` is always set; ``logits_processors`` never
    arrival_time_s: float  # time.time() in the frontend: a wall clock
    eos_token_ids: list[int] = []  # stop unless params.ignore_eos
    priority: int = 0  # lower runs earlier; used by the priority policy
    lora: LoRASpec | None = None
    cache_salt: str | None = None  # only requests with the same salt share cached prefixes
    bad_words_token_ids: list[list[int]] = []  # params.bad_words, tokenised
    has_logits_processors: bool = False  # each row of logits visits the frontend
    resumed: list[ResumedBranch] = []
    num_attempts: int = 1  # times it was sent; above 1 it was admitted before: never refuse a queue
    linger: Linger | None = None


class AbortRequests(Message, frozen=True):
    """Forget these requests. Unknown ids are no error: they may just have finished."""

    req_ids: list[str]


class AbortBranches(Message, frozen=True):
    """Stop single branches, as a stop string found by the frontend asks.

    The core frees them silently: the frontend already knows how they ended.
    """

    branches: list[tuple[str, int]]  # (req_id, index)


class ProcessedLogits(Message, frozen=True):
    """Answer to ``LogitsRow``: what the user's logits processors made of it."""

    req_id: str
    index: int
    position: int  # echoed from LogitsRow
    logits: TensorRef | None  # [V] float32; None when a processor failed
    error: str | None = None  # set exactly when logits is None


class Ack(Message, frozen=True):
    """Gives back credits: this many more EngineOutputs have been taken in."""

    num_outputs: int


class Heartbeat(Message, frozen=True):
    """Either way, when nothing else was said for a while."""

    sent_at_s: float  # time.monotonic() of the sender, echoed in answers


class Goodbye(Message, frozen=True):
    """A frontend leaves in good order: abort what it has open."""


class Call(Message, frozen=True):
    """A control operation. Answered by exactly one CallResult with the same ``call_id``."""

    call_id: int
    operation: AnyOperation


class CallResult(Message, frozen=True):
    """The answer to a Call. ``result`` is msgpack of the type the operation documents."""

    call_id: int
    result: bytes | None = None
    error: str | None = None  # set exactly when the operation failed
    error_kind: str = "EngineError"  # class of ipc.errors to raise for ``error``


# ---------------------------------------------------------------- core -> frontend


class TokenLogprobs(Part, frozen=True):
    """Log-probabilities at one position: the chosen token first, then the most likely ones.

    The chosen token is repeated among the top ones when it is one of them.
    """

    token_ids: list[int]  # [1 + k]
    logprobs: list[float]  # [1 + k]
    rank: int  # of the chosen token, 1 is the most likely


class EngineOutput(Part, frozen=True):
    """What one branch of one request gained in one step."""

    req_id: str
    index: int  # the branch, 0 <= index < num_branches
    first_index: int  # position of new_token_ids[0] among the branch's output tokens
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None  # None: more will follow
    stop_reason: int | None = None  # the stop token that ended it; None for EOS and the rest
    logprobs: list[TokenLogprobs] | None = None  # one per new token, when asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # prompt positions 1.., once, in order
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; on the first output
    first_scheduled_time_s: float | None = None  # time.time(); on the first output
    error: str | None = None  # set exactly when finish_reason is ERROR
    error_kind: str = "EngineGenerateError"  # class of ipc.errors to raise for ``error``


class ReclaimedRequest(Part, frozen=True):
    """What it takes to go on with a stream elsewhere; the core itself has let go of it."""

    request: AddRequest  # as it was admitted
    branches: list[EngineOutput]  # one each, all that it has brought so far


class LogitsRow(Part, frozen=True):
    """A row of raw logits that must visit the user's logits processors before sampling."""

    req_id: str
    index: int
    position: int  # index of the token to be sampled, prompt included
    logits: TensorRef  # [V] float32


class SchedulerStats(Part, frozen=True):
    """The engine's state after a step. Counters run from the start of the core."""

    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_gpu_blocks: int = 0
    num_free_gpu_blocks: int = 0
    num_cpu_blocks: int = 0
    num_free_cpu_blocks: int = 0
    num_cached_blocks: int = 0  # free blocks that still remember a prefix
    num_preemptions: int = 0  # counter
    prompt_tokens: int = 0  # counter: prompt tokens computed, cached ones excluded
    generation_tokens: int = 0  # counter
    prefix_cache_queries: int = 0  # counter: prompt tokens looked up
    prefix_cache_hits: int = 0  # counter: prompt tokens found
    num_steps: int = 0  # counter
    num_leaked_blocks: int = 0  # from the self-check of an idle core: always 0
    step_num_tokens: int = 0  # tokens of the latest step
    num_restarts: int = 0  # counter, from the start of the engine: cores that were lost


class EngineOutputs(Message, frozen=True):
    """One step's results for one frontend: every branch of its requests that moved."""

    epoch: int
    step_id: int
    outputs: list[EngineOutput]
    logits_rows: list[LogitsRow] = []
    stats: SchedulerStats | None = None


class EngineFailed(Message, frozen=True):
    """The core ends: every open request of this epoch is lost to it. The last words."""

    epoch: int
    reason: str
    exit_code: int
    killed_by: int = 0  # the signal that ended a worker, if one was the cause and was not ours


# ---------------------------------------------------------------- core -> workers


class RowParams(Part, frozen=True):
    """What a worker must know to sample one row; a digest of SamplingParams."""

    seed: int  # 64 bits, already derived for the branch
    temperature: float  # 0.0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0  # while fewer are output, stop_token_ids cannot be sampled
    stop_token_ids: list[int] = []  # end-of-text ids included unless ignored
    num_logprobs: int | None = None  # None: none; 0: the chosen token only; -1: all
    num_prompt_logprobs: int | None = None
    logit_bias: list[tuple[int, float]] = []
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] = []
    has_logits_processors: bool = False  # logits leave by LogitsRow; sampled later (SampleRow)


class NewRow(Part, frozen=True):
    """A request (branch) enters a worker's row, new or resumed."""

    row: int  # 0 <= row < max_num_seqs; free, or freed by ``freed_rows`` of this very plan
    token_ids: list[int]  # prompt, then the output known so far
    num_prompt_tokens: int
    num_computed_tokens: int  # these are in the cache already
    block_ids: list[int]  # all blocks, those of this step included
    params: RowParams
    num_prompt_logprobs_sent: int = 0  # prompt positions already reported before a preemption


class SampleRow(Part, frozen=True):
    """Sample a row from logits that came back from the user's processors; no forward."""

    row: int
    logits: TensorRef  # [V] float32


class SchedulerOutput(Message, frozen=True):
    """One step's plan, the same bytes for every rank: a difference to what the workers hold.

    Order of work: freed_rows, swap_out, swap_in, block_copies, new_rows, new_block_ids, forward
    of ``rows``, sampling. A scheduled row samples exactly when this step computes its last known
    token: ``num_computed_tokens + num_new_tokens == num_tokens``, which the worker tracks, as
    each sampling adds one token. Outputs follow the order of ``rows``, then ``sample_rows``.
    """

    step_id: int
    rows: list[int]  # scheduled rows; decode rows (one token owed) first
    num_new_tokens: list[int]  # per scheduled row; empty means one token for each
    new_rows: list[NewRow] = []
    new_block_ids: list[tuple[int, list[int]]] = []  # (row, blocks appended to its table)
    freed_rows: list[int] = []
    swap_out: list[tuple[int, int]] = []  # (gpu block, cpu block)
    swap_in: list[tuple[int, int]] = []  # (cpu block, gpu block)
    block_copies: list[tuple[int, int]] = []  # (source, destination): copy on write
    sample_rows: list[SampleRow] = []
    released_block_ids: list[tuple[int, int]] = []  # (row, n): sliding window; first n are null now


class GrammarMask(Message, frozen=True):
    """Allowed tokens for rows of a step whose forward already runs; its sampling waits for it."""

    step_id: int
    rows: list[int]
    bitmask: TensorRef  # [len(rows), ceil(V / 32)] int32


class Shutdown(Message, frozen=True):
    """The worker ends with exit code 0."""


# ---------------------------------------------------------------- workers -> core


class WorkerInfo(Part, frozen=True):
    """A rank's sign of life."""

    rank: int
    pid: int
    device: str
    num_steps: int
    memory_used_bytes: int


class LoadProgress(Message, frozen=True):
    """How far a start has come; the supervisor and the launcher show it."""

    rank: int
    phase: str  # "starting", "loading weights", "allocating", "warming up"
    done: int
    total: int
    elapsed_s: float


class WorkerReady(Message, frozen=True):
    """A rank has its model, its cache and its graphs."""

    rank: int
    pid: int
    model_digest: str  # of config and weight names, shapes and sizes
    num_gpu_blocks: int
    num_cpu_blocks: int
    vocab_size: int  # rows of the logits
    weights_bytes: int
    kv_cache_bytes: int
    phases_s: dict[str, float]  # start-up phases and what each took
    protocol_version: int = PROTOCOL_VERSION
    schema_hash: str = ""


class RowLogprobs(Part, frozen=True):
    """Log-probabilities of one row of a step."""

    row: int
    chosen: TokenLogprobs | None = None  # of the sampled token
    prompt: list[TokenLogprobs] | None = None  # prompt positions this step computed, in order


class ModelRunnerOutput(Message, frozen=True):
    """Answer to one SchedulerOutput; only the output rank sends it, in step order."""

    step_id: int
    sampled_token_ids: list[int]  # one per row that sampled, in plan order
    logprobs: list[RowLogprobs] = []
    nan_rows: list[int] = []  # rows whose logits held NaN; their sampled id means nothing
    logits_rows: list[tuple[int, TensorRef]] = []  # (row, [V] float32): not sampled yet
    device_time_s: float = 0.0  # the step on the device, or on the CPU


class WorkerError(Message, frozen=True):
    """A rank ends because of this; a group death."""

    rank: int
    stage: str  # "import", "device", "loading weights", "memory", "step", ...
    reason: str  # exception type and text
    traceback: str


FrontendToCore = (
    Hello | AddRequest | AbortRequests | AbortBranches | ProcessedLogits | Ack | Heartbeat | Goodbye
    | Call
)  # fmt: skip
CoreToFrontend = Welcome | Refused | EngineOutputs | CallResult | Heartbeat | EngineFailed
CoreToWorker = SchedulerOutput | GrammarMask | Call | Shutdown
WorkerToCore = LoadProgress | WorkerReady | ModelRunnerOutput | CallResult | WorkerError


@cache
def schema_hash() -> str:
    """Digest of every wire's fields in order; processes with different digests must not talk."""
    wires = (FrontendToCore, CoreToFrontend, CoreToWorker, WorkerToCore)
    return hashlib.sha256(repr(multi_type_info(wires)).encode()).hexdigest()[:16]


def _refuse_extension(code: int, _data: memoryview) -> object:
    """Extension types are how other systems smuggle objects; no wire of ours has any."""
    raise ValueError(f"msgpack extension type {code} is not part of the protocol")


# Built once per process: building one per message is what msgspec's docs warn about.
encoder = msgspec.msgpack.Encoder()
frontend_to_core_decoder = msgspec.msgpack.Decoder(FrontendToCore, ext_hook=_refuse_extension)
core_to_frontend_decoder = msgspec.msgpack.Decoder(CoreToFrontend, ext_hook=_refuse_extension)
core_to_worker_decoder = msgspec.msgpack.Decoder(CoreToWorker, ext_hook=_refuse_extension)
worker_to_core_decoder = msgspec.msgpack.Decoder(WorkerToCore, ext_hook=_refuse_extension)
