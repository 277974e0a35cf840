"""What each token id adds to the text, for tokenizers whose decoder works token by token.

A decoder of the ``tokenizers`` library is a list of stages. For two families, which cover nearly
every generative model, the text is a concatenation of pieces that depend on one token each, so a
stream can be decoded by looking pieces up:

* byte level: each token stands for some bytes, the text is their UTF-8;
* sentencepiece style: each token stands for text, or for one byte of a character that the
  vocabulary lacks; a run of such bytes is decoded as a whole.

Any other decoder has no pieces, and ``compile_pieces`` says so with None.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>")


class BytePieces(dict[int, bytes]):
    """Token id -> bytes, filled when first asked for. Skipped and unknown ids are b"".

    ``texts`` holds, of those asked for, the ones that are whole characters, as text.
    """

    def __init__(self, id_to_token: Callable[[int], str | None]) -> None:
        super().__init__()
        self.texts: dict[int, str] = {}
        self._id_to_token = id_to_token
        self._byte_of = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id) or ""
        try:
            piece = bytes(map(self._byte_of.__getitem__, token))
        except KeyError:  # an added token is written as plain text
            piece = token.encode()
        self[token_id] = piece
        with suppress(UnicodeDecodeError):
            self.texts[token_id] = piece.decode()
        return piece


class TextPieces(dict[int, str | int | None]):
    """Token id -> its text, the value of its byte, or None for skipped and unknown ids.

    The very first token of a text may lose its space: ask ``first`` for it. From the start of
    the whole text, up to ``num_strip`` characters ``strip`` are cut.
    """

    def __init__(self, id_to_token: Callable[[int], str | None], stages: "_Stages") -> None:
        super().__init__()
        self._id_to_token = id_to_token
        self._stages = stages
        self.strip = stages.strip
        self.num_strip = stages.num_strip

    def __missing__(self, token_id: int) -> str | int | None:
        piece = self._piece(token_id, is_first=False)
        self[token_id] = piece
        return piece

    def first(self, token_id: int) -> str | int | None:
        """The piece of a token at the very start of a text."""
        return self._piece(token_id, is_first=True)

    def _piece(self, token_id: int, *, is_first: bool) -> str | int | None:
        token = self._id_to_token(token_id)
        if token is None:
            return None
        for stage in self._stages.per_token:
            token = stage(token, is_first)
        if self._stages.has_byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return token


Pieces = BytePieces | TextPieces


def compile_pieces(backend: Backend, *, skip_special_tokens: bool) -> Pieces | None:
    """The pieces of a tokenizer, or None when its decoder is of another kind."""
    id_to_token: Callable[[int], str | None] = backend.id_to_token
    if skip_special_tokens:
        special = {
            token.content for token in backend.get_added_tokens_decoder().values() if token.special
        }

        def id_to_token(token_id: int) -> str | None:
            token: str | None = backend.id_to_token(token_id)
            return None if token in special else token

    decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    stages = _flatten(decoder)
    if [stage["type"] for stage in stages] == ["ByteLevel"]:
        return BytePieces(id_to_token)
    compiled = _Stages()
    if decoder is None:  # without a decoder, tokens are joined by spaces
        compiled.per_token.append(_space_before)
    elif not all(compiled.add(stage) for stage in stages):
        return None
    return TextPieces(id_to_token, compiled)


class _Stages:
    """The stages of a sentencepiece-style decoder, in the only order that pieces can express.

    Stages on single tokens, then byte fallback, then fusing, then cutting spaces at the start.
    """

    def __init__(self) -> None:
        self.per_token: list[Callable[[str, bool], str]] = []
        self.has_byte_fallback = False
        self.strip = " "
        self.num_strip = 0
        self._is_fused = False

    def add(self, stage: dict[str, Any]) -> bool:
        """Take in the next stage; False when it cannot be expressed."""
        kind = stage["type"]
        if self.num_strip or (self._is_fused and kind != "Strip"):
            return kind == "Fuse" and not self.num_strip
        if kind == "Fuse":
            self._is_fused = True
            return True
        if kind == "Strip":
            self.strip, self.num_strip = stage["content"], stage["start"]
            return self._is_fused and stage["stop"] == 0
        if self.has_byte_fallback:
            return False
        if kind == "ByteFallback":
            self.has_byte_fallback = True
            return True
        per_token = _per_token_stage(stage)
        if per_token is None:
            return False
        self.per_token.append(per_token)
        return True


def _per_token_stage(stage: dict[str, Any]) -> Callable[[str, bool], str] | None:
    if stage["type"] == "Replace" and "String" in stage["pattern"]:
        pattern, content = stage["pattern"]["String"], stage["content"]
        return lambda token, is_first: token.replace(pattern, content)
    if stage["type"] == "Metaspace":
        mark, drops_first = stage["replacement"], stage["prepend_scheme"] != "never"
        return lambda token, is_first: token.replace(mark, "" if is_first and drops_first else " ")
    return None


def _space_before(token: str, is_first: bool) -> str:
    return token if is_first else f" {token}"


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [stage for part in decoder["decoders"] for stage in _flatten(part)]


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Source: the GPT-2 encoder. Printable Latin-1 characters stand for themselves; the other
    bytes take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in alphabet.values()]
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
