"""Log-probabilities in the forms of the API."""

from frontend.openai.logprobs import (
    FLOOR,
    CompletionLogprobs,
    chat_logprobs,
    prompt_logprobs_body,
)
from frontend.outputs import Logprob

BEST, CHOSEN = Logprob(-0.1, 1, "a"), Logprob(-9.0, 7, "z")
POSITION = {26: CHOSEN, 1: BEST, 2: Logprob(float("-inf"), 2, "b")}


def test_offsets_run_on_over_the_pieces_of_a_stream() -> None:
    logprobs = CompletionLogprobs(1, as_ids=False)
    first = logprobs.take([26, 1], [POSITION, {1: BEST}])
    second = logprobs.take([26], [POSITION])
    assert (first["text_offset"], second["text_offset"]) == ([0, 1], [2])
    assert first["top_logprobs"][0] == {"z": -9.0, "a": -0.1}


def test_zero_rivals_leave_the_chosen_token() -> None:
    assert CompletionLogprobs(0, as_ids=False).take([26], [POSITION])["top_logprobs"] == [
        {"z": -9.0}
    ]
    assert chat_logprobs([26], [POSITION], 0, as_ids=False)["content"][0]["top_logprobs"] == []


def test_of_two_tokens_with_one_text_the_likelier_stays() -> None:
    position = {1: BEST, 5: Logprob(-3.0, 2, "a")}
    top = CompletionLogprobs(2, as_ids=False).take([1], [position])["top_logprobs"]
    assert top == [{"a": -0.1}]


def test_minus_infinity_becomes_the_floor_everywhere() -> None:
    content = chat_logprobs([26], [POSITION], 2, as_ids=False)["content"]
    assert [rival["logprob"] for rival in content[0]["top_logprobs"]] == [-0.1, FLOOR]
    body = prompt_logprobs_body([None, POSITION])
    assert body[0] is None
    assert body[1] is not None
    assert body[1]["2"]["logprob"] == FLOOR


def test_tokens_without_text_are_named_by_id_and_the_first_of_a_prompt_by_its_text() -> None:
    taken = CompletionLogprobs(1, as_ids=False).take([4], [{4: Logprob(-1.0, 1, None)}])
    assert taken["tokens"] == ["token_id:4"]
    named = CompletionLogprobs(1, as_ids=False, text_of=lambda i: f"<{i}>").take([4], [None])
    assert (named["tokens"], named["token_logprobs"]) == (["<4>"], [None])
    by_id = CompletionLogprobs(1, as_ids=True, text_of=lambda i: f"<{i}>").take([4], [None])
    assert by_id["tokens"] == ["token_id:4"]
