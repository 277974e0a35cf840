"""Tokenizers that only transformers can load, behind our interface."""

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from frontend.detokenizer import Detokenizer
from frontend.tokenizer import as_tokenizer, load_tokenizer_directory
from frontend.transformers_tokenizer import TransformersTokenizer
from ipc.errors import ConfigError
from tests.frontend.make_tokenizers import TINY


def write_byte_tokenizer(directory: Path, **settings: object) -> Path:
    """A tokenizer written in Python that needs no vocabulary file."""
    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "extra_ids": 3} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "t5"}))
    return directory


def test_a_directory_without_tokenizer_json_is_loaded_by_transformers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer_directory(write_byte_tokenizer(tmp_path))
    assert isinstance(tokenizer, TransformersTokenizer)
    assert not tokenizer.is_fast
    ids = tokenizer.encode("héllo")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "héllo"
    assert tokenizer.convert_ids_to_tokens([10**6]) == [""]
    assert max(tokenizer.get_vocab().values()) < tokenizer.vocab_size
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
    assert tokenizer.pieces(True) is None


def test_slow_tokenizers_are_detokenised_character_by_character(tmp_path: Path) -> None:
    tokenizer = load_tokenizer_directory(write_byte_tokenizer(tmp_path))
    text = "naïve 🙂 text, 你好"
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    chunks = [detokenizer.append([i]) for i in ids]
    assert "".join(chunks) + detokenizer.finish() == text
    assert "\ufffd" not in "".join(chunks)


def test_slow_mode_goes_through_transformers_even_with_a_fast_file() -> None:
    tokenizer = load_tokenizer_directory(TINY, mode="slow")
    assert isinstance(tokenizer, TransformersTokenizer)
    fast = load_tokenizer_directory(TINY)
    assert tokenizer.encode("def f(x): 🙂") == fast.encode("def f(x): 🙂")
    assert tokenizer.eos_token_id == fast.eos_token_id
    assert tokenizer.chat_template == fast.chat_template


def test_a_tokenizer_that_the_user_brings_detokenises_exactly() -> None:
    tokenizer = as_tokenizer(PreTrainedTokenizerFast.from_pretrained(str(TINY)))
    assert isinstance(tokenizer, TransformersTokenizer)
    assert as_tokenizer(tokenizer) is tokenizer
    rng = random.Random(5)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.append([i]) for i in ids) + detokenizer.finish()
        assert text == tokenizer.decode(ids)
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == 8192


def test_code_of_its_own_is_refused_unless_allowed(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["own_code.Tokenizer", None]}
    write_byte_tokenizer(tmp_path, auto_map=auto_map)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load_tokenizer_directory(tmp_path)


def test_an_empty_directory_holds_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer: .* holds no tokenizer"):
        load_tokenizer_directory(tmp_path)
