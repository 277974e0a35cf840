"""Small things that programs written for vLLM import, and that we have no other place for."""

import argparse
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from frontend.model_files import check_custom_code, find_directory
from frontend.tokenizer import Tokenizer, load_tokenizer_directory

CONTRACT_VERSION = "0.4.3"  # whose public surface this is


class TextPrompt(TypedDict, total=False):
    """A prompt given as text."""

    prompt: str
    multi_modal_data: Any


class TokensPrompt(TypedDict, total=False):
    """A prompt given as token ids."""

    prompt_token_ids: list[int]
    multi_modal_data: Any


class TextTokensPrompt(TypedDict, total=False):
    """A prompt given as both; the ids are used."""

    prompt: str
    prompt_token_ids: list[int]
    multi_modal_data: Any


PromptStrictInputs = str | TextPrompt | TokensPrompt
PromptInputs = PromptType = PromptStrictInputs | TextTokensPrompt


class Counter:
    """Numbers in order, from ``start``."""

    def __init__(self, start: int = 0) -> None:
        self.counter = start

    def __next__(self) -> int:
        number = self.counter
        self.counter += 1
        return number

    def reset(self) -> None:
        """Begin again at zero."""
        self.counter = 0


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Takes ``--max_model_len`` for ``--max-model-len``."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As the parent class, after writing flags with dashes."""
        import sys

        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_dashed(word) for word in words], namespace)


def random_uuid() -> str:
    """A fresh request id."""
    return uuid.uuid4().hex


def init_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    return logging.getLogger(name)


def get_tokenizer(
    tokenizer_name: str,
    *_: Any,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    download_dir: str | None = None,
) -> Tokenizer:
    """Load a tokenizer by directory or name.

    Raises:
        ConfigError: there is none.
    """
    directory = find_directory(
        tokenizer_name,
        flag="--tokenizer",
        revision=tokenizer_revision or revision,
        download_dir=download_dir,
    )
    check_custom_code(Path(directory), trust_remote_code=trust_remote_code)
    return load_tokenizer_directory(
        directory, mode=tokenizer_mode, trust_remote_code=trust_remote_code
    )


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
