"""Templates of requests: whatever they do, the server waits seconds and loses nothing."""

import asyncio
import time
from typing import Any

import pytest

from frontend.untrusted_template import render_untrusted
from ipc.errors import RequestError

MESSAGES = [{"role": "user", "content": "Hi"}]


def render(template: str, **options: Any) -> str:
    return asyncio.run(render_untrusted(template, MESSAGES, options))


def test_a_harmless_template_renders_as_in_process() -> None:
    text = render("{{ messages[0].content }}{{ eos_token }}", special_tokens={"eos_token": "é"})
    assert text == "Hié"


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            id="endless loops",
        ),
        pytest.param(
            "{% set ns = namespace(x='aaaaaaaa') %}"
            "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            id="doubled text",
        ),
        pytest.param("{{ 'a'.ljust(10 ** 10) }}", id="padding"),
        pytest.param("{{ unclosed", id="bad syntax"),
        pytest.param("x" * 70_000, id="a template that is too long"),
    ],
)
def test_a_hostile_template_fails_alone_and_soon(template: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        render(template)
    assert caught.value.param == "chat_template"
    assert time.monotonic() - started < 6
