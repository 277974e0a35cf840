"""Text to token ids and back.

The fast path needs the ``tokenizers`` library alone and starts in milliseconds; it applies a
checkpoint's special-token rules as Hugging Face's fast tokenizers do. A directory without
``tokenizer.json``, or the mode "slow", goes through ``transformers``, imported at that moment.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

from frontend.pieces import Pieces, compile_pieces
from frontend.tokenizer_config import TokenizerConfig, read_tokenizer_config
from ipc.config import ModelConfig
from ipc.errors import ConfigError, RequestError

LONG_TEXT_CHARS = 4096  # longer texts are encoded without holding up other threads


class Tokenizer(Protocol):
    """What the frontend asks of a tokenizer. Token ids without a text decode to nothing."""

    @property
    def is_fast(self) -> bool:
        """Whether the ``tokenizers`` library does the work."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this, added tokens included."""

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-text id."""

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-text id."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """One template, several by name, or None."""

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens: "eos_token" and so on."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the named and the extra special tokens."""

    @property
    def model_max_length(self) -> int:
        """The length that the tokenizer's files declare; 10**30 when they declare none."""

    @property
    def cleans_up_spaces(self) -> bool:
        """Whether ``decode`` removes spaces before punctuation, as ``clean_up_spaces`` does."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids."""

    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str]:
        """The vocabulary's own spelling of each id; "" for an id it does not have."""

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Inverse of ``convert_ids_to_tokens``."""

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, added tokens included."""

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        """What each id adds to a text, where that is well defined."""

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """``decode`` without cleaning up spaces."""


