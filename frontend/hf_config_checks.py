"""The types and ranges that a checkpoint's ``config.json`` must keep, before anything trusts them.

A checkpoint is somebody else's work: a number of layers beyond all memory, a text where a number
belongs, a list that is none. Only fields that this engine reads are looked at, where they stand
at the top or in ``text_config``; absent and null always pass. Whether they make a model together
is for the model's shape to say.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ipc.errors import ConfigError

_WHOLE = {  # field -> the largest value that passes; the smallest is 1
    "hidden_size": 1 << 20,
    "n_embd": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "n_layer": 1 << 12,
    "num_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "n_head": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "ffn_dim": 1 << 24,
    "n_inner": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "n_positions": 1 << 31,
    "seq_length": 1 << 31,
    "max_seq_len": 1 << 31,
    "max_sequence_length": 1 << 31,
    "max_seq_length": 1 << 31,
    "seq_len": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "sliding_window_pattern": 1 << 12,
    "_sliding_window_pattern": 1 << 12,
    "max_window_layers": 1 << 12,
}
_FROM_ZERO = ("max_window_layers", "sliding_window", "n_inner")  # zero: none
_NUMBERS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "model_max_length",
)
_TEXTS = ("model_type", "torch_dtype", "dtype", "hidden_act", "hidden_activation")
_LISTS_OF_TEXT = ("architectures", "layer_types")
_OBJECTS = ("text_config", "rope_scaling", "rope_parameters", "quantization_config")
_MAX_NUMBER = 1e31  # "no limit" is written as 1e30


def check_hf_config(hf_config: Mapping[str, Any], where: str) -> None:
    """Refuse a config with a field of the wrong type or beyond its range.

    Raises:
        ConfigError: names the file and the field.
    """
    _check(hf_config, where)
    nested = hf_config.get("text_config")
    if isinstance(nested, Mapping):
        _check(nested, f"{where}, text_config")


def _check(config: Mapping[str, Any], where: str) -> None:
    for name, largest in _WHOLE.items():
        least = 0 if name in _FROM_ZERO else 1
        if (value := config.get(name)) is not None and not _is_whole(value, least, largest):
            raise _wrong(where, name, f"a whole number from {least} to {largest}", value)
    for names, is_right, wanted in _KINDS:
        for name in names:
            if (value := config.get(name)) is not None and not is_right(value):
                raise _wrong(where, name, wanted, value)
    check_eos_token_id(config, where)


def check_eos_token_id(config: Mapping[str, Any], where: str) -> None:
    """Refuse an ``eos_token_id`` that is neither a token id nor a list of them."""
    eos = config.get("eos_token_id")
    if eos is not None and not _is_list_of(eos if isinstance(eos, list) else [eos], int):
        raise _wrong(where, "eos_token_id", "a token id or a list of them", eos)


def _is_whole(value: object, least: int, largest: int) -> bool:
    return type(value) is int and least <= value <= largest


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) <= _MAX_NUMBER


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _wrong(where: str, name: str, wanted: str, value: object) -> ConfigError:
    return ConfigError(f"--model: {where}: {name} must be {wanted}, got {value!r:.80}")


_KINDS: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (_NUMBERS, _is_number, "a number"),
    (_TEXTS, lambda value: isinstance(value, str), "a text"),
    (_LISTS_OF_TEXT, lambda value: _is_list_of(value, str), "a list of texts"),
    (_OBJECTS, lambda value: isinstance(value, Mapping), "an object"),
)
