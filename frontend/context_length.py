"""How long a request may be: what ``config.json`` declares, RoPE scaling, and what the user asks.

Pure: dictionaries in, a number out.
"""

import logging
from typing import Any

from frontend.tokenizer_config import NO_LENGTH_LIMIT
from ipc.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 2048  # for models that declare nothing
MAX_MODEL_LEN = 2**31 - 1  # positions are 32-bit integers
_LENGTH_KEYS = (
    "max_position_embeddings",  # most models
    "n_positions",  # GPT-2
    "max_seq_len",  # MPT
    "seq_length",  # ChatGLM
    "max_sequence_length",  # OPT and others
    "max_seq_length",
    "seq_len",
)
# Types whose declared length already includes the scaling.
_SCALED_ALREADY = ("default", "none", "llama3", "longrope", "su", "mrope")
_MULTIPLYING = ("linear", "dynamic", "yarn")
_NUMBERS_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_LISTS_NEEDED = {
    "longrope": ("long_factor", "short_factor"),
    "su": ("long_factor", "short_factor"),
}


def check_rope_scaling(rope_scaling: dict[str, Any], where: str) -> None:
    """Refuse a RoPE scaling that no model could apply. ``where`` is the flag or the file.

    Raises:
        ConfigError: the type is unknown, or a number it needs is missing or not positive.
    """
    kind = rope_type(rope_scaling)
    if kind not in _SCALED_ALREADY + _MULTIPLYING:
        known = ", ".join(sorted(_SCALED_ALREADY + _MULTIPLYING))
        raise ConfigError(f"{where}: unknown type {kind!r}; known are {known}")
    for name in _NUMBERS_NEEDED.get(kind, ()):
        if not _is_positive(rope_scaling.get(name)):
            raise ConfigError(
                f"{where}: type {kind!r} needs a positive {name}, got {rope_scaling.get(name)!r}"
            )
    for name in _LISTS_NEEDED.get(kind, ()):
        factors = rope_scaling.get(name)
        if not isinstance(factors, list) or not factors or not all(map(_is_positive, factors)):
            raise ConfigError(f"{where}: type {kind!r} needs {name}, a list of positive numbers")
    original = rope_scaling.get("original_max_position_embeddings")
    if original is not None and not _is_length(original):
        raise ConfigError(
            f"{where}: original_max_position_embeddings must be at least 1, got {original!r}"
        )


def rope_type(rope_scaling: dict[str, Any]) -> Any:
    """The type, under either of the keys in use."""
    return rope_scaling.get("rope_type", rope_scaling.get("type"))


def text_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The part of ``config.json`` that describes the language model."""
    nested = hf_config.get("text_config")
    return hf_config | nested if isinstance(nested, dict) else hf_config


def derive_max_model_len(hf_config: dict[str, Any], *, is_window_limit: bool) -> int | None:
    """The longest request that the model itself allows; None when it declares nothing.

    Args:
        is_window_limit: the sliding window is disabled, so it limits the length.
    """
    config = text_config(hf_config)
    keys = (*_LENGTH_KEYS, "sliding_window") if is_window_limit else _LENGTH_KEYS
    declared = [config[key] for key in keys if _is_length(config.get(key))]
    if not declared:
        return None
    length: float = min(declared)
    rope_scaling = _rope_scaling(config)
    if not rope_scaling or rope_type(rope_scaling) in (*_SCALED_ALREADY, None):
        return int(length)
    if str(config.get("model_type", "")).startswith("gemma3"):
        return int(length)  # declares its scaled length beside a linear scaling
    check_rope_scaling(rope_scaling, "rope_scaling in config.json")
    if rope_type(rope_scaling) == "yarn":
        original = rope_scaling.get("original_max_position_embeddings")
        length = length if original is None else float(original)
    return int(min(length * rope_scaling["factor"], MAX_MODEL_LEN))


def choose_max_model_len(
    wanted: int | None,
    hf_config: dict[str, Any],
    *,
    tokenizer_limit: int | None = None,
    is_window_limit: bool = False,
) -> int:
    """The effective ``--max-model-len``.

    Args:
        wanted: the flag.
        tokenizer_limit: what the tokenizer's files declare; may allow more than the model does.

    Raises:
        ConfigError: more than the model allows, or less than one token.
    """
    derived = derive_max_model_len(hf_config, is_window_limit=is_window_limit)
    if wanted is None:
        if derived is None:
            logger.warning(
                "config.json declares no length; --max-model-len is %d", DEFAULT_MAX_MODEL_LEN
            )
        return derived or DEFAULT_MAX_MODEL_LEN
    if not 1 <= wanted <= MAX_MODEL_LEN:
        raise ConfigError(f"--max-model-len must be between 1 and {MAX_MODEL_LEN}, got {wanted}")
    limits = [limit for limit in (derived, _declared_limit(hf_config, tokenizer_limit)) if limit]
    if derived is not None and wanted > max(limits):
        raise ConfigError(
            f"--max-model-len {wanted} is above what the model allows ({derived}); longer "
            f"sequences would give wrong output. --rope-scaling can extend the range"
        )
    return wanted


def _declared_limit(hf_config: dict[str, Any], tokenizer_limit: int | None) -> int | None:
    """``model_max_length`` of the model or the tokenizer, unless it only says "no limit"."""
    limits = [
        int(limit)
        for limit in (hf_config.get("model_max_length"), tokenizer_limit)
        if limit is not None and _is_length(limit) and limit < NO_LENGTH_LIMIT / 1e6
    ]
    return max(limits, default=None)


def _rope_scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling under either of its names; newer files nest one per kind of layer."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(found, dict):
        return None
    nested = found.get("full_attention")
    return nested if isinstance(nested, dict) else found


def _is_length(value: Any) -> bool:
    return _is_positive(value) and value >= 1


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value > 0 and value < float("inf")
