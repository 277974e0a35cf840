"""What a caller gets back: RequestOutput and its parts. Plain records, no behaviour.

Fields keep the names and positions of the 2024 classes; fields that later versions added follow,
each with a default. Records are built on the path of every token, hence the slots.
"""

from dataclasses import dataclass

from frontend.lora_request import LoRARequest


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position, of the raw model distribution."""

    logprob: float
    rank: int | None = None  # 1 is the most likely
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # token id -> Logprob; the chosen token comes first
SampleLogprobs = list[PositionLogprobs]  # one entry per output token
PromptLogprobs = list[PositionLogprobs | None]  # one per prompt token; the first one is None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence of a request.

    ``text``, ``token_ids`` and ``logprobs`` hold everything so far, or with
    ``RequestOutputKind.DELTA`` what is new since the previous output of the stream.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # over all tokens so far; None when nobody asked
    logprobs: SampleLogprobs | None
    finish_reason: str | None = None  # "stop", "length", "abort", "error"
    stop_reason: int | str | None = None  # the stop string or stop token id; None for EOS
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        """Whether this sequence is complete."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: wall-clock seconds, ``time.time()``."""

    arrival_time: float
    last_token_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    time_in_queue: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0  # over all sequences of the request

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token; 0.0 before there is one."""
        return 0.0 if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def queued_ts(self) -> float:
        """``arrival_time``, by its newer name."""
        return self.arrival_time

    @property
    def scheduled_ts(self) -> float:
        """``first_scheduled_time``, by its newer name; 0.0 before."""
        return self.first_scheduled_time or 0.0

    @property
    def first_token_ts(self) -> float:
        """``first_token_time``, by its newer name; 0.0 before."""
        return self.first_token_time or 0.0

    @property
    def last_token_ts(self) -> float:
        """``last_token_time``, by its newer name."""
        return self.last_token_time


@dataclass(slots=True)
class RequestOutput:
    """What a request has produced.

    ``outputs`` holds the sequences in order of index; with ``DELTA`` only those that moved.
    """

    request_id: str
    prompt: str | None  # None when only token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: LoRARequest | None = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache
    multi_modal_placeholders: dict[str, object] | None = None
    kv_transfer_params: dict[str, object] | None = None
    error: str | None = None  # why the request failed; set with finish_reason "error"


@dataclass(slots=True)
class EmbeddingOutput:
    """The pooled vector of one input."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What a pooling request has produced."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool
    num_cached_tokens: int | None = None
