"""Bodies: wrong types, hostile numbers, caps. Whatever comes, the answer is never a 500."""

import gzip
import json
from typing import Any

import msgspec
import pytest

from frontend.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    decode_body,
    openapi_schema,
)
from ipc.errors import RequestError
from tests.frontend.openai.fake_engine import ask, chat, complete, make_server

HOSTILE = [
    "-9223372036854775809", "-9223372036854775808", "-1", "0", "-0", "1", "2147483648",
    "9223372036854775807", "9223372036854775808", "1e308", "1e400", "-1e308", "NaN", "Infinity",
    "-Infinity", '""', '"x"', "null", "true", "false", "[]", "[[]]", "{}", '{"a": 1}', "1.5",
    "123456789012345678901234567890", '"\\ud800"', '"\\u0000"', "[1, [2, [3]]]", "[null]",
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "kind", "rest"),
    [
        pytest.param("/v1/completions", CompletionRequest, '"prompt": "Hi"', id="completions"),
        pytest.param(
            "/v1/chat/completions",
            ChatCompletionRequest,
            '"messages": [{"role": "user", "content": "Hi"}]',
            id="chat",
        ),
    ],
)
def test_no_value_of_any_field_makes_a_500(
    path: str, kind: type[msgspec.Struct], rest: str
) -> None:
    _, _, app = make_server()
    headers = {"content-type": "application/json"}
    for name in kind.__struct_fields__:
        for value in HOSTILE:
            text = f'{{{rest}, "{name}": {value}}}'
            response = ask(app, "POST", path, content=text.encode(), headers=headers)
            assert response.status_code in (200, 400, 404), f"{text}: {response.text}"
            if response.status_code != 200:
                body = response.json()
                assert body["error"]["message"] == body["message"]
                assert "0x" not in body["message"]


