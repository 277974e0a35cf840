"""SamplingParams: what a caller may ask of one generation, and the range checks on it.

The union of two eras: each field of the 2024 class keeps its name, position and default; the
fields added since follow. A value that could only fail later is refused here, naming the field.
"""

from enum import IntEnum
from functools import cached_property
from math import isfinite
from types import NoneType
from typing import Any

import msgspec

GREEDY_BELOW = 1e-5  # a temperature under this is greedy decoding


class SamplingType(IntEnum):
    """How the next token is chosen."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2
    BEAM = 3


class RequestOutputKind(IntEnum):
    """What each ``RequestOutput`` of a stream holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # one output, at the end


class StructuredOutputsParams(msgspec.Struct, kw_only=True, dict=True):
    """A constraint on the text: exactly one field may be set."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        """Refuse no constraint and more than one."""
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(kinds)} must be set, got {given or 'none'}"
            )


class SamplingParams(msgspec.Struct, dict=True, omit_defaults=True):
    """How to generate. Positions of the 2024 fields are kept, so old positional calls work.

    ``logits_processors`` never crosses a process boundary: the callables stay in the user's
    process, which sets ``AddRequest.has_logits_processors`` and sends a copy without them.
    """

    n: int = 1
    best_of: int | None = None  # None: n
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1 and 0: off
    min_p: float = 0.0
    seed: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: str | list[str] | None = None  # a list after construction
    stop_token_ids: list[int] | None = None  # a list after construction
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the model's limit
    min_tokens: int = 0
    logprobs: int | None = None  # -1: the whole vocabulary
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[Any] | None = None  # callables; never on a wire
    truncate_prompt_tokens: int | None = None  # -1: the model's limit
    # -- since 2024 --
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None  # each value clamped to [-100, 100]
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    flat_logprobs: bool = False
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None
    skip_clone: bool = False  # changes nothing: the wire always gets a copy
    trace_decode_token_ids: list[int] | None = None  # this and what follows: refused at admission
    thinking_token_budget: int | None = None
    repetition_detection: Any = None

    def __post_init__(self) -> None:
        """Check types, normalise, then check every range."""
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be {_kind_name(kind)}, got {value!r:.80}")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        if self.seed == -1:
            self.seed = None
        if self.logit_bias is not None:
            self.logit_bias = {
                _token_id("logit_bias key", token): _bias(token, bias)
                for token, bias in self.logit_bias.items()
            }
        self._check_counts()
        self._check_penalties()
        self._check_filters()
        self._check_stops()
        self._check_lists()
        if self.use_beam_search:
            self._check_beam()
        elif self.early_stopping is not False or self.length_penalty != 1.0:
            raise ValueError(
                "early_stopping and length_penalty only make sense with use_beam_search=True"
            )
        elif self.is_greedy:
            if self.num_branches > 1:
                raise ValueError(f"greedy sampling needs n = best_of = 1, got {self.num_branches}")
            self.top_p, self.top_k, self.min_p = 1.0, -1, 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the argmax."""
        return self.temperature < GREEDY_BELOW and not self.use_beam_search

    @property
    def num_branches(self) -> int:
        """Sequences that the engine generates: ``best_of``, or ``n``."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` after construction: always a list."""
        assert isinstance(self.stop, list)
        return self.stop

    @cached_property
    def sampling_type(self) -> SamplingType:
        """The way of choosing that these parameters select."""
        if self.use_beam_search:
            return SamplingType.BEAM
        if self.is_greedy:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    def clone(self) -> "SamplingParams":
        """A copy whose lists are its own; logits processors are shared, as callables hold state."""
        copy = SamplingParams(*(getattr(self, name) for name in self.__struct_fields__))
        for name in ("stop", "bad_words", "allowed_token_ids", "logits_processors"):
            value = getattr(copy, name)
            if isinstance(value, list):
                setattr(copy, name, list(value))
        return copy

    def update_from_generation_config(self, generation_config: dict[str, Any]) -> None:
        """Add the checkpoint's further end-of-text ids to the stop ids, unless ``ignore_eos``."""
        eos = generation_config.get("eos_token_id")
        if self.ignore_eos or eos is None:
            return
        assert self.stop_token_ids is not None
        for token_id in eos if isinstance(eos, list) else [eos]:
            if token_id not in self.stop_token_ids:
                self.stop_token_ids.append(token_id)

    @staticmethod
    def from_optional(**fields: Any) -> "SamplingParams":
        """Build from fields where None means "the default"."""
        return SamplingParams(
            **{name: value for name, value in fields.items() if value is not None}
        )

    def _check_counts(self) -> None:
        _whole("n", self.n, 1)
        if self.best_of is not None:
            _whole("best_of", self.best_of, 1)
            if self.best_of < self.n:
                raise ValueError(f"best_of must be at least n ({self.n}), got {self.best_of}")
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        for name in ("logprobs", "prompt_logprobs", "truncate_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value != -1:
                _whole(name, value, 1 if name == "truncate_prompt_tokens" else 0)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)

    def _check_penalties(self) -> None:
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 1e4)
        if self.repetition_penalty == 0.0:
            raise ValueError("repetition_penalty must be above 0, got 0.0")
        _real("length_penalty", self.length_penalty, -1e4, 1e4)

    def _check_filters(self) -> None:
        _real("temperature", self.temperature, 0.0, 1e4)
        _real("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be in (0, 1], got 0.0")
        _whole("top_k", self.top_k, -1)
        _real("min_p", self.min_p, 0.0, 1.0)

    def _check_stops(self) -> None:
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(f"stop must hold non-empty strings, got {self.stop_strings!r:.80}")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")

    def _check_lists(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _token_id(f"{name} entry", token_id)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must not be empty")
        for word in self.bad_words or ():
            if not isinstance(word, str) or not word:
                raise ValueError(f"bad_words must hold non-empty strings, got {word!r:.80}")

    def _check_beam(self) -> None:
        if self.num_branches < 2:
            raise ValueError(f"beam search needs best_of above 1, got {self.num_branches}")
        if self.temperature >= GREEDY_BELOW:
            raise ValueError(f"beam search needs temperature 0, got {self.temperature}")
        if self.top_p != 1.0 or self.top_k not in (-1, 0):
            raise ValueError("beam search needs top_p 1 and top_k off")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping must be True, False or 'never', got {self.early_stopping!r}"
            )


