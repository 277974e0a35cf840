"""Whether a request can be served at all. The frontend checks too; the core trusts no frontend.

Everything that would break a worker or the scheduler is refused here, and every size is capped,
so that no single request can exhaust the core. Each refusal names the field and the numbers.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from engine_core.fair_share import MAX_TENANT, MAX_WEIGHT, MIN_WEIGHT
from ipc.caps import (
    MAX_BRANCHES,
    MAX_CORE_BAD_WORDS,
    MAX_CORE_STOP_TOKENS,
    MAX_ID_CHARS,
    MAX_LINGER_S,
    MAX_LIST_ENTRIES,
    MAX_PRESENTATION_BYTES,
    MAX_PROMPT_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_WORD_TOKENS,
    num_prompt_logprobs,
)
from ipc.errors import RequestError, UnsupportedError
from ipc.messages import AddRequest


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What this core can serve."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int  # -1: no limit but the vocabulary
    num_usable_blocks: int
    block_size: int


def check_request(request: AddRequest, limits: RequestLimits) -> None:
    """Raise unless ``request`` can be served.

    Raises:
        RequestError: says what to change.
        UnsupportedError: a feature that does not exist in this version.
    """
    _check_features(request)
    _check_names(request)
    _check_prompt(request, limits)
    _check_params(request, limits)
    _check_token_lists(request, limits.vocab_size)
    _check_resumed(request, limits)
    _check_place(request)
    _check_linger(request)


def _check_features(request: AddRequest) -> None:
    if request.lora is not None:
        raise UnsupportedError("LoRA adapters are not supported by this version", "lora")
    if request.params.use_beam_search:
        raise UnsupportedError(
            "beam search does not run inside the engine core of this version", "use_beam_search"
        )
    if request.params.structured_outputs is not None:
        raise UnsupportedError(
            "structured outputs are not supported by this version", "structured_outputs"
        )
    if request.params.logits_processors:
        raise RequestError(
            "logits processors stay in the client's process; set has_logits_processors",
            "logits_processors",
        )


def _check_names(request: AddRequest) -> None:
    for name, value in (("req_id", request.req_id), ("cache_salt", request.cache_salt)):
        if value is None:
            continue
        if not 1 <= len(value) <= MAX_ID_CHARS or not value.isprintable():
            raise RequestError(
                f"{name} must have 1 to {MAX_ID_CHARS} printable characters, got {len(value)}"
                f"{'' if value.isprintable() else ', some not printable'}",
                name,
            )


def _check_linger(request: AddRequest) -> None:
    linger = request.linger
    if linger is None:
        return
    if not 0.0 < linger.seconds <= MAX_LINGER_S:
        raise RequestError(f"linger_s must be at most {MAX_LINGER_S}", "linger_s")
    if not 1 <= len(linger.stream_id) <= MAX_ID_CHARS or not linger.stream_id.isprintable():
        raise RequestError(
            f"a stream's name has 1 to {MAX_ID_CHARS} printable characters", "linger_s"
        )
    if len(linger.presentation) > MAX_PRESENTATION_BYTES:
        raise RequestError(
            f"linger_s: what presents the stream is above {MAX_PRESENTATION_BYTES} bytes",
            "linger_s",
        )
    if request.has_logits_processors or request.params.logprobs is not None:
        raise RequestError(
            "a stream with log-probabilities or logits processors cannot linger", "linger_s"
        )


def _check_prompt(request: AddRequest, limits: RequestLimits) -> None:
    num_tokens = len(request.prompt_token_ids)
    if num_tokens == 0:
        raise RequestError("the prompt must not be empty", "prompt")
    if num_tokens >= limits.max_model_len:
        raise RequestError(
            f"the prompt has {num_tokens} tokens, which leaves no room for output: a request may "
            f"have {limits.max_model_len} tokens in all (the KV cache has "
            f"{limits.num_usable_blocks} blocks of {limits.block_size} tokens)",
            "prompt",
        )
    _check_ids("prompt", request.prompt_token_ids, limits.vocab_size)


def _check_params(request: AddRequest, limits: RequestLimits) -> None:
    params = request.params
    if params.seed is None:
        raise RequestError("seed must be set: the frontend draws one at admission", "seed")
    for name, branches in (("n", params.n), ("best_of", params.num_branches)):
        if branches > MAX_BRANCHES:
            raise RequestError(f"{name} must be at most {MAX_BRANCHES}, got {branches}", name)
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        _check_num_logprobs(name, count, limits)
    total = num_prompt_logprobs(
        params.prompt_logprobs, len(request.prompt_token_ids), limits.vocab_size
    )
    if total > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"prompt_logprobs would give {total} values for this prompt; the cap is "
            f"{MAX_PROMPT_LOGPROBS}",
            "prompt_logprobs",
        )
    stops = params.stop_strings
    if len(stops) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_CHARS for text in stops):
        raise RequestError(
            f"stop may hold {MAX_STOP_STRINGS} strings of {MAX_STOP_CHARS} characters, "
            f"got {len(stops)}, the longest of {max(map(len, stops))}",
            "stop",
        )


def _check_num_logprobs(name: str, count: int | None, limits: RequestLimits) -> None:
    if count is None or limits.max_logprobs == -1:
        return
    if count == -1:
        count = limits.vocab_size
    if count > limits.max_logprobs:
        raise RequestError(
            f"{name} must be at most {limits.max_logprobs} (--max-logprobs), got {count}", name
        )


def _check_token_lists(request: AddRequest, vocab_size: int) -> None:
    params = request.params
    sizes = (
        ("stop_token_ids", len(params.stop_token_ids or ()), MAX_CORE_STOP_TOKENS),
        ("logit_bias", len(params.logit_bias or ()), MAX_LIST_ENTRIES),
        ("bad_words", len(request.bad_words_token_ids), MAX_CORE_BAD_WORDS),
        ("eos_token_ids", len(request.eos_token_ids), MAX_LIST_ENTRIES),
    )
    for name, size, cap in sizes:
        if size > cap:
            raise RequestError(f"{name} may hold {cap} entries, got {size}", name)
    longest = max(map(len, request.bad_words_token_ids), default=0)
    if longest > MAX_WORD_TOKENS:
        raise RequestError(
            f"bad_words may hold words of {MAX_WORD_TOKENS} tokens, got one of {longest}",
            "bad_words",
        )
    if len(params.allowed_token_ids or ()) > vocab_size:
        raise RequestError(
            f"allowed_token_ids may hold {vocab_size} tokens, "
            f"got {len(params.allowed_token_ids or ())}",
            "allowed_token_ids",
        )
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_ids("logit_bias", params.logit_bias or (), vocab_size)


def _check_resumed(request: AddRequest, limits: RequestLimits) -> None:
    seen = set()
    for branch in request.resumed:
        if not 0 <= branch.index < request.params.num_branches or branch.index in seen:
            raise RequestError(
                f"resumed branch {branch.index} is not one of {request.params.num_branches}, "
                f"or is there twice",
                "resumed",
            )
        seen.add(branch.index)
        num_tokens = len(request.prompt_token_ids) + len(branch.token_ids)
        if num_tokens > limits.max_model_len:
            raise RequestError(
                f"resumed branch {branch.index} has {num_tokens} tokens, "
                f"more than {limits.max_model_len}",
                "resumed",
            )
        _check_ids("resumed", branch.token_ids, limits.vocab_size)


def _check_place(request: AddRequest) -> None:
    """What decides when a request runs, and how long: numbers that can be reckoned with."""
    if not 0 <= request.tenant <= MAX_TENANT:
        raise RequestError(
            f"tenant must be between 0 and {MAX_TENANT}, got {request.tenant}", "tenant"
        )
    if not MIN_WEIGHT <= request.tenant_weight <= MAX_WEIGHT:
        raise RequestError(
            f"tenant_weight must be between {MIN_WEIGHT} and {MAX_WEIGHT:.0f}, "
            f"got {request.tenant_weight}",
            "tenant_weight",
        )
    for name, value in (("deadline_s", request.deadline_s), ("timeout_s", request.timeout_s)):
        if value is not None and not isfinite(value):
            raise RequestError(f"{name} must be finite, got {value}", name)


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse what is not a token id. The array makes one pass in C, and refuses other types."""
    try:
        ids = array("I", token_ids)
    except (TypeError, OverflowError) as err:
        raise RequestError(
            f"{name} must hold token ids between 0 and {vocab_size - 1}: {err}", name
        ) from err
    if ids and max(ids) >= vocab_size:
        raise RequestError(
            f"{name} must hold token ids between 0 and {vocab_size - 1}, got {max(ids)}", name
        )
