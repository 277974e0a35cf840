"""What the files beside a tokenizer say: special tokens, added tokens, chat template, limits.

Reads ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` and the chat
template files with the precedence that Hugging Face applies. Knows no text and encodes nothing.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ipc.errors import ConfigError

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
NO_LENGTH_LIMIT = int(1e30)  # what tokenizer files write for "no limit"
_TEMPLATE_DIRECTORY = "additional_chat_templates"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The settings of one tokenizer directory."""

    named_tokens: dict[str, AddedToken] = field(default_factory=dict)  # by name, "eos_token" etc.
    extra_special_tokens: list[AddedToken] = field(default_factory=list)
    added_tokens: dict[int, AddedToken] = field(default_factory=dict)
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; "default" is the usual
    model_max_length: int = NO_LENGTH_LIMIT
    clean_up_tokenization_spaces: bool = False
    split_special_tokens: bool = False
    has_custom_code: bool = False

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """One template, several by name, or None."""
        if not self.chat_templates:
            return None
        if list(self.chat_templates) == ["default"]:
            return self.chat_templates["default"]
        return dict(self.chat_templates)


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read every settings file of a tokenizer directory; absent files count as empty.

    Raises:
        ConfigError: a file is not JSON, or holds something else than settings.
    """
    try:
        return _read_tokenizer_config(directory)
    except ConfigError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as err:
        raise ConfigError(
            f"--tokenizer: tokenizer_config.json or a file beside it in {directory} cannot be "
            f"used: {type(err).__name__}: {err}"
        ) from err


def _read_tokenizer_config(directory: Path) -> TokenizerConfig:
    settings = read_json(directory / "tokenizer_config.json")
    added_tokens = _added_tokens(directory, settings)
    by_content = {token.content: token for token in added_tokens.values()}
    named = {
        name: _as_token(settings[name], by_content)
        for name in NAMED_TOKENS
        if settings.get(name) is not None
    }
    return TokenizerConfig(
        named_tokens=named,
        extra_special_tokens=_extra_special_tokens(settings, by_content),
        added_tokens=added_tokens,
        chat_templates=_chat_templates(directory, settings),
        model_max_length=int(settings.get("model_max_length") or NO_LENGTH_LIMIT),
        clean_up_tokenization_spaces=bool(settings.get("clean_up_tokenization_spaces", False)),
        split_special_tokens=bool(settings.get("split_special_tokens", False)),
        has_custom_code=bool(settings.get("auto_map")),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} when there is no such file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_any_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"{path} cannot be read as JSON: {err}") from err


def _added_tokens(directory: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens beyond the vocabulary by id. Old directories keep them in files of their own."""
    if "added_tokens_decoder" in settings:
        return {
            int(token_id): _as_token(token, {})
            for token_id, token in settings["added_tokens_decoder"].items()
        }
    special_tokens_map = read_json(directory / "special_tokens_map.json")
    settings.update({name: value for name, value in special_tokens_map.items() if value})
    special = {_content(settings[name]) for name in NAMED_TOKENS if settings.get(name) is not None}
    special |= {_content(token) for token in settings.get("additional_special_tokens") or ()}
    return {
        int(token_id): AddedToken(
            content, normalized=content not in special, special=content in special
        )
        for content, token_id in read_json(directory / "added_tokens.json").items()
    }


def _extra_special_tokens(
    settings: dict[str, Any], by_content: dict[str, AddedToken]
) -> list[AddedToken]:
    """Special tokens without one of the usual names, in the order of the file, each once."""
    values: list[Any] = []
    for name in ("extra_special_tokens", "additional_special_tokens"):
        group = settings.get(name) or []
        values += group.values() if isinstance(group, dict) else group
    values += [
        value
        for name, value in settings.items()
        if name.endswith("_token") and name not in NAMED_TOKENS and isinstance(value, str)
    ]
    unique = {_content(value): value for value in reversed(values)}
    return [_as_token(value, by_content) for value in reversed(unique.values())]


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _as_token(value: Any, by_content: dict[str, AddedToken]) -> AddedToken:
    content = _content(value)
    if content in by_content:
        return by_content[content]
    if not isinstance(value, dict):
        return AddedToken(content, special=True, normalized=False)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    known = {name: bool(value[name]) for name in flags if name in value}
    return AddedToken(content, **{"special": True, **known})


def _chat_templates(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Template files win over the entry in ``tokenizer_config.json``, as for Hugging Face."""
    templates: dict[str, str] = {}
    if (path := directory / "chat_template.jinja").is_file():
        templates["default"] = path.read_text(encoding="utf-8")
    for path in sorted((directory / _TEMPLATE_DIRECTORY).glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if templates:
        return templates
    for entry in (
        settings.get("chat_template"),
        read_json(directory / "chat_template.json").get("chat_template"),
    ):
        if isinstance(entry, str):
            return {"default": entry}
        if isinstance(entry, list):
            return {str(item["name"]): str(item["template"]) for item in entry}
        if isinstance(entry, dict):
            return {str(name): str(template) for name, template in entry.items()}
    return {}