@pytest.mark.parametrize(
    ("field", "value", "cap"),
    [
        pytest.param("n", 129, "128", id="n"),
        pytest.param("best_of", 10**6, "128", id="best_of"),
        pytest.param("logprobs", 21, "20", id="logprobs"),
        pytest.param("prompt_logprobs", 21, "20", id="prompt_logprobs"),
        pytest.param("stop", ["x"] * 17, "16", id="stops"),
        pytest.param("stop", "x" * 257, "256", id="stop"),
        pytest.param("stop_token_ids", [1] * 1025, "1024", id="stop_token_ids"),
        pytest.param("bad_words", ["x"] * 1025, "1024", id="bad_words"),
        pytest.param("logit_bias", {str(i): 1 for i in range(1025)}, "1024", id="logit_bias"),
        pytest.param("prompt", ["x"] * 2049, "2048", id="prompts"),
        pytest.param("user", "x" * 257, "256", id="user"),
        pytest.param("cache_salt", "x" * 257, "256", id="cache_salt"),
        pytest.param("request_id", "x" * 257, "256", id="request_id"),
        pytest.param("seed", 2**63, str(2**63 - 1), id="seed"),
    ],
)
def test_a_value_above_its_cap_is_refused_with_field_and_cap(
    field: str, value: Any, cap: str
) -> None:
    _, _, app = make_server()
    response = complete(app, **{field: value})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].split("[")[0] == field
    assert cap in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"prompt": "x", "temperature": -1}, "temperature", id="negative temperature"),
        pytest.param({"prompt": "x", "temperature": "1"}, "temperature", id="text temperature"),
        pytest.param({"prompt": "x", "top_p": 0}, "top_p", id="zero top_p"),
        pytest.param({"prompt": "x", "n": True}, "n", id="bool as number"),
        pytest.param({"prompt": "x", "best_of": 1, "n": 2}, "best_of", id="best_of below n"),
        pytest.param({"prompt": "x", "min_tokens": 20}, "min_tokens", id="min above max"),
        pytest.param({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", id="bias key"),
        pytest.param({"prompt": "x", "stop": [""]}, "stop", id="empty stop"),
        pytest.param({"prompt": "x", "cache_salt": "a\x00"}, "cache_salt", id="NUL in salt"),
        pytest.param({"prompt": "x", "request_id": "a\nb"}, "request_id", id="newline in id"),
        pytest.param({"prompt": []}, "prompt", id="no prompt"),
        pytest.param({"prompt": [[]]}, "prompt", id="empty ids"),
        pytest.param({"prompt": ["a", 1]}, "prompt", id="mixed forms"),
        pytest.param({"prompt": [-1]}, "prompt", id="negative id"),
        pytest.param({}, "prompt", id="prompt missing"),
        pytest.param({"prompt": "x", "stream_options": {}}, "stream_options", id="no stream"),
        pytest.param({"prompt": "x", "suffix": "y"}, "suffix", id="suffix"),
        pytest.param({"prompt": "x", "use_beam_search": True}, "use_beam_search", id="beam"),
        pytest.param({"prompt": "x", "length_penalty": 2.0}, "length_penalty", id="beam field"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], param: str) -> None:
    _, _, app = make_server()
    response = ask(app, "POST", "/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].split("[")[0] == param


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        pytest.param({"guided_json": {}}, "not supported", id="one kind"),
        pytest.param({"response_format": {"type": "json_object"}}, "not supported", id="format"),
        pytest.param({"guided_json": {}, "guided_grammar": "x"}, "only one kind", id="two kinds"),
        pytest.param(
            {"guided_regex": "x", "response_format": {"type": "json_object"}},
            "only one kind",
            id="a field and a format",
        ),
        pytest.param({"response_format": {"type": "xml"}}, "must be", id="unknown format"),
    ],
)
def test_constraints_are_counted_and_refused(fields: dict[str, Any], sentence: str) -> None:
    _, _, app = make_server()
    response = chat(app, **fields)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


def test_a_plain_text_format_is_no_constraint() -> None:
    _, _, app = make_server()
    assert chat(app, response_format={"type": "text"}).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b'{"prompt": "\xff"}', id="not UTF-8"),
        pytest.param(b'{"prompt": ' + b"[" * 100_000, id="deep"),
        pytest.param(b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep and ignored"),
        pytest.param(b'{"prompt": NaN}', id="not a number"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        decode_body(data, CompletionRequest)


def test_unknown_fields_are_ignored_and_listed_or_refused_when_strict() -> None:
    _, _, app = make_server()
    response = complete(app, foo=1, **{"bár,\n": 2})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "foo, b?r??"
    assert "x-ignored-fields" not in complete(app).headers
    _, _, app = make_server(strict_fields=True)
    refused = complete(app, foo=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "foo"


def test_null_means_absent() -> None:
    _, _, app = make_server()
    names = [n for n in CompletionRequest.__struct_fields__ if n != "prompt"]
    assert complete(app, **dict.fromkeys(names)).status_code == 200


def test_every_field_is_published_in_the_openapi_description() -> None:
    _, _, app = make_server()
    schema = ask(app, "GET", "/openapi.json").json()
    properties = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert set(properties) == set(CompletionRequest.__struct_fields__)
    content = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"] == openapi_schema(CompletionRequest)[0]
    assert ask(app, "GET", "/docs").status_code == 200
    json.dumps(schema)


def test_the_body_must_be_declared_as_json_and_stay_below_the_limit() -> None:
    _, _, app = make_server()
    text = b'{"prompt": "Hi"}'
    wrong = ask(app, "POST", "/v1/completions", content=text, headers={"content-type": "text/html"})
    assert wrong.status_code == 415
    bare = ask(app, "POST", "/v1/completions", content=text)
    assert bare.status_code == 200
    huge = {"content-type": "application/json", "content-length": str(33 << 20)}
    response = ask(app, "POST", "/v1/completions", content=text, headers=huge)
    assert response.status_code == 413


def test_a_compressed_body_is_refused_for_what_it_is() -> None:
    _, _, app = make_server()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = ask(app, "POST", "/v1/completions", headers=headers, content=gzip.compress(b"{}"))
    assert response.status_code == 415
    assert "Content-Encoding 'gzip'" in response.json()["error"]["message"]
