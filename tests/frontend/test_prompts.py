"""Every form of a prompt is taken apart; anything else is refused with the field's name."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from frontend.prompts import ParsedPrompt, parse_prompt
from ipc.errors import RequestError, UnsupportedError


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        pytest.param("hi", ParsedPrompt("hi", None), id="text"),
        pytest.param([1, 2], ParsedPrompt(None, [1, 2]), id="ids"),
        pytest.param((1, 2), ParsedPrompt(None, [1, 2]), id="ids in a tuple"),
        pytest.param({"prompt": "hi"}, ParsedPrompt("hi", None), id="mapping with text"),
        pytest.param({"prompt_token_ids": [1]}, ParsedPrompt(None, [1]), id="mapping with ids"),
        pytest.param(
            {"prompt": "hi", "prompt_token_ids": [1]}, ParsedPrompt("hi", [1]), id="mapping, both"
        ),
        pytest.param(
            {"prompt": "hi", "multi_modal_data": None, "cache_salt": "s"},
            ParsedPrompt("hi", None, "s"),
            id="no media, a salt",
        ),
    ],
)
def test_a_prompt_is_taken_apart(prompt: Any, expected: ParsedPrompt) -> None:
    assert parse_prompt(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        pytest.param(None, "prompt", id="nothing"),
        pytest.param(7, "prompt", id="a number"),
        pytest.param({}, "prompt", id="an empty mapping"),
        pytest.param({"prompt": 7}, "prompt", id="a text that is none"),
        pytest.param({"prompt": "a", "promt": "b"}, "prompt", id="a misspelled field"),
        pytest.param({"prompt_token_ids": "12"}, "prompt_token_ids", id="ids as text"),
        pytest.param([1, "2"], "prompt_token_ids", id="an id as text"),
        pytest.param([1, True], "prompt_token_ids", id="a truth value"),
        pytest.param([1.0], "prompt_token_ids", id="a float"),
    ],
)
def test_other_forms_are_refused(prompt: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_prompt(prompt)
    assert caught.value.param == param


async def chunks() -> AsyncIterator[str]:
    yield "a"


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param({"prompt": "a", "multi_modal_data": {"image": 1}}, id="media"),
        pytest.param({"prompt_embeds": [0.5]}, id="embeddings"),
        pytest.param({"encoder_prompt": "a"}, id="encoder and decoder"),
        pytest.param(chunks(), id="chunks"),
    ],
)
def test_what_this_version_lacks_is_refused_as_such(prompt: Any) -> None:
    with pytest.raises(UnsupportedError, match="not available in this version"):
        parse_prompt(prompt)
