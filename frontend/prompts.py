"""The forms a prompt may take, and the one form behind them.

A prompt is a text, a list of token ids, or a mapping with ``prompt``, ``prompt_token_ids`` or
both. Nothing is tokenised here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipc.errors import RequestError, UnsupportedError

Prompt = str | Sequence[int] | Mapping[str, Any]

_KNOWN_KEYS = {"prompt", "prompt_token_ids", "multi_modal_data", "cache_salt"}
_UNSUPPORTED_KEYS = {
    "multi_modal_data": "prompts with images, video or audio are not available in this version",
    "multi_modal_uuids": "prompts with images, video or audio are not available in this version",
    "mm_processor_kwargs": "prompts with images, video or audio are not available in this version",
    "prompt_embeds": "prompts given as embeddings are not available in this version",
    "encoder_prompt": "encoder-decoder models are not available in this version",
    "decoder_prompt": "encoder-decoder models are not available in this version",
}


@dataclass(slots=True)
class ParsedPrompt:
    """A prompt in parts; at least one of text and ids is there. Ids win over text."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None


def parse_prompt(prompt: object) -> ParsedPrompt:
    """Take a prompt apart.

    Raises:
        RequestError: it has none of the known forms.
        UnsupportedError: it holds more than text and ids.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if isinstance(prompt, Sequence):
        return ParsedPrompt(None, token_id_list(prompt))
    if hasattr(prompt, "__aiter__"):
        raise UnsupportedError(
            "prompts that arrive in chunks are not available in this version: pass the whole "
            "prompt",
            "prompt",
        )
    raise RequestError(
        f"a prompt must be a text, a list of token ids, or a mapping with 'prompt' or "
        f"'prompt_token_ids', got {type(prompt).__name__}",
        "prompt",
    )


def token_id_list(ids: Sequence[Any]) -> list[int]:
    """A list of whole numbers; RequestError when there is anything else in it."""
    if set(map(type, ids)) - {int}:
        bad = next(token_id for token_id in ids if type(token_id) is not int)
        raise RequestError(
            f"prompt_token_ids must hold whole numbers, got {bad!r}", "prompt_token_ids"
        )
    return list(ids)


def _parse_mapping(prompt: Mapping[str, Any]) -> ParsedPrompt:
    for key, sentence in _UNSUPPORTED_KEYS.items():
        if prompt.get(key) is not None:
            raise UnsupportedError(sentence, key)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    unknown = sorted(str(key) for key in prompt.keys() - _KNOWN_KEYS - _UNSUPPORTED_KEYS.keys())
    if unknown:
        raise RequestError(f"a prompt has no field {', '.join(unknown)}", "prompt")
    if text is None and ids is None:
        raise RequestError("a prompt needs 'prompt' or 'prompt_token_ids'", "prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' must be a text, got {type(text).__name__}", "prompt")
    if ids is not None and (isinstance(ids, str) or not isinstance(ids, Sequence)):
        raise RequestError(
            f"'prompt_token_ids' must be a list of ids, got {type(ids).__name__}",
            "prompt_token_ids",
        )
    return ParsedPrompt(text, None if ids is None else token_id_list(ids), prompt.get("cache_salt"))
