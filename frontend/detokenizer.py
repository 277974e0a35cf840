"""Token ids to text, a few at a time, for one branch of one request.

The pieces returned, joined, are the text that the output ids add to the prompt's text: the same
characters as decoding everything at once. A character whose bytes are not all there yet is held
back, so no replacement character appears that the whole text does not have.

Knows nothing of requests, stop strings or clocks.
"""

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from typing import Protocol

from frontend.pieces import BytePieces, TextPieces
from frontend.tokenizer import Tokenizer, clean_up_spaces

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one growing list of token ids."""

    __slots__ = ("append", "finish")

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        """Start after a prompt, which decides whether a leading space is text or padding."""
        pieces = tokenizer.pieces(skip_special_tokens)
        stream: _Stream
        if isinstance(pieces, BytePieces):
            stream = _ByteStream(pieces)
        elif isinstance(pieces, TextPieces):
            stream = _PieceStream(pieces, prompt_token_ids)
        elif tokenizer.is_fast:
            stream = _WindowStream(
                lambda ids: tokenizer.decode_raw(ids, skip_special_tokens), prompt_token_ids
            )
        else:
            stream = _WindowStream(
                lambda ids: tokenizer.decode(
                    ids, skip_special_tokens, spaces_between_special_tokens
                ),
                prompt_token_ids,
            )
        if tokenizer.is_fast and tokenizer.cleans_up_spaces:
            stream = _CleanStream(stream)
        # Takes in new ids; returns the text that is now certain, possibly "".
        self.append: Callable[[Sequence[int]], str] = stream.append
        # Returns the rest: what was held back for ids that will not come.
        self.finish: Callable[[], str] = stream.finish


class _Stream(Protocol):
    def append(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class _ByteStream:
    """Byte-level vocabularies: bytes in, UTF-8 out, the unfinished character kept."""

    __slots__ = ("_pending", "_pieces", "_texts")

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._texts = pieces.texts
        self._pending = b""

    def append(self, ids: Sequence[int]) -> str:
        if len(ids) == 1 and not self._pending:
            text = self._texts.get(ids[0])
            if text is not None:
                return text
        pieces = self._pieces
        new = pieces[ids[0]] if len(ids) == 1 else b"".join([pieces[i] for i in ids])
        data = self._pending + new if self._pending else new
        text, num_used = utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class _PieceStream:
    """Sentencepiece-style vocabularies: text pieces, and runs of single bytes.

    A run is valid UTF-8 as a whole, or each of its bytes is a replacement character. So a run
    is held until a token that is no byte ends it.
    """

    __slots__ = ("_is_first", "_num_strip", "_pieces", "_run")

    def __init__(self, pieces: TextPieces, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._run = bytearray()
        self._is_first = all(pieces[i] is None for i in prompt_token_ids)
        has_text = any(pieces[i] not in (None, "") for i in prompt_token_ids)
        self._num_strip = 0 if has_text else pieces.num_strip

    def append(self, ids: Sequence[int]) -> str:
        if len(ids) == 1 and not (self._run or self._is_first or self._num_strip):
            piece = self._pieces[ids[0]]
            if isinstance(piece, str):
                return piece
        parts = []
        for token_id in ids:
            piece = self._pieces[token_id]
            if piece is None:
                continue
            if self._is_first:
                piece = self._pieces.first(token_id)
                self._is_first = False
            if isinstance(piece, int):
                self._run.append(piece)
                continue
            if self._run:
                parts.append(self._end_run())
            assert piece is not None, "first() and the table disagree about what is skipped"
            parts.append(piece)
        return self._stripped("".join(parts))

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = _REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        while self._num_strip and text:
            if not text.startswith(self._pieces.strip):
                self._num_strip = 0
                break
            text = text[len(self._pieces.strip) :]
            self._num_strip -= 1
        return text


class _WindowStream:
    """Any other decoder: decode a short window twice, without and with the new ids.

    ``_ids[:_num_read]`` have been returned as text and are kept as context. Right for decoders
    whose text for a token depends on its neighbours and on whether it is the first. So the
    context, where there was any text before, has some text too.
    """

    __slots__ = ("_decode", "_ids", "_num_read")

    CONTEXT = 6  # ids of context kept at least; a character has at most four bytes
    MAX_HELD = 12  # a replacement character this old is part of the text

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int]
    ) -> None:
        self._decode = decode
        self._ids = self._context_of(prompt_token_ids)
        self._num_read = len(self._ids)

    def append(self, ids: Sequence[int]) -> str:
        parts = []
        for token_id in ids:
            self._ids.append(token_id)
            num_held = len(self._ids) - self._num_read
            parts.append(self._take(is_forced=num_held >= self.MAX_HELD))
        return "".join(parts)

    def finish(self) -> str:
        return self._take(is_forced=True)

    def _take(self, *, is_forced: bool) -> str:
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and not is_forced:
            return ""
        known = self._decode(self._ids[: self._num_read])
        if len(self._ids) > 4 * self.CONTEXT:
            self._ids = self._context_of(self._ids)
        self._num_read = len(self._ids)
        return text[len(known) :]

    def _context_of(self, ids: Sequence[int]) -> list[int]:
        """The last ids, as many as it takes to have some text."""
        num_kept = self.CONTEXT
        while num_kept < len(ids) and not self._decode(ids[-num_kept:]):
            num_kept *= 2
        return list(ids[-num_kept:])


class _CleanStream:
    """``clean_up_spaces`` on another stream.

    Text up to a character that occurs in none of the patterns cannot change any more.
    """

    __slots__ = ("_held", "_stream")

    _PATTERN_CHARACTERS = " .?!,'ntmsver"

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._held = ""

    def append(self, ids: Sequence[int]) -> str:
        text = self._held + self._stream.append(ids)
        num_held = len(text) - len(text.rstrip(self._PATTERN_CHARACTERS))
        num_sure = len(text) - num_held
        self._held = text[num_sure:]
        return clean_up_spaces(text[:num_sure])

    def finish(self) -> str:
        return clean_up_spaces(self._held + self._stream.finish())
