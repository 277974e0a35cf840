"""Admission: a caller's prompt and parameters into one checked AddRequest.

Everything that could only fail later is refused here, with a sentence that names the field. The
caller's own SamplingParams object is never changed: the wire gets a copy with the seed drawn, the
token limit filled in and the end-of-text ids of the checkpoint added.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from frontend.logits_processors import LogitsProcessor, resolve_processors
from frontend.lora_request import LoRARequest
from frontend.pooling_params import PoolingParams
from frontend.prompts import ParsedPrompt, Prompt, parse_prompt
from frontend.tokenizer import LONG_TEXT_CHARS, Tokenizer
from frontend.tokenizer_pool import TokenizerPool
from ipc.config import ModelConfig
from ipc.errors import RequestError, UnsupportedError
from ipc.messages import AddRequest, Limits, Linger
from ipc.sampling_params import SamplingParams

MAX_LONG_TEXTS = 2  # tokenised at a time: threads compete with the event loop for the cores
MAX_BRANCHES = 128
MAX_STOP_STRINGS, MAX_STOP_CHARS = 16, 256
MAX_LIST_ENTRIES = 1024  # stop_token_ids, logit_bias, bad_words
_UNSUPPORTED_PARAMS = (
    "extra_args",
    "flat_logprobs",
    "trace_decode_token_ids",
    "thinking_token_budget",
    "repetition_detection",
)
MAX_ID_CHARS = 256  # request ids and cache salts


@dataclass(slots=True)
class NewRequest:
    """What a caller asks for, before any check."""

    request_id: str
    inputs: Prompt
    params: SamplingParams | PoolingParams
    arrival_time: float | None = None  # time.time(); None: now
    lora_request: LoRARequest | None = None
    priority: int = 0
    cache_salt: str | None = None
    prompt_text: str | None = None  # shown as RequestOutput.prompt when only ids are given
    tokenization_kwargs: Mapping[str, Any] | None = None
    trace_headers: Mapping[str, str] | None = None
    data_parallel_rank: int | None = None
    # The HTTP API refuses a max_tokens that the context has no room for; else it is cut to fit.
    max_tokens_must_fit: bool = False
    linger: Linger | None = None  # the stream may be taken up again; see ``AsyncLLM.resume_stream``


@dataclass(slots=True)
class AdmittedRequest:
    """A request that passed every check."""

    request_id: str
    prompt: str | None
    params: SamplingParams  # the caller's
    message: AddRequest
    lora_request: LoRARequest | None
    processors: list[LogitsProcessor]


class SeedSource:
    """Draws seeds for requests that bring none: the same ones after every start."""

    def __init__(self, engine_seed: int) -> None:
        self._engine_seed = engine_seed
        self._num_drawn = 0

    def draw(self) -> int:
        """A new seed, 0 <= seed < 2**63."""
        self._num_drawn += 1
        text = f"{self._engine_seed}/{self._num_drawn}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


class InputProcessor:
    """Checks requests against one engine's limits and turns them into messages."""

    def __init__(
        self,
        model_config: ModelConfig,
        limits: Limits,
        tokenizer: Tokenizer | None,
        pool: TokenizerPool | None = None,
    ) -> None:
        """Take requests for an engine with these limits.

        Args:
            tokenizer: None takes token ids only.
            pool: tokenises beside the event loop; None: threads do, for long texts.
        """
        self._model_config = model_config
        self._limits = limits
        self.tokenizer = tokenizer
        self._pool = pool
        self._long_texts = asyncio.Semaphore(MAX_LONG_TEXTS)
        self._seeds = SeedSource(model_config.seed)
        self._num_admitted = 0
        self._eos_token_ids, self._further_eos_token_ids = self._end_of_text_ids()

    def set_limits(self, limits: Limits) -> None:
        """Take requests for another core from now on."""
        self._limits = limits

    def close(self) -> None:
        """End the pool, if there is one."""
        if self._pool is not None:
            self._pool.close()

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Tokenise from now on with another tokenizer, and without a pool."""
        self.tokenizer = tokenizer
        self._pool = None
        self._eos_token_ids, self._further_eos_token_ids = self._end_of_text_ids()

    def tokenize(self, text: str, options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt's text.

        Args:
            options: ``add_special_tokens``.

        Raises:
            RequestError: there is no tokenizer, or the text is no valid Unicode.
            UnsupportedError: an option that this version does not have.
        """
        tokenizer, add_special_tokens = self._check_text(text, options)
        return tokenizer.encode(text, add_special_tokens)

    async def tokenize_async(
        self, text: str, options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """As ``tokenize``; what takes long is done beside the event loop."""
        tokenizer, add_special_tokens = self._check_text(text, options)
        if self._pool is not None:
            return await self._pool.encode_async(text, add_special_tokens)
        if len(text) <= LONG_TEXT_CHARS:
            return tokenizer.encode(text, add_special_tokens)
        async with self._long_texts:
            return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)

    def admit(self, new: NewRequest, prompt: ParsedPrompt | None = None) -> AdmittedRequest:
        """Check everything, and make the message.

        Args:
            new: the request.
            prompt: its prompt, when it was parsed and tokenised already.

        Raises:
            RequestError, UnsupportedError: it cannot be served as asked. Nothing was changed.
        """
        params = self._check_request(new)
        prompt = prompt or parse_prompt(new.inputs)
        if prompt.token_ids is None:
            assert prompt.text is not None
            prompt.token_ids = self.tokenize(prompt.text, new.tokenization_kwargs)
        prompt_token_ids = self._check_prompt(prompt.token_ids, params)
        if new.max_tokens_must_fit:
            self._check_room(len(prompt_token_ids), params.max_tokens)
        check_params(params, self._model_config.max_logprobs, self._limits.vocab_size)
        processors = resolve_processors(params.logits_processors)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need the tokenizer, which was not loaded", "stop")
        message = AddRequest(
            req_id=self._new_req_id(),
            prompt_token_ids=prompt_token_ids,
            params=self._wire_params(params, len(prompt_token_ids)),
            arrival_time_s=time.time() if new.arrival_time is None else new.arrival_time,
            eos_token_ids=self._eos_token_ids,
            priority=new.priority,
            cache_salt=_check_id("cache_salt", new.cache_salt or prompt.cache_salt),
            bad_words_token_ids=self._bad_words(params.bad_words or ()),
            has_logits_processors=bool(processors),
            linger=new.linger,
        )
        text = new.prompt_text if prompt.text is None else prompt.text
        return AdmittedRequest(new.request_id, text, params, message, new.lora_request, processors)

    def readmit(
        self, request: AddRequest, request_id: str, params: SamplingParams
    ) -> AdmittedRequest:
        """A request that another frontend, or this one, had admitted, under a new name."""
        message = msgspec.structs.replace(request, req_id=self._new_req_id(), resumed=[])
        return AdmittedRequest(request_id, None, params, message, None, [])

    def _new_req_id(self) -> str:
        """Short, and never used twice: late outputs of an aborted request find nobody."""
        self._num_admitted += 1
        return f"{self._num_admitted:x}"

    def _check_text(self, text: str, options: Mapping[str, Any] | None) -> tuple[Tokenizer, bool]:
        """The tokenizer, and whether special tokens are wanted."""
        options = options or {}
        unknown = sorted(options.keys() - {"add_special_tokens"})
        if unknown:
            raise UnsupportedError(
                f"tokenization_kwargs: {', '.join(unknown)} is not available; "
                f"add_special_tokens is",
                "tokenization_kwargs",
            )
        if self.tokenizer is None:
            raise RequestError(
                "the tokenizer was not loaded (skip_tokenizer_init): pass prompt_token_ids "
                "instead of a text",
                "prompt",
            )
        return self.tokenizer, bool(options.get("add_special_tokens", True))

    def _check_request(self, new: NewRequest) -> SamplingParams:
        """Everything but prompt and parameters; returns the parameters, now of one type."""
        params = new.params
        if isinstance(params, PoolingParams):
            raise UnsupportedError("pooling and embeddings are not available in this version")
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"params must be SamplingParams, got {type(params).__name__}", "params"
            )
        _check_id("request_id", new.request_id)
        if not isinstance(new.priority, int) or not -(2**31) <= new.priority < 2**31:
            raise RequestError(
                f"priority must be a 32-bit whole number, got {new.priority!r}", "priority"
            )
        if new.lora_request is not None:
            raise UnsupportedError(
                f"LoRA adapters are not available in this version (enable_lora is off), got a "
                f"request for {new.lora_request.lora_name!r}",
                "lora_request",
            )
        if new.data_parallel_rank not in (None, 0):
            raise RequestError(
                f"data_parallel_rank must be 0 with one replica, got {new.data_parallel_rank}",
                "data_parallel_rank",
            )
        if new.trace_headers:
            raise UnsupportedError("tracing is not available in this version", "trace_headers")
        return params

    def _check_prompt(self, ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt's ids, truncated as asked, in range and short enough."""
        max_model_len = self._limits.max_model_len
        keep = params.truncate_prompt_tokens
        if keep is not None:
            # -1 is the model's limit, which leaves room for one token of output.
            keep = max_model_len - 1 if keep == -1 else keep
            if keep > max_model_len:
                raise RequestError(
                    f"truncate_prompt_tokens must be at most the model's context of "
                    f"{max_model_len} tokens, got {keep}",
                    "truncate_prompt_tokens",
                )
            ids = ids[-keep:]
        if not ids:
            raise RequestError("the prompt must hold at least one token, got none", "prompt")
        if min(ids) < 0 or max(ids) >= self._limits.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self._limits.vocab_size)
            raise RequestError(
                f"token id {bad} is outside the vocabulary of {self._limits.vocab_size}",
                "prompt_token_ids",
            )
        if len(ids) >= max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, which leaves no room for output in the "
                f"model's context of {max_model_len} tokens",
                ids,
            )
        # Block 0 is the null block, so it never holds a request's tokens.
        room = (self._limits.num_gpu_blocks - 1) * self._limits.block_size
        if len(ids) + 1 > room:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and the whole KV cache holds {room}: it "
                f"could never run",
                ids,
            )
        return ids

    def _check_room(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse to promise more tokens than the context has left."""
        limit = self._limits.max_model_len
        if max_tokens is not None and num_prompt_tokens + max_tokens > limit:
            raise RequestError(
                f"max_tokens must be at most {limit - num_prompt_tokens}: the prompt has "
                f"{num_prompt_tokens} tokens of the model's context of {limit}, got {max_tokens}",
                "max_tokens",
            )

    def _wire_params(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """The copy that travels: seed drawn, limits filled in, callables left behind."""
        try:
            copy = params.clone()
        except ValueError as err:  # fields may have been set after the object was made
            raise RequestError(f"params: {err}", "params") from err
        room = self._limits.max_model_len - num_prompt_tokens
        copy.max_tokens = room if copy.max_tokens is None else min(copy.max_tokens, room)
        if copy.min_tokens > copy.max_tokens:
            raise RequestError(
                f"min_tokens ({copy.min_tokens}) does not fit: the prompt of {num_prompt_tokens} "
                f"tokens leaves room for {room}",
                "min_tokens",
            )
        if copy.seed is None:
            copy.seed = self._seeds.draw()
        copy.update_from_generation_config({"eos_token_id": self._further_eos_token_ids})
        if copy.num_branches > copy.n and copy.logprobs is None:
            copy.logprobs = 0  # the branches are ranked by what their tokens were worth
        copy.logits_processors = None
        copy.stop = []  # stop strings are found here, by their text
        return copy

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Each word as it is spelled at the beginning of a text and after a space."""
        if words and self.tokenizer is None:
            raise RequestError("bad_words needs the tokenizer, which was not loaded", "bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip()):
                assert self.tokenizer is not None
                ids = self.tokenizer.encode(text, add_special_tokens=False)
                if ids and max(ids) < self._limits.vocab_size:
                    found[tuple(ids)] = None
        return [list(ids) for ids in found]

    def _end_of_text_ids(self) -> tuple[list[int], list[int]]:
        """The end-of-text id, and the checkpoint's further ones, which count as stop tokens."""
        ids = [i for i in self._model_config.eos_token_ids if 0 <= i < self._limits.vocab_size]
        first = None if self.tokenizer is None else self.tokenizer.eos_token_id
        if first is None or not 0 <= first < self._limits.vocab_size:
            first = ids[0] if ids else None
        if first is None:
            return [], []
        return [first], [token_id for token_id in ids if token_id != first]


class PromptTooLongError(RequestError):
    """The prompt leaves no room for output. Holds its ids, for callers who go on without it."""

    def __init__(self, message: str, prompt_token_ids: list[int]) -> None:
        super().__init__(message, "prompt")
        self.prompt_token_ids = prompt_token_ids


def check_params(params: SamplingParams, max_logprobs: int, vocab_size: int) -> None:
    """Refuse parameters that this engine cannot honour; their own ranges were checked before.

    Raises:
        RequestError: a value is above its cap; the message names the field and the cap.
        UnsupportedError: a feature that this version does not have.
    """
    if params.use_beam_search:
        raise UnsupportedError("beam search is not available in this version", "use_beam_search")
    if params.structured_outputs is not None:
        raise UnsupportedError(
            "structured outputs (guided decoding) are not available in this version",
            "structured_outputs",
        )
    for name in _UNSUPPORTED_PARAMS:
        value = getattr(params, name)
        if value is not None and value is not False:
            raise UnsupportedError(f"{name} is not available in this version", name)
    _check_caps(params)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and max_logprobs != -1 and not 0 <= value <= max_logprobs:
            raise RequestError(
                f"{name} must be at most {max_logprobs} (--max-logprobs), got {value}", name
            )
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name}: token id {token_id} is outside the vocabulary of {vocab_size}", name
                )


def _check_caps(params: SamplingParams) -> None:
    for name in ("n", "best_of"):
        if (getattr(params, name) or 1) > MAX_BRANCHES:
            raise RequestError(
                f"{name} must be at most {MAX_BRANCHES}, got {getattr(params, name)}", name
            )
    if len(params.stop_strings) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(params.stop_strings)}",
            "stop",
        )
    longest = max(map(len, params.stop_strings), default=0)
    if longest > MAX_STOP_CHARS:
        raise RequestError(
            f"a stop string must have at most {MAX_STOP_CHARS} characters, got {longest}",
            "stop",
        )
    for name in ("stop_token_ids", "logit_bias", "bad_words"):
        if len(getattr(params, name) or ()) > MAX_LIST_ENTRIES:
            raise RequestError(
                f"{name} must hold at most {MAX_LIST_ENTRIES} entries, got "
                f"{len(getattr(params, name))}",
                name,
            )


def _check_id(name: str, value: str | None) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a text, got {type(value).__name__}", name)
    if not 1 <= len(value) <= MAX_ID_CHARS or not value.isprintable():
        raise RequestError(
            f"{name} must have 1 to {MAX_ID_CHARS} printable characters, got {len(value)}", name
        )
    return value
