"""Which decoders are made of pieces, and which are not."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from frontend.pieces import BytePieces, TextPieces, compile_pieces
from tests.frontend.make_tokenizers import TINY, sentencepiece_style

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@pytest.mark.parametrize(
    ("decoder", "kind"),
    [
        pytest.param(decoders.ByteLevel(), BytePieces, id="byte level"),
        pytest.param(decoders.Sequence([decoders.ByteLevel()]), BytePieces, id="a list of one"),
        pytest.param(decoders.Sequence(LLAMA), TextPieces, id="fused"),
        pytest.param(
            decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]), TextPieces, id="stripped"
        ),
        pytest.param(decoders.Metaspace(), TextPieces, id="metaspace"),
        pytest.param(
            decoders.Sequence([*LLAMA, decoders.Strip(" ", 0, 1)]), type(None), id="end stripped"
        ),
        pytest.param(
            decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
            type(None),
            id="each token stripped",
        ),
        pytest.param(
            decoders.Sequence([*LLAMA, decoders.Replace("a", "b")]), type(None), id="changed late"
        ),
        pytest.param(decoders.CTC(), type(None), id="duplicates removed"),
        pytest.param(decoders.WordPiece(), type(None), id="word pieces"),
    ],
)
def test_only_decoders_that_work_token_by_token_have_pieces(decoder: object, kind: type) -> None:
    backend = sentencepiece_style(decoder)
    assert type(compile_pieces(backend, skip_special_tokens=True)) is kind


def test_byte_pieces_are_bytes_of_the_token() -> None:
    backend = Backend.from_file(str(TINY / "tokenizer.json"))
    pieces = compile_pieces(backend, skip_special_tokens=True)
    assert isinstance(pieces, BytePieces)
    assert pieces[backend.token_to_id("Ġdef")] == b" def"
    assert pieces[backend.token_to_id("<|im_end|>")] == b""
    assert pieces[10**6] == b""
    kept = compile_pieces(backend, skip_special_tokens=False)
    assert isinstance(kept, BytePieces)
    assert kept[backend.token_to_id("<|im_end|>")] == b"<|im_end|>"


def test_text_pieces_tell_bytes_from_text() -> None:
    pieces = compile_pieces(sentencepiece_style(), skip_special_tokens=True)
    assert isinstance(pieces, TextPieces)
    backend = sentencepiece_style()
    assert pieces[backend.token_to_id("<0x41>")] == 0x41
    assert pieces[backend.token_to_id("▁the")] == " the"
    assert pieces[backend.token_to_id("<s>")] is None
    assert (pieces.strip, pieces.num_strip) == (" ", 1)
