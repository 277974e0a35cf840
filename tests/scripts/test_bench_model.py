"""Models by name, and a made-up tokenizer that decodes as a real one does."""

from pathlib import Path

import bench_model
import pytest
from tokenizers import Tokenizer

from frontend.pieces import BytePieces, compile_pieces


def test_shapes_are_found_by_name_and_get_random_weights() -> None:
    model = bench_model.find_model("qwen3-0.6b")
    assert (model.load_format, model.max_model_len, model.vocab_size) == ("dummy", 40_960, 151_936)
    assert model.id_range == (1000, 100_000)
    assert not model.has_tokenizer


def test_the_bundled_model_has_weights_and_a_small_vocabulary() -> None:
    model = bench_model.find_model("tiny")
    assert (model.load_format, model.max_model_len) == ("auto", 2048)
    assert model.id_range[1] <= model.vocab_size
    assert model.has_tokenizer


def test_an_unknown_model_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"nonsense.*llama-8b"):
        bench_model.find_model("nonsense")


def test_every_id_of_the_made_up_tokenizer_has_a_text_of_its_own(tmp_path: Path) -> None:
    bench_model.write_tokenizer(tmp_path, 2000)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.get_vocab_size() == 2000
    texts = [backend.decode([token_id]) for token_id in range(256, 2000)]
    assert len(set(texts)) == len(texts)
    assert sum(text.startswith(" ") for text in texts) == pytest.approx(872, abs=30)


def test_the_made_up_tokenizer_streams_by_byte_pieces(tmp_path: Path) -> None:
    bench_model.write_tokenizer(tmp_path, 1000)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = compile_pieces(backend, skip_special_tokens=True)
    assert isinstance(pieces, BytePieces)
    ids = list(range(300, 340))
    assert b"".join(pieces[i] for i in ids).decode() == backend.decode(ids)
