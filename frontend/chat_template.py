"""Chat messages -> prompt text, by the model's Jinja template. Knows nothing of HTTP or tokens.

The environment is the one Hugging Face templates are written for: trimmed blocks, ``break`` and
``continue``, ``raise_exception``, ``strftime_now``, a plain-JSON ``tojson``, and the
``generation`` tag, which only marks text and renders as its body.

What bounds a rendering: the sandbox refuses attribute tricks and changes of the arguments,
``range`` is limited to 100 000 items, multiplication cannot blow up a string or a number, and
rendering stops when the text passes ``MAX_OUTPUT_CHARS``. That is enough for templates which come
with a model or from its operator, fed with hostile messages. It is not enough for hostile
templates (nested loops, doubling by ``~``): those go through ``frontend/untrusted_template.py``,
which renders in a process that can be killed.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ipc.errors import ConfigError, RequestError, UnsupportedError

MAX_OUTPUT_CHARS = 1 << 20
MAX_NUMBER_BITS = 1 << 12
CONTINUE_MARK = "\x00HELIOGRAPH-CONTINUES-HERE\x00 "  # the space shows whether the template trims

Message = dict[str, Any]

# What a request may not replace through chat_template_kwargs.
RESERVED_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "template",
        "chat_template",
        "tokenize",
        "special_tokens",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
        "namespace",
        "range",
        "dict",
        "lipsum",
        "cycler",
        "joiner",
    }
)


def load_template(text_or_path: str) -> str:
    """The template that ``--chat-template`` names: a file's text, or the value itself.

    Inline templates may hold escapes such as ``\\n``, which a shell makes hard to type.

    Raises:
        ConfigError: the value looks like a path, yet cannot be opened; or it does not compile.
    """
    try:
        with open(text_or_path, encoding="utf-8") as file:
            template = file.read()
    except (OSError, ValueError) as err:  # ValueError: a NUL or a name that is far too long
        if not any(mark in text_or_path for mark in "{}\n"):
            raise ConfigError(
                f"--chat-template {text_or_path!r} looks like a file, but cannot be opened: {err}"
            ) from err
        template = _unescape(text_or_path)
    try:
        compile_template(template)
    except jinja2.TemplateError as err:
        raise ConfigError(f"--chat-template is not a valid Jinja template: {err}") from err
    return template


def template_of_tokenizer(chat_template: object) -> str | None:
    """The default among the templates a tokenizer may carry: one, or several by name."""
    if isinstance(chat_template, str):
        return chat_template
    if isinstance(chat_template, Mapping):
        default = chat_template.get("default")
        return default if isinstance(default, str) else None
    if isinstance(chat_template, Sequence):
        named = {item["name"]: item["template"] for item in chat_template}
        return named.get("default")
    return None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    special_tokens: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> str:
    """Render ``messages`` with ``template``.

    Args:
        messages: OpenAI style; ``content`` is text or a list of text parts.
        continue_final_message: end the prompt inside the last message, for the model to go on.
        special_tokens: ``bos_token``, ``eos_token`` and so on, for the template to use.
        template_kwargs: further variables of the template.

    Raises:
        RequestError: messages that are malformed or that the template refuses, or a text above
            ``MAX_OUTPUT_CHARS``.
        UnsupportedError: a part that is not text.
    """
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other: "
            "set add_generation_prompt to false",
            param="continue_final_message",
        )
    check_template_kwargs(template_kwargs)
    conversation = flatten_messages(messages)
    if continue_final_message:
        conversation[-1]["content"] += CONTINUE_MARK
    variables = {
        **{name: token for name, token in (special_tokens or {}).items() if token is not None},
        **template_kwargs,
        "messages": conversation,
        "tools": list(tools) if tools else None,
        "documents": list(documents) if documents else None,
        "add_generation_prompt": add_generation_prompt,
    }
    text = _render_bounded(template, variables)
    return _cut_at_mark(text) if continue_final_message else text


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse variables that would replace the caller's own or the environment's.

    Raises:
        RequestError: names the first of them.
    """
    for name in kwargs:
        if name in RESERVED_NAMES or name.startswith("_") or not name.isidentifier():
            raise RequestError(
                f"chat_template_kwargs may not set {name[:100]!r}", param="chat_template_kwargs"
            )


