"""Settings files of tokenizers, in the precedence that Hugging Face applies."""

import json
from pathlib import Path
from typing import Any

import pytest

from frontend.tokenizer_config import NO_LENGTH_LIMIT, read_json, read_tokenizer_config
from ipc.errors import ConfigError
from tests.frontend.make_tokenizers import TINY


def write(directory: Path, **files: Any) -> Path:
    """JSON files by stem."""
    for stem, content in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content))
    return directory


def test_tiny_model_declares_its_special_tokens_and_template() -> None:
    config = read_tokenizer_config(TINY)
    assert config.named_tokens["eos_token"].content == "<|im_end|>"
    assert [token.content for token in config.extra_special_tokens] == [
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert sorted(config.added_tokens) == [0, 1, 2, 3]
    assert config.model_max_length == 2048
    assert isinstance(config.chat_template, str)
    assert "<|im_start|>" in config.chat_template


def test_nothing_there_means_defaults(tmp_path: Path) -> None:
    config = read_tokenizer_config(tmp_path)
    assert config.named_tokens == {}
    assert config.chat_template is None
    assert config.model_max_length == NO_LENGTH_LIMIT


def test_special_tokens_map_counts_only_for_old_directories(tmp_path: Path) -> None:
    names = {"eos_token": {"content": "</s>", "lstrip": True}, "unk_token": "<unk>"}
    old = write(
        tmp_path,
        tokenizer_config={"eos_token": "<old>"},
        special_tokens_map=names,
        added_tokens={"</s>": 7, "word": 8},
    )
    config = read_tokenizer_config(old)
    assert config.named_tokens["eos_token"].content == "</s>"
    assert config.named_tokens["unk_token"].content == "<unk>"
    assert config.added_tokens[7].special
    assert not config.added_tokens[8].special
    write(tmp_path, tokenizer_config={"eos_token": "<new>", "added_tokens_decoder": {}})
    assert read_tokenizer_config(tmp_path).named_tokens["eos_token"].content == "<new>"


def test_tokens_with_unusual_names_are_special_too(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_config={"image_token": "<image>", "extra_special_tokens": {"audio": "<audio>"}},
    )
    contents = [token.content for token in read_tokenizer_config(tmp_path).extra_special_tokens]
    assert contents == ["<audio>", "<image>"]


def test_template_files_win_over_the_settings(tmp_path: Path) -> None:
    write(tmp_path, chat_template={"chat_template": "from json"})
    assert read_tokenizer_config(tmp_path).chat_template == "from json"
    write(tmp_path, tokenizer_config={"chat_template": "from settings"})
    assert read_tokenizer_config(tmp_path).chat_template == "from settings"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert read_tokenizer_config(tmp_path).chat_template == "from jinja"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert read_tokenizer_config(tmp_path).chat_template == {
        "default": "from jinja",
        "tool_use": "tools",
    }


def test_templates_may_come_as_a_list_of_names(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    write(tmp_path, tokenizer_config={"chat_template": templates})
    assert read_tokenizer_config(tmp_path).chat_template == {"default": "a", "rag": "b"}


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"], ids=["cut off", "a list", "no JSON"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        read_tokenizer_config(tmp_path)


def test_absent_files_are_empty(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") == {}
