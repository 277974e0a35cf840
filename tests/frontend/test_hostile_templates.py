"""Templates that want out of the sandbox: from the model's files and from requests alike.

Every attempt also runs under ``-O`` in one process of its own, where ``assert`` checks nothing.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frontend.chat_template import RESERVED_NAMES, check_template_kwargs, render
from frontend.openai.errors import error_body
from frontend.untrusted_template import MEMORY_BYTES, render_untrusted
from ipc.errors import RequestError

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "Hi"}]
# MARK stands for a path that the attempt tries to make.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('__cl' ~ 'ass__') }}",
    "{{ ''|attr(['__class', '__']|join) }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__['os'].mkdir('MARK') }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    "{{ joiner.__init__.__globals__.os.mkdir('MARK') }}",
    "{{ namespace.__init__.__globals__.os.mkdir('MARK') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ range.__self__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ ('{' ~ '0.__class__}').format(messages) }}",
    "{{ '%s'.__mod__(messages) }}",
    "{{ messages|map(attribute='__class__')|list|first|string|upper ~ x.y }}",
    "{{ [messages]|map('attr', '__class__')|list ~ x.y }}",
    "{{ (messages|tojson).__class__.__mro__ }}",
    "{{ dict.fromkeys.__self__.__subclasses__() }}",
    "{{ (1).__class__.from_bytes.__self__.__base__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% from 'os' import system %}",
    "{% macro f(x) %}{% endmacro %}{{ f.__globals__ }}{{ f._func.__globals__ }}",
    "{% set x = namespace() %}{% set x.__class__ = 1 %}",
    "{% for x in ''.__class__.__base__.__subclasses__() %}{% endfor %}",
    "{% call(x) raise_exception.__call__('a') %}{% endcall %}",
    "{{ caller.__globals__ }}",
    "{{ loop.__class__ }}",
    "{{ config.items() }}{{ request.application.__globals__ }}",
    "{{ ''.__class__ if 0 else ''.__class__.__bases__ }}",
    "{{ tools.__class__.__mro__[0] }}",
]
# Allowed to be rendered, but never to something that names the inside.
HARMLESS_AT_BEST = ["{{ ''['__class__'] }}", "{{ '{0.__class__}'.format_map({'0': 1}) }}"]


def attempt(template: str, mark: str) -> str:
    """What the sandbox makes of an attempt."""
    try:
        return "text: " + render(template.replace("MARK", mark), MESSAGES)
    except RequestError as err:
        return "refused: " + error_body(err)[1]["message"]


def harmless(said: str) -> bool:
    inside = ("<class", "<function", "built-in", "mappingproxy", "{'__name__'", "root:")
    return said.startswith("refused: ") or not any(name in said for name in inside)


def test_no_attempt_leaves_the_sandbox(tmp_path: Path) -> None:
    mark = tmp_path / "canary-ran"
    said = {template: attempt(template, str(mark)) for template in ESCAPES}
    assert {t: s for t, s in said.items() if not harmless(s)} == {}
    assert sum(s.startswith("refused: ") for s in said.values()) > len(ESCAPES) * 2 // 3
    assert not mark.exists()
    assert not any("0x" in s or "/work" in s or "/usr" in s for s in said.values())


def test_no_attempt_leaves_it_without_assertions_either(tmp_path: Path) -> None:
    program = (
        "import json\n"
        "from tests.frontend.test_hostile_templates import ESCAPES, attempt\n"
        f"said = {{t: attempt(t, {str(tmp_path / 'canary-ran')!r}) for t in ESCAPES}}\n"
        "print(json.dumps([__debug__, said]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONOPTIMIZE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    has_assertions, said = json.loads(done.stdout)
    assert not has_assertions
    assert said == {t: attempt(t, str(tmp_path / "canary-ran")) for t in ESCAPES}
    assert not (tmp_path / "canary-ran").exists()


@pytest.mark.parametrize("template", ESCAPES[:12])
def test_nor_does_one_that_a_request_brought(template: str, tmp_path: Path) -> None:
    mark = tmp_path / "canary-ran"
    try:
        text = asyncio.run(render_untrusted(template.replace("MARK", str(mark)), MESSAGES, {}))
    except RequestError as err:
        text = "refused: " + error_body(err)[1]["message"]
    assert harmless(text)
    assert not mark.exists()


def test_variables_of_a_request_take_the_place_of_nothing() -> None:
    for name in (*RESERVED_NAMES, "__class__", "self.x", "messages ", "_", "a-b", ""):
        with pytest.raises(RequestError):
            check_template_kwargs({name: "x"})
    with pytest.raises(RequestError):
        render("{{ bos_token }}", MESSAGES, special_tokens={"bos_token": "B"}, bos_token="x")


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% set x = namespace(v=['a'*1000000]) %}{% for i in range(99999) %}"
                     "{% set x.v = x.v + ['b' ~ i ~ 'a'*1000000] %}{% endfor %}", id="kept texts"),
        pytest.param("{% set x = namespace(v=[0]) %}{% for i in range(99) %}"
                     "{% set x.v = x.v + x.v %}{% endfor %}", id="doubled list"),
        pytest.param("{{ messages|tojson(indent=99999999) }}", id="indentation"),
        pytest.param("{{ '%999999999d' % 1 }}", id="a wide number"),
        pytest.param("{{ '{:>999999999}'.format(1) }}", id="a wide field"),
        pytest.param("{{ 'a'.center(999999999) }}", id="centred"),
        pytest.param("{{ 'a'|center(999999999) }}", id="centred by a filter"),
        pytest.param("{{ ['a'*1000]*1000*1000 }}", id="repeated lists"),
        pytest.param("{{ lipsum(n=99999, max=99999) }}", id="lorem ipsum"),
    ],
)  # fmt: skip
def test_memory_ends_where_it_should(template: str) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(render_untrusted(template, MESSAGES, {}))
    assert caught.value.param == "chat_template"
    assert MEMORY_BYTES == 64 << 20


def test_the_process_of_a_template_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = asyncio.create_subprocess_exec

    async def spy(*command: str, **options: Any) -> Any:
        seen.update(options)
        return await original(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spy)
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.setenv("VLLM_API_KEY", "planted")
    assert asyncio.run(render_untrusted("{{ messages[0].content }}", MESSAGES, {})) == "Hi"
    assert "planted" not in str(seen["env"])