def flatten_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copies of the messages whose content is one text each.

    Raises:
        RequestError: no message, or one that is not of the expected form.
        UnsupportedError: a content part other than text.
    """
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    return [_flatten(message, f"messages[{i}]") for i, message in enumerate(messages)]


@lru_cache(maxsize=32)
def compile_template(template: str) -> jinja2.Template:
    """The compiled form; templates of requests never reach this cache."""
    return _ENVIRONMENT.from_string(template)


def _flatten(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a role", param=where)
    flat = dict(message)
    content = message.get("content")
    if content is None:
        if message["role"] == "user":
            raise RequestError(f"{where}.content is missing", param=f"{where}.content")
        flat["content"] = ""
    elif isinstance(content, list):
        parts = [_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        flat["content"] = "\n".join(parts)
    elif not isinstance(content, str):
        raise RequestError(
            f"{where}.content must be text or a list of parts", param=f"{where}.content"
        )
    if "tool_calls" in message:
        flat["tool_calls"] = _parsed_tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return flat


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} must be an object with a type", param=where)
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in ("text", "input_text", "refusal"):
        raise UnsupportedError(
            f"{where} has type {kind!r}: this server reads text parts only", param=where
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise RequestError(f"{where} holds no text", param=where)
    return text


def _parsed_tool_calls(calls: object, where: str) -> list[Any]:
    """Tool calls as templates expect them: the arguments an object, not its JSON.

    Arguments that are no JSON, as models write them at times, stay the text they are.
    """
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list", param=where)
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{where} must hold objects with a function", param=where)
        function = dict(function)
        with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])
        parsed.append({**call, "function": function})
    return parsed


def _render_bounded(template: str, variables: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    try:
        for piece in compile_template(template).generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise RequestError(
                    f"the rendered prompt is above {MAX_OUTPUT_CHARS} characters", param="messages"
                )
    except jinja2.TemplateError as err:
        raise RequestError(f"the chat template refused: {err}", param="messages") from err
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as err:
        if isinstance(err, RequestError):
            raise
        raise RequestError(
            f"the chat template failed on these messages: {type(err).__name__}: {err}",
            param="messages",
        ) from err
    except (ArithmeticError, RecursionError, MemoryError) as err:
        raise RequestError(
            f"the chat template failed: {type(err).__name__}", param="messages"
        ) from err
    return "".join(pieces)


def _cut_at_mark(text: str) -> str:
    """Drop what the template wrote behind the last message's text."""
    place = text.rfind(CONTINUE_MARK.strip())
    if place < 0:
        raise RequestError(
            "continue_final_message: the chat template does not write the last message as given",
            param="continue_final_message",
        )
    head = text[:place]
    # A template that trims its messages took the mark's space away, and would have taken the
    # white space before it as well.
    return head if text.startswith(CONTINUE_MARK, place) else head.rstrip()


def _unescape(text: str) -> str:
    try:
        return text.encode("raw_unicode_escape").decode("unicode_escape")
    except UnicodeDecodeError as err:
        raise ConfigError(f"--chat-template holds a broken escape: {err}") from err


class _GenerationTag(Extension):
    """``{% generation %} … {% endgeneration %}`` marks the model's own words; here it is mute."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which multiplication cannot eat the memory either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Refuse products that would be huge; else the plain operator."""
        if operator == "**":
            bits = _bits(left) * abs(right) if isinstance(right, int) else 0
        elif isinstance(left, int) and isinstance(right, int):
            bits = _bits(left) + _bits(right)
        else:
            bits = 0
            for sequence, count in ((left, right), (right, left)):
                is_sequence = isinstance(sequence, (str, bytes, list, tuple))
                if (
                    is_sequence
                    and isinstance(count, int)
                    and len(sequence) * count > MAX_OUTPUT_CHARS
                ):
                    raise jinja2.TemplateRuntimeError("the template repeats a text too often")
        if bits > MAX_NUMBER_BITS:
            raise jinja2.TemplateRuntimeError("the template computes too large a number")
        return super().call_binop(context, operator, left, right)


def _bits(number: object) -> int:
    return number.bit_length() if isinstance(number, int) else 64


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _make_environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _make_environment()
