"""Logprobs carry ranks and texts; the chosen token comes first."""

from frontend.logprobs import LogprobDecoder
from frontend.outputs import Logprob
from frontend.tokenizer import load_tokenizer_directory
from ipc.messages import TokenLogprobs
from tests.frontend.builders import TINY, make_tokenizer


def test_the_chosen_token_comes_first_and_keeps_its_rank() -> None:
    decoder = LogprobDecoder(make_tokenizer())
    found = decoder.decode(TokenLogprobs([99, 97, 98], [-3.0, -0.5, -1.0], 17))
    assert list(found.items()) == [
        (99, Logprob(-3.0, 17, "c")),
        (97, Logprob(-0.5, 1, "a")),
        (98, Logprob(-1.0, 2, "b")),
    ]


def test_a_chosen_token_among_the_likely_ones_appears_once() -> None:
    decoder = LogprobDecoder(make_tokenizer())
    found = decoder.decode(TokenLogprobs([98, 97, 98], [-1.0, -0.5, -1.0], 2))
    assert {token_id: logprob.rank for token_id, logprob in found.items()} == {98: 2, 97: 1}


def test_without_tokenizer_there_is_no_text() -> None:
    found = LogprobDecoder(None).decode(TokenLogprobs([1], [-1.0], 1))
    assert found[1].decoded_token is None


def test_a_real_vocabulary_keeps_leading_spaces() -> None:
    tokenizer = load_tokenizer_directory(TINY)
    (token_id,) = tokenizer.encode(" return", add_special_tokens=False)
    found = LogprobDecoder(tokenizer).decode(TokenLogprobs([token_id], [-1.0], 1))
    assert found[token_id].decoded_token == " return"
