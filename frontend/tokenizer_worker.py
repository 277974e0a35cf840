"""One tokenizer in a process of its own: ``python -m frontend.tokenizer_worker``.

Speaks length-prefixed msgpack on stdin and stdout: a ``TokenizerSource`` first, then any number of
``EncodeTask``, each answered by one ``Encoded``. Ends when stdin does.
"""

import os
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from frontend.tokenizer import Tokenizer, load_tokenizer_directory

_LENGTH_BYTES = 8


class TokenizerSource(msgspec.Struct, frozen=True):
    """Which tokenizer to load."""

    directory: str
    mode: str
    trust_remote_code: bool


class EncodeTask(msgspec.Struct, frozen=True):
    """A text to tokenise."""

    text: str
    add_special_tokens: bool


class Encoded(msgspec.Struct, frozen=True):
    """The answer: ids, or why there are none."""

    token_ids: list[int] = []
    error: str | None = None


def write_frame(stream: BinaryIO, message: msgspec.Struct) -> None:
    """Send one message."""
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """Wait for one message; None when the other side is gone."""
    header = stream.read(_LENGTH_BYTES)
    if len(header) < _LENGTH_BYTES:
        return None
    num_bytes = int.from_bytes(header, "big")
    data = stream.read(num_bytes)
    return data if len(data) == num_bytes else None


def load_source(source: TokenizerSource) -> Tokenizer:
    """The tokenizer that a source names."""
    return load_tokenizer_directory(
        Path(source.directory), mode=source.mode, trust_remote_code=source.trust_remote_code
    )


def main() -> int:
    """Load the tokenizer, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    requests = sys.stdin.buffer
    first = read_frame(requests)
    if first is None:
        return 0
    tokenizer = load_source(msgspec.msgpack.decode(first, type=TokenizerSource))
    decoder = msgspec.msgpack.Decoder(EncodeTask)
    while (data := read_frame(requests)) is not None:
        task = decoder.decode(data)
        try:
            answer = Encoded(tokenizer.encode(task.text, task.add_special_tokens))
        except (ValueError, TypeError) as err:  # a RequestError is the former
            answer = Encoded(error=str(err))
        write_frame(answers, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