class FastTokenizer:
    """A ``tokenizer.json`` with the settings beside it.

    Also answers to the names that users of Hugging Face's tokenizers know: ``pad_token_id``,
    ``eos_token``, ``len(tokenizer)``, ``tokenizer(text)``, ``batch_decode`` and their like.
    """

    _PUBLIC_CONTRACT = True  # the names are given, and so is their number

    is_fast = True

    def __init__(self, backend: Backend, config: TokenizerConfig, name_or_path: str = "") -> None:
        """Take over ``backend``: special tokens missing from it are added."""
        self._backend = backend
        self._config = config
        self.name_or_path = name_or_path
        backend.no_truncation()  # limits are the engine's business, never silent
        backend.no_padding()
        backend.encode_special_tokens = config.split_special_tokens
        _add_missing_tokens(backend, config)
        self.cleans_up_spaces = (
            config.clean_up_tokenization_spaces and type(backend.model).__name__ != "BPE"
        )
        self.chat_template = config.chat_template
        self.all_special_tokens = list(
            dict.fromkeys(
                token.content
                for token in (*config.named_tokens.values(), *config.extra_special_tokens)
            )
        )
        self._pieces: dict[bool, Pieces | None] = {}
        self._largest_id: int = max(
            (
                backend.get_vocab_size(with_added_tokens=True) - 1,
                *backend.get_added_tokens_decoder(),
            )
        )

    def __getattr__(self, name: str) -> Any:
        """Named special tokens and their ids: ``pad_token``, ``unk_token_id`` and so on."""
        if name.endswith("_token"):
            return self.special_tokens_map.get(name)
        if name.endswith("_token_id"):
            return self._named_id(name.removesuffix("_id"))
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def vocab_size(self) -> int:
        """Token ids are below this, added tokens included."""
        return self._largest_id + 1

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-text id."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-text id."""
        return self._named_id("eos_token")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens."""
        return {name: token.content for name, token in self._config.named_tokens.items()}

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the named and the extra special tokens."""
        ids = map(self._backend.token_to_id, self.all_special_tokens)
        return [token_id for token_id in ids if token_id is not None]

    @property
    def model_max_length(self) -> int:
        """The length that the files declare."""
        return self._config.model_max_length

    @property
    def backend_tokenizer(self) -> Backend:
        """The ``tokenizers`` object underneath."""
        return self._backend

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens are added as the post-processor says.

        Raises:
            RequestError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            if len(text) > LONG_TEXT_CHARS:
                # Only the call for batches lets other threads run; it costs a pool of threads.
                (encoding,) = self._backend.encode_batch(
                    [text], add_special_tokens=add_special_tokens
                )
            else:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as err:
            raise RequestError(f"the text cannot be tokenised: {err}", "prompt") from err
        ids: list[int] = encoding.ids
        return ids

    def decode(
        self,
        ids: int | Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids. Fast tokenizers never put spaces between special tokens."""
        text = self.decode_raw([ids] if isinstance(ids, int) else ids, skip_special_tokens)
        return clean_up_spaces(text) if self.cleans_up_spaces else text

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """``decode`` without cleaning up spaces."""
        known = [token_id for token_id in ids if 0 <= token_id <= self._largest_id]
        text: str = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def batch_decode(
        self, sequences: Iterable[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """The text of each sequence."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str]:
        """The vocabulary's own spelling of each id; "" for an id it does not have."""
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        kept = [token_id for token_id in ids if token_id not in skipped]
        return [
            (self._backend.id_to_token(i) or "") if 0 <= i <= self._largest_id else "" for i in kept
        ]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or of each of several; the unknown token's id where there is none."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self._backend.token_to_id(tokens)
        return self._named_id("unk_token") if token_id is None else token_id

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens in the vocabulary's spelling."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text in the vocabulary's spelling, without special ones."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=False))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **options: Any,
    ) -> str | list[int]:
        """The prompt of a conversation: token ids, or text with ``tokenize=False``.

        Args:
            chat_template: a template, or the name of one of the tokenizer's; None: the default.
            options: ``documents``, ``continue_final_message``, and variables of the template.

        Raises:
            RequestError: there is no template, or it refuses the conversation.
        """
        from frontend.chat_template import render, template_of_tokenizer

        named = self._config.chat_templates
        default = template_of_tokenizer(self.chat_template)
        template = named.get(chat_template, chat_template) if chat_template else default
        if template is None:
            raise RequestError("the tokenizer has no chat template", "chat_template")
        text = render(
            template,
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens_map,
            **options,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, added tokens included."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocab

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens and their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items()}

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        """What each id adds to a text; made once, then shared by every stream."""
        if skip_special_tokens not in self._pieces:
            self._pieces[skip_special_tokens] = compile_pieces(
                self._backend, skip_special_tokens=skip_special_tokens
            )
        return self._pieces[skip_special_tokens]

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True
    ) -> dict[str, list[Any]]:
        """``{"input_ids": …, "attention_mask": …}`` of one text, or of several."""
        if isinstance(text, str):
            ids: list[Any] = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        ids = [self.encode(each, add_special_tokens) for each in text]
        return {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}

    def __len__(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def _named_id(self, name: str) -> int | None:
        token = self._config.named_tokens.get(name)
        if token is None:
            return None
        token_id: int | None = self._backend.token_to_id(token.content)
        return token_id


def load_tokenizer(model_config: ModelConfig) -> Tokenizer:
    """The tokenizer of a resolved model config.

    Raises:
        ConfigError: there is none, its files are broken, or it needs code that
            ``--trust-remote-code`` does not allow.
    """
    directory = Path(model_config.tokenizer_path or model_config.tokenizer or model_config.model)
    return load_tokenizer_directory(
        directory,
        mode=model_config.tokenizer_mode,
        trust_remote_code=model_config.trust_remote_code,
    )


def load_tokenizer_directory(
    directory: Path, *, mode: str = "auto", trust_remote_code: bool = False
) -> Tokenizer:
    """The tokenizer in a directory. Raises as ``load_tokenizer`` does."""
    if not directory.is_dir():
        raise ConfigError(f"--tokenizer: {directory} is not a directory")
    config = read_tokenizer_config(directory)
    path = directory / "tokenizer.json"
    if mode != "slow" and path.is_file():
        try:
            backend = Backend.from_buffer(path.read_bytes())
        except (OSError, ValueError) as err:
            raise ConfigError(f"--tokenizer: {path} cannot be loaded: {err}") from err
        return FastTokenizer(backend, config, str(directory))
    if config.has_custom_code and not trust_remote_code:
        raise ConfigError(
            f"the tokenizer in {directory} brings its own code (auto_map in "
            f"tokenizer_config.json); pass --trust-remote-code to run it"
        )
    from frontend.transformers_tokenizer import load_with_transformers

    return load_with_transformers(
        directory, config, use_fast=mode != "slow", trust_remote_code=trust_remote_code
    )


def as_tokenizer(given: Any) -> Tokenizer:
    """A tokenizer that a user brings, ours or Hugging Face's, behind our interface."""
    if hasattr(given, "pieces"):
        tokenizer: Tokenizer = given
        return tokenizer
    from frontend.transformers_tokenizer import TransformersTokenizer

    return TransformersTokenizer(given)


def clean_up_spaces(text: str) -> str:
    """Remove the spaces that word-piece vocabularies leave before punctuation.

    Source: the clean-up step of Hugging Face's tokenizers, which fixes this list and its order.
    """
    for old in (" .", " ?", " !", " ,"):
        text = text.replace(old, old[1:])
    text = text.replace(" ' ", "'")
    for old in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old[1:])
    return text


def _add_missing_tokens(backend: Backend, config: TokenizerConfig) -> None:
    """Register what the settings declare and ``tokenizer.json`` lacks, in the order of ids."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    missing = [
        token for _, token in sorted(config.added_tokens.items()) if token.content not in known
    ]
    if missing:
        backend.add_tokens(missing)
    special = [
        token
        for token in (*config.named_tokens.values(), *config.extra_special_tokens)
        if token.content not in known or not known[token.content].special
    ]
    if special:
        backend.add_special_tokens(special)