# Fields whose type the range checks below do not cover; None in a tuple stands for "unset".
_KINDS: dict[str, type | tuple[type, ...]] = {
    "use_beam_search": bool,
    "early_stopping": (bool, str),
    "stop": (str, list, tuple, NoneType),
    "stop_token_ids": (list, tuple, NoneType),
    "include_stop_str_in_output": bool,
    "ignore_eos": bool,
    "detokenize": bool,
    "skip_special_tokens": bool,
    "spaces_between_special_tokens": bool,
    "logits_processors": (list, tuple, NoneType),
    "bad_words": (list, tuple, NoneType),
    "allowed_token_ids": (list, tuple, NoneType),
    "logit_bias": (dict, NoneType),
    "structured_outputs": (StructuredOutputsParams, NoneType),
    "output_kind": RequestOutputKind,
    "flat_logprobs": bool,
    "extra_args": (dict, NoneType),
    "skip_reading_prefix_cache": (bool, NoneType),
    "skip_clone": bool,
}


def _kind_name(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("None" if k is NoneType else k.__name__ for k in kinds)


def _token_id(name: str, value: object) -> int:
    """A token id; a string of digits, as JSON keys are, will do."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 12:
        value = int(value)
    _whole(name, value, 0, 2**31 - 1)
    assert isinstance(value, int)
    return value


def _bias(token: object, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"logit_bias of token {token!r:.20} must be a number, got {value!r:.80}")
    return min(100.0, max(-100.0, value))


def _whole(name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r:.80}")
    if not low <= value <= high:
        limit = f"at least {low}" if high == 2**63 - 1 else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def _is_finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _real(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
