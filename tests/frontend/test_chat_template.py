"""Chat templates: the sandbox, the message forms, and the model's own template."""

import json
from pathlib import Path
from typing import Any

import pytest

from frontend.chat_template import (
    MAX_OUTPUT_CHARS,
    check_template_kwargs,
    flatten_messages,
    load_template,
    render,
    template_of_tokenizer,
)
from ipc.errors import ConfigError, RequestError, UnsupportedError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "scripts" / "demo_models" / "tiny"
ORACLE = json.loads((ROOT / "tests" / "expected.json").read_text())["chat_template"]
CHATML = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
ECHO = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: f"{len(case['messages'])} messages")
def test_the_bundled_template_renders_as_hugging_face_does(case: dict[str, Any]) -> None:
    text = render(CHATML, case["messages"], add_generation_prompt=case["add_generation_prompt"])
    assert text == case["text"]


def test_text_parts_are_joined_and_missing_assistant_text_is_empty() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [*user(parts), {"role": "assistant"}]
    assert render(ECHO, messages) == "user=a\nb;assistant=;"


def test_an_image_part_is_refused_and_named() -> None:
    with pytest.raises(UnsupportedError, match="reads text parts only") as caught:
        render(ECHO, user([{"type": "image_url", "image_url": {"url": "http://x"}}]))
    assert caught.value.param == "messages[0].content[0]"


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([], id="no message"),
        pytest.param([{"content": "x"}], id="no role"),
        pytest.param(user(None), id="user without content"),
        pytest.param(user(7), id="content is a number"),
        pytest.param(user([7]), id="part is a number"),
        pytest.param(user([{"type": "text"}]), id="text part without text"),
    ],
)
def test_malformed_messages_are_the_callers_fault(messages: list[Any]) -> None:
    with pytest.raises(RequestError):
        flatten_messages(messages)


def test_the_environment_offers_what_templates_use() -> None:
    template = (
        "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% generation %}{% set x = 1 %}g{% endgeneration %}{{ x is defined }}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ bos_token }}{{ mood }}"
    )
    text = render(template, user("x"), special_tokens={"bos_token": "<s>"}, mood="!")
    assert text == '01gFalse{"a": "<é>"}4<s>!'


def test_a_template_that_raises_becomes_the_callers_fault() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", user("x"))


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ 'a' * 10**10 }}", id="repeated text"),
        pytest.param("{{ 2 ** (10 ** 9) }}", id="tower of powers"),
        pytest.param("{% for i in range(10**9) %}{% endfor %}", id="huge range"),
        pytest.param("{% for i in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}", id="long output"),
        pytest.param("{{ ''.__class__.__mro__[1].__subclasses__() }}", id="escape by attributes"),
        pytest.param("{{ messages.append(1) }}", id="changes its arguments"),
        pytest.param("{{ messages[0].content + 1 }}", id="type error"),
        pytest.param("{{ 1 / 0 }}", id="division by zero"),
        pytest.param("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", id="endless recursion"),
    ],
)
def test_a_hostile_or_broken_template_ends_in_a_request_error(template: str) -> None:
    with pytest.raises(RequestError):
        render(template, user("x"))


def test_the_output_is_bounded_for_hostile_messages() -> None:
    with pytest.raises(RequestError, match=str(MAX_OUTPUT_CHARS)):
        render(ECHO, user("a" * (MAX_OUTPUT_CHARS + 1)))


@pytest.mark.parametrize("name", ["messages", "raise_exception", "bos_token", "_x", "a b"])
def test_template_kwargs_cannot_replace_what_the_server_sets(name: str) -> None:
    with pytest.raises(RequestError, match="may not set") as caught:
        check_template_kwargs({name: "x"})
    assert caught.value.param == "chat_template_kwargs"
    check_template_kwargs({"enable_thinking": False})


def test_render_itself_checks_them_too() -> None:
    with pytest.raises(RequestError, match="may not set"):
        render(ECHO, user("x"), eos_token="x")


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        pytest.param(ECHO, "Once ", "user=hi;assistant=Once ", id="as given"),
        pytest.param(
            ECHO.replace("m.content", "m.content | trim"),
            "Once ",
            "user=hi;assistant=Once",
            id="a template that trims",
        ),
    ],
)
def test_continue_final_message_ends_inside_the_last_message(
    template: str, content: str, expected: str
) -> None:
    messages = [*user("hi"), {"role": "assistant", "content": content}]
    text = render(template, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == expected


def test_continuing_excludes_a_generation_prompt_and_needs_the_text_in_the_prompt() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        render(ECHO, user("x"), continue_final_message=True)
    with pytest.raises(RequestError, match="does not write the last message"):
        render("fixed", user("x"), add_generation_prompt=False, continue_final_message=True)


def test_tool_call_arguments_reach_the_template_as_objects_when_they_are_json() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{broken"}},
    ]
    flat = flatten_messages([{"role": "assistant", "tool_calls": calls}])
    assert [c["function"]["arguments"] for c in flat[0]["tool_calls"]] == [{"a": 1}, "{broken"]
    assert calls[0]["function"]["arguments"] == '{"a": 1}'  # type: ignore[index]


def test_load_template_reads_a_file_or_takes_an_inline_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0].content }}\\n")
    assert load_template(str(path)) == "{{ messages[0].content }}\\n"  # files have no escapes
    assert load_template("{{ 'é' }}\\n") == "{{ 'é' }}\n"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        pytest.param("no/such/file.jinja", "cannot be opened", id="a path with a typo"),
        pytest.param("template", "cannot be opened", id="a bare word"),
        pytest.param("{{ unclosed", "not a valid Jinja template", id="bad syntax"),
        pytest.param("{{ x }}\\", "broken escape", id="bad escape"),
    ],
)
def test_load_template_refuses_what_cannot_work(value: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_template(value)


def test_the_default_is_chosen_among_named_templates() -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert template_of_tokenizer(named) == "D"
    assert template_of_tokenizer({"default": "D"}) == "D"
    assert template_of_tokenizer("S") == "S"
    assert template_of_tokenizer(None) is None
