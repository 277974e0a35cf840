"""The slow door to a tokenizer: whatever ``transformers`` can load, behind our interface.

For directories without ``tokenizer.json``, for ``--tokenizer-mode slow``, for tokenizers that
bring their own code, and for tokenizer objects that a user hands over.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frontend.pieces import Pieces, compile_pieces
from frontend.tokenizer_config import TokenizerConfig
from ipc.errors import ConfigError


class TransformersTokenizer:
    """A Hugging Face tokenizer object. What is not named here is looked up on that object."""

    def __init__(self, inner: Any) -> None:
        """Wrap ``inner``, which stays usable by itself."""
        self.inner = inner
        self.is_fast = bool(getattr(inner, "is_fast", False))
        self._backend = getattr(inner, "backend_tokenizer", None) if self.is_fast else None
        self.cleans_up_spaces = bool(getattr(inner, "clean_up_tokenization_spaces", False)) and (
            self._backend is None or type(self._backend.model).__name__ != "BPE"
        )
        self.vocab_size = _vocab_size(inner)
        self._pieces: dict[bool, Pieces | None] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else that the wrapped tokenizer has."""
        if name == "inner":  # not there yet, as while being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-text id."""
        return _optional_int(self.inner.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-text id."""
        return _optional_int(self.inner.eos_token_id)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """One template, several by name, or None."""
        template: str | dict[str, str] | None = getattr(self.inner, "chat_template", None)
        return template

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens."""
        return {
            name: str(token)
            for name, token in self.inner.special_tokens_map.items()
            if not isinstance(token, list)
        }

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return [int(token_id) for token_id in self.inner.all_special_ids]

    @property
    def model_max_length(self) -> int:
        """The length that the tokenizer declares."""
        return int(self.inner.model_max_length)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids; ids that the vocabulary lacks decode to nothing."""
        if self._backend is None:
            ids = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
        return str(
            self.inner.decode(
                ids,
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
        )

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """``decode`` without cleaning up spaces."""
        if self._backend is None:
            return self.decode(ids, skip_special_tokens)
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str]:
        """The vocabulary's own spelling of each id; "" for an id it does not have."""
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        kept = [token_id for token_id in ids if token_id not in skipped]
        return [
            (self.inner.convert_ids_to_tokens(i) or "") if 0 <= i < self.vocab_size else ""
            for i in kept
        ]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Inverse of ``convert_ids_to_tokens``."""
        return list(self.inner.convert_tokens_to_ids(list(tokens)))

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, added tokens included."""
        return dict(self.inner.get_vocab())

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        """What each id adds to a text, where the tokenizer is a fast one of a known kind."""
        if self._backend is None:
            return None
        if skip_special_tokens not in self._pieces:
            self._pieces[skip_special_tokens] = compile_pieces(
                self._backend, skip_special_tokens=skip_special_tokens
            )
        return self._pieces[skip_special_tokens]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapped tokenizer is called."""
        return self.inner(*args, **kwargs)

    def __len__(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        return len(self.inner)


def load_with_transformers(
    directory: Path, config: TokenizerConfig, *, use_fast: bool, trust_remote_code: bool
) -> TransformersTokenizer:
    """Load a directory with ``AutoTokenizer``.

    Raises:
        ConfigError: the directory holds no tokenizer, or needs code that is not allowed.
    """
    transformers = importlib.import_module("transformers")
    try:
        inner = transformers.AutoTokenizer.from_pretrained(
            str(directory),
            use_fast=use_fast,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as err:
        raise ConfigError(f"--tokenizer: {directory} holds no tokenizer that loads: {err}") from err
    if not getattr(inner, "chat_template", None):
        inner.chat_template = config.chat_template
    return TransformersTokenizer(inner)


def _vocab_size(inner: Any) -> int:
    """One more than the largest id; added tokens may lie beyond gaps."""
    ids = inner.get_vocab().values()
    return max(ids, default=-1) + 1


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
