"""Streams of ids become the same text as decoding them at once. No model, no engine."""

import random
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from frontend.detokenizer import Detokenizer
from frontend.tokenizer import FastTokenizer, Tokenizer, load_tokenizer_directory
from tests.frontend.make_tokenizers import TINY, fast, sentencepiece_style, word_pieces

TOKENIZERS = {
    "byte level": lambda: load_tokenizer_directory(TINY),
    "sentencepiece style": lambda: fast(sentencepiece_style()),
    "sentencepiece style, nothing stripped": lambda: fast(
        sentencepiece_style(
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
        )
    ),
    "metaspace": lambda: fast(sentencepiece_style(decoders.Metaspace())),
    "metaspace, never prepended": lambda: fast(
        sentencepiece_style(decoders.Metaspace(prepend_scheme="never"))
    ),
    "word pieces": lambda: fast(word_pieces()),
    "word pieces, cleaned up by the decoder": lambda: fast(
        word_pieces(decoders.WordPiece(cleanup=True))
    ),
    "word pieces, cleaned up by the settings": lambda: fast(
        word_pieces(), clean_up_tokenization_spaces=True
    ),
    "joined by spaces": lambda: fast(_without_decoder()),
    "suffixes": lambda: fast(sentencepiece_style(decoders.BPEDecoder("o"))),
}


def _without_decoder() -> Backend:
    backend = word_pieces()
    backend.decoder = None
    return backend


def stream(tokenizer: Tokenizer, ids: list[int], rng: random.Random, **options: object) -> str:
    """Detokenise in chunks of random size; no chunk may end inside a character."""
    detokenizer = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    text, start = "", 0
    while start < len(ids):
        end = start + rng.randrange(1, 5)
        text += detokenizer.append(ids[start:end])
        start = end
    return text + detokenizer.finish()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False], ids=["special skipped", "special kept"])
def test_joined_chunks_are_the_text_decoded_at_once(name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    rng = random.Random(name)
    largest = tokenizer.vocab_size + 20  # ids beyond the vocabulary decode to nothing
    for _ in range(10_000 if name == "byte level" else 400):
        ids = [rng.randrange(largest) for _ in range(rng.randrange(40))]
        spaces = rng.random() < 0.5
        text = stream(
            tokenizer, ids, rng, skip_special_tokens=skip, spaces_between_special_tokens=spaces
        )
        assert text == tokenizer.decode(ids, skip, spaces), ids


@pytest.mark.parametrize("text", ["Grüße 🙂🙃 你好", "naïve café\n\ttab", "日本語のテキスト"])
@pytest.mark.parametrize("name", ["byte level", "sentencepiece style"])
def test_no_chunk_shows_a_character_before_all_its_bytes_are_there(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    detokenizer = Detokenizer(tokenizer)
    chunks = [detokenizer.append([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert "\ufffd" not in "".join(chunks)
    assert "".join(chunks) + detokenizer.finish() == text


@pytest.mark.parametrize("name", ["byte level", "sentencepiece style", "metaspace", "word pieces"])
def test_text_after_a_prompt_is_what_the_ids_add_to_the_prompts_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    rng = random.Random(3)
    words = range(4, 4 + 9) if name == "word pieces" else _whole_words(tokenizer)
    for _ in range(200):
        prompt = [rng.choice(words) for _ in range(rng.randrange(6))]
        ids = [rng.choice(words) for _ in range(rng.randrange(1, 10))]
        whole = tokenizer.decode(prompt + ids)
        added = stream(tokenizer, ids, rng, prompt_token_ids=prompt)
        assert tokenizer.decode(prompt) + added == whole


def _whole_words(tokenizer: FastTokenizer) -> list[int]:
    """Ids whose text is whole characters."""
    ids = range(3, tokenizer.vocab_size)
    return [i for i in ids if "\ufffd" not in tokenizer.decode([i]) and tokenizer.decode([i])]


def test_space_before_the_first_word_stays_after_a_prompt_and_goes_without_one() -> None:
    tokenizer = TOKENIZERS["sentencepiece style"]()
    the = tokenizer.get_vocab()["▁the"]
    bos = tokenizer.get_vocab()["<s>"]
    assert Detokenizer(tokenizer).append([the]) == "the"
    assert Detokenizer(tokenizer, prompt_token_ids=[bos]).append([the]) == "the"
    assert Detokenizer(tokenizer, prompt_token_ids=[bos, the]).append([the]) == " the"


def test_a_run_of_bytes_is_held_until_it_ends() -> None:
    tokenizer = TOKENIZERS["sentencepiece style"]()
    vocab = tokenizer.get_vocab()
    euro = [vocab[f"<0x{byte:02X}>"] for byte in "€".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.append([i]) for i in euro] == ["", "", ""]
    assert detokenizer.append([vocab["."]]) == "€."
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.append([*euro, vocab["<0xFF>"]]) == ""
    assert detokenizer.finish() == "\ufffd" * 4  # one-shot decoding spoils the whole run, too


def test_truly_invalid_bytes_give_replacement_characters_at_once() -> None:
    tokenizer = TOKENIZERS["byte level"]()
    byte_ff = tokenizer.convert_tokens_to_ids("ÿ")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.append([byte_ff, byte_ff]) == "\ufffd\ufffd"
    assert detokenizer.finish() == ""


def test_clean_up_holds_back_only_what_may_still_change() -> None:
    tokenizer = TOKENIZERS["word pieces, cleaned up by the settings"]()
    vocab = tokenizer.get_vocab()
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.append([vocab["play"], vocab["##ing"]]) == "playing"
    assert detokenizer.append([vocab["!"]]) == ""
    assert detokenizer.append([vocab["play"]]) == "! play"


def test_plain_text_costs_at_most_eight_microseconds_per_token() -> None:
    tokenizer = TOKENIZERS["byte level"]()
    ids = tokenizer.encode(Path(__file__).read_text()) * 3
    seconds = []
    for _ in range(5):
        detokenizer = Detokenizer(tokenizer)
        start = time.perf_counter()
        for token_id in ids:
            detokenizer.append([token_id])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) / len(ids) < 8e-6
