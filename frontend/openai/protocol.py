"""Request bodies of the HTTP server: fields, defaults, caps, and their turn into SamplingParams.

Structs are strict: a wrong type, a non-finite number or a list above its cap is the caller's
fault, and the message names field and cap. Fields that a struct does not have are ignored and
reported, as clients send new ones all the time; ``--strict-fields`` refuses them.
"""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ipc.caps import (
    MAX_BRANCHES,
    MAX_DOCUMENTS,
    MAX_ID_CHARS,
    MAX_LINGER_S,
    MAX_LIST_ENTRIES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PLAIN_TOKEN_IDS,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    MAX_WORD_CHARS,
)
from ipc.errors import RequestError, UnsupportedError
from ipc.sampling_params import RequestOutputKind, SamplingParams

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Branches = Annotated[int, Meta(ge=1, le=MAX_BRANCHES)]
Short = Annotated[str, Meta(max_length=MAX_ID_CHARS)]
Stop = Annotated[str, Meta(max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOP_STRINGS)]
Word = Annotated[str, Meta(min_length=1, max_length=MAX_WORD_CHARS)]
Words = Annotated[list[Word], Meta(max_length=MAX_LIST_ENTRIES)]
TokenIds = Annotated[list[TokenId], Meta(max_length=MAX_LIST_ENTRIES)]
ManyTokenIds = Annotated[list[TokenId], Meta(max_length=MAX_PLAIN_TOKEN_IDS)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
JsonObject = dict[str, Any]
Messages = Annotated[list[JsonObject], Meta(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[JsonObject], Meta(max_length=MAX_TOOLS)]


class StreamOptions(msgspec.Struct):
    """What a stream says about usage."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Tuning(msgspec.Struct, kw_only=True):
    """The fields that both kinds of generation share. None means: as if absent."""

    model: str | None = None
    n: Branches | None = 1
    best_of: Branches | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    seed: Int64 | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    min_tokens: Count | None = 0
    max_tokens: Count | None = None
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=MAX_LIST_ENTRIES)] | None = None
    allowed_token_ids: ManyTokenIds | None = None
    bad_words: Words | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Short | None = None
    request_id: Short | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = 0
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)] | None = None
    return_tokens_as_token_ids: bool | None = False
    return_token_ids: bool | None = False
    echo: bool | None = False
    linger_s: Annotated[float, Meta(ge=0, le=MAX_LINGER_S)] | None = None
    # Known, yet not served by this version: refused with a sentence, never ignored.
    use_beam_search: bool | None = False
    length_penalty: float | None = 1.0
    early_stopping: bool | str | None = False
    guided_json: str | JsonObject | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    structured_outputs: JsonObject | None = None
    response_format: JsonObject | None = None
    kv_transfer_params: JsonObject | None = None
    vllm_xargs: JsonObject | None = None


class CompletionRequest(Tuning, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    suffix: str | None = None
    max_tokens: Count | None = 16
    logprobs: Logprobs | None = None
    add_special_tokens: bool | None = True
    prompt_embeds: Any = None


class ChatCompletionRequest(Tuning, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = False
    top_logprobs: Logprobs | None = None
    max_completion_tokens: Count | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: Annotated[list[JsonObject], Meta(max_length=MAX_DOCUMENTS)] | None = None
    tools: Tools | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    mm_processor_kwargs: JsonObject | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # None: True for a prompt, False for messages
    return_token_strs: bool | None = False
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    tools: Tools | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: ManyTokenIds
    model: str | None = None


Body = TypeVar("Body", bound=msgspec.Struct)
Prompt = str | list[int]

_COPIED = (  # fields of a body that SamplingParams has under the same name
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
)
_DECODERS: dict[type[Any], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
}
_encode = msgspec.json.Encoder().encode
_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_body(data: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """The body as ``kind``, and the names of its fields that ``kind`` does not have.

    Raises:
        RequestError: no JSON, or not of this form; ``param`` names the field.
    """
    try:
        body = _DECODERS[kind].decode(data)
        ignored = [name for name in _KEYS.decode(data) if name not in kind.__struct_fields__]
    except msgspec.ValidationError as err:
        raise _form_error(str(err)) from err
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise RequestError(f"the body is not valid JSON: {err}") from err
    assert isinstance(body, kind)
    return body, ignored


def _form_error(message: str) -> RequestError:
    """A decoder's "Expected `int`, got `str` - at `$.n`", said with the field in front."""
    what, _, place = message.partition(" - at `$")
    param = place.rstrip("`").lstrip(".") or None
    if param is None and "field `" in what:  # a field that is missing
        param = what.split("field `")[1].split("`")[0]
    return RequestError(f"{param}: {what}" if param else what, param=param)


def prompts_of(prompt: str | list[Any]) -> list[Prompt]:
    """The prompts in the four forms: text, texts, token ids, lists of token ids.

    Raises:
        RequestError: forms are mixed, a prompt is empty, or there are too many.
    """
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        if min(prompt) < 0 or max(prompt) >= 2**31:
            raise RequestError("prompt holds a number that is no token id", param="prompt")
        return [list(prompt)]
    if kinds not in ({str}, {list}):
        raise RequestError(
            "prompt must be text, a list of texts, a list of token ids, or a list of such lists",
            param="prompt",
        )
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"prompt holds {len(prompt)} prompts; the cap is {MAX_PROMPTS}", param="prompt"
        )
    if kinds == {list} and not all(prompt):
        raise RequestError("prompt holds an empty list of token ids", param="prompt")
    return list(prompt)


def refuse_unserved(body: Tuning) -> None:
    """Refuse what this version does not do, rather than do something else silently.

    Raises:
        RequestError: constraints of more than one kind.
        UnsupportedError: the feature and the field that asked for it.
    """
    kinds = constraint_kinds(body)
    if len(kinds) > 1:
        raise RequestError(
            f"only one kind of constraint may be set, got {', '.join(kinds)}", param=kinds[1]
        )
    if kinds:
        raise UnsupportedError(
            f"{kinds[0]}: structured output is not supported by this version", param=kinds[0]
        )
    if body.use_beam_search:
        raise UnsupportedError(
            "use_beam_search: beam search is not supported by this version", "use_beam_search"
        )
    for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
        if getattr(body, name) not in (None, default):
            raise RequestError(f"{name} only makes sense with use_beam_search", param=name)
    for name in ("kv_transfer_params", "vllm_xargs", "prompt_embeds", "mm_processor_kwargs"):
        if getattr(body, name, None):
            raise UnsupportedError(f"{name} is not supported by this version", param=name)
    if isinstance(body, CompletionRequest) and body.suffix:
        raise UnsupportedError("suffix is not supported by this version", param="suffix")
    if isinstance(body, ChatCompletionRequest):
        _refuse_tool_calls(body)


def constraint_kinds(body: Tuning) -> list[str]:
    """The fields that constrain the output's form; at most one may be given."""
    names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
    kinds = [name for name in names if getattr(body, name) is not None]
    form = body.response_format
    if form is not None and form.get("type") != "text":
        if form.get("type") not in ("json_object", "json_schema", "structural_tag"):
            raise RequestError(
                "response_format.type must be text, json_object, json_schema or structural_tag",
                param="response_format",
            )
        kinds.append("response_format")
    return kinds


def _refuse_tool_calls(body: ChatCompletionRequest) -> None:
    check_tools(body.tools)
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
    elif body.tool_choice != "none":
        raise UnsupportedError(
            "tools: tool calling is not supported by this version; with tool_choice none the "
            "tools are shown to the model, and it answers in text",
            param="tools",
        )


def check_tools(tools: list[JsonObject] | None) -> None:
    """Refuse descriptions of tools that are larger together than their cap."""
    size = len(_encode(tools)) if tools else 0
    if size > MAX_TOOLS_BYTES:
        raise RequestError(f"tools are {size} bytes; the cap is {MAX_TOOLS_BYTES}", param="tools")


def sampling_params(
    body: CompletionRequest | ChatCompletionRequest,
    defaults: dict[str, Any],
    max_tokens: int | None,
) -> SamplingParams:
    """The sampling parameters a body asks for.

    Args:
        defaults: what an absent temperature, top_p, top_k, min_p or repetition_penalty means.
        max_tokens: None: up to the model's limit.

    Raises:
        RequestError: a value out of range; ``param`` names it.
    """
    chosen = {
        name: default if getattr(body, name) is None else getattr(body, name)
        for name, default in defaults.items()
    }
    given = {name: getattr(body, name) for name in _COPIED if getattr(body, name) is not None}
    try:
        return SamplingParams(
            **chosen,
            **given,
            logit_bias=_token_biases(body.logit_bias),
            logprobs=_num_logprobs(body),
            max_tokens=max_tokens,
            output_kind=RequestOutputKind.DELTA
            if streams_deltas(body)
            else RequestOutputKind.FINAL_ONLY,
        )
    except RequestError:
        raise
    except (ValueError, TypeError, OverflowError) as err:
        field = str(err).split(" ", 1)[0]
        param = field if field in SamplingParams.__struct_fields__ else None
        raise RequestError(str(err), param=param) from err


def streams_deltas(body: Tuning) -> bool:
    """Whether text leaves as it is generated. With ``best_of`` above ``n`` nobody knows before
    the end which sequences win, so the whole answer is then one event."""
    return bool(body.stream) and body.best_of in (None, body.n or 1)


def _num_logprobs(body: CompletionRequest | ChatCompletionRequest) -> int | None:
    if isinstance(body, CompletionRequest):
        return body.logprobs
    if not body.logprobs:
        if body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    return body.top_logprobs or 0


def _token_biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    try:
        token_biases = {int(token_id): bias for token_id, bias in biases.items()}
    except ValueError as err:
        raise RequestError(f"logit_bias: its keys must be token ids: {err}", "logit_bias") from err
    if any(not 0 <= token_id < 2**31 for token_id in token_biases):
        raise RequestError("logit_bias: its keys must be token ids", "logit_bias")
    return token_biases


def check_names(body: Tuning) -> None:
    """Refuse names that hold more than printable characters, or what a header cannot carry."""
    for name in ("request_id", "cache_salt", "user"):
        value = getattr(body, name)
        if value is not None and not value.isprintable():
            raise RequestError(f"{name} must hold printable characters only", param=name)
    if body.request_id is not None and not body.request_id.isascii():
        raise RequestError("request_id must be printable ASCII", param="request_id")


def openapi_schema(kind: type[msgspec.Struct]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of a body, and the schemas it refers to, for /openapi.json."""
    (schema,), components = msgspec.json.schema_components(
        [kind], ref_template="#/components/schemas/{name}"
    )
    return schema, components
