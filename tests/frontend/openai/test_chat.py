"""POST /v1/chat/completions on a scripted engine: roles, templates, defaults, streams."""

import asyncio
from typing import Any

import pytest

from ipc.errors import EngineOverloadedError
from tests.frontend.openai.fake_engine import FakeEngine, ask, chat, events, make_server

HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]


def test_an_answer_has_the_openai_form() -> None:
    engine, _, app = make_server()
    answer = chat(app).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello"}
    assert choice["finish_reason"] == "stop"
    assert engine.calls[0].inputs == {"prompt": "<user>Hi<assistant>"}
    assert engine.calls[0].options["tokenization_kwargs"] == {"add_special_tokens": False}
    assert engine.calls[0].params.max_tokens is None  # the rest of the context


def test_a_stream_opens_with_a_role_chunk_per_choice() -> None:
    _, _, app = make_server()
    chunks = events(chat(app, stream=True, n=2))
    deltas = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in chunks]
    role = {"role": "assistant", "content": ""}
    assert deltas[:2] == [(0, role), (1, role)]
    texts = ["".join(d["content"] for i, d in deltas if i == index) for index in (0, 1)]
    assert texts == ["Hello", "HELLO"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)


def test_a_stream_carries_the_usage_so_far_in_every_chunk_when_asked() -> None:
    _, _, app = make_server()
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(chat(app, stream=True, n=2, max_tokens=2, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[:2] == [0, 0], "the role chunks"
    assert counts == sorted(counts)
    assert last["choices"] == []
    assert last["usage"] == chunks[-1]["usage"]
    prompts = {chunk["usage"]["prompt_tokens"] for chunk in chunks}
    assert prompts == {last["usage"]["prompt_tokens"]}


def test_a_stream_of_token_ids_begins_with_the_prompts() -> None:
    _, _, app = make_server()
    whole = chat(app, return_token_ids=True).json()
    chunks = events(chat(app, stream=True, return_token_ids=True))
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    streamed = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]


def test_a_stream_reports_usage_when_asked() -> None:
    _, _, app = make_server()
    chunks = events(chat(app, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert chunks[0]["usage"] is None


@pytest.mark.parametrize(
    ("config", "source", "temperature"),
    [
        pytest.param({}, "auto", 0.7, id="no generation config"),
        pytest.param({"do_sample": False}, "auto", 0.7, id="do_sample says nothing"),
        pytest.param({"temperature": 0.3}, "auto", 0.3, id="the checkpoint's"),
        pytest.param({"temperature": 0.3}, "vllm", 0.7, id="the API's, by flag"),
        pytest.param({"temperature": "hot"}, "auto", 0.7, id="not a number"),
    ],
)
def test_the_temperature_of_a_chat_defaults_to_the_checkpoints_else_seven_tenths(
    config: dict[str, Any], source: str, temperature: float
) -> None:
    engine, _, app = make_server(FakeEngine(generation_config=config), generation_config=source)
    chat(app)
    chat(app, temperature=0)
    assert [call.params.temperature for call in engine.calls] == [temperature, 0.0]


def test_max_completion_tokens_wins_over_max_tokens() -> None:
    engine, _, app = make_server()
    answer = chat(app, max_tokens=4, max_completion_tokens=2).json()
    assert answer["choices"][0]["message"]["content"] == "He"
    assert engine.calls[0].params.max_tokens == 2


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_that_does_not_fit_is_refused_under_the_name_it_came_by(name: str) -> None:
    _, _, app = make_server()
    response = chat(app, **{name: 100})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_last_message_can_be_continued_and_echoed(stream: bool) -> None:
    engine, _, app = make_server()
    response = chat(
        app,
        messages=HISTORY,
        add_generation_prompt=False,
        continue_final_message=True,
        echo=True,
        stream=stream,
    )
    if stream:
        deltas = [c["choices"][0]["delta"] for c in events(response)]
        text = "".join(delta["content"] for delta in deltas)
        assert deltas[0]["role"] == "assistant"
    else:
        message = response.json()["choices"][0]["message"]
        text = message["content"]
        assert message["role"] == "assistant"
    assert text == "OnceHello"
    assert engine.calls[0].inputs == {"prompt": "<user>Hi<assistant>Once"}


def test_the_response_role_is_the_flags_else_the_last_messages() -> None:
    _, _, app = make_server(response_role="bot")
    assert chat(app).json()["choices"][0]["message"]["role"] == "bot"
    answer = chat(app, add_generation_prompt=False).json()
    assert answer["choices"][0]["message"]["role"] == "user"


def test_logprobs_have_tokens_bytes_and_exactly_the_rivals_asked_for() -> None:
    _, _, app = make_server(FakeEngine(answer="é"))
    choice = chat(app, logprobs=True, top_logprobs=1).json()["choices"][0]
    assert choice["logprobs"]["content"] == [
        {
            "token": "é",
            "logprob": -1.0,
            "bytes": [195, 169],
            "top_logprobs": [{"token": "!", "logprob": -0.5, "bytes": [33]}],
        }
    ]
    refused = chat(app, top_logprobs=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "top_logprobs"


def test_token_ids_and_prompt_logprobs_are_returned_when_asked_for() -> None:
    _, _, app = make_server(FakeEngine(answer="ab"))
    answer = chat(app, return_token_ids=True, prompt_logprobs=1).json()
    assert answer["prompt_token_ids"] == [ord(c) for c in "<user>Hi<assistant>"]
    assert answer["choices"][0]["token_ids"] == [97, 98]
    assert answer["prompt_logprobs"][0] is None


def test_template_kwargs_reach_the_template_and_cannot_replace_the_servers_own() -> None:
    engine, _, app = make_server(chat_template="{{ messages[0].content }}{{ mood }}")
    chat(app, chat_template_kwargs={"mood": "!"})
    assert engine.calls[0].inputs == {"prompt": "Hi!"}
    for name in ("tools", "messages", "chat_template", "raise_exception", "special_tokens"):
        refused = chat(app, chat_template_kwargs={name: "x"})
        assert refused.status_code == 400, name
        assert refused.json()["error"]["param"] == "chat_template_kwargs"


def test_a_template_of_a_request_is_refused_unless_trusted() -> None:
    _, _, app = make_server()
    refused = chat(app, chat_template="{{ 1 }}")
    assert refused.status_code == 400
    assert "--trust-request-chat-template" in refused.json()["error"]["message"]
    engine, _, app = make_server(trust_request_chat_template=True)
    assert chat(app, chat_template="{{ messages[0].content }}?").status_code == 200
    assert engine.calls[0].inputs == {"prompt": "Hi?"}


def test_tools_are_refused_unless_the_model_may_only_look_at_them() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    template = "{% for t in tools %}{{ t.function.name }}{% endfor %}"
    engine, _, app = make_server(chat_template=template)
    refused = chat(app, tools=tools)
    assert refused.status_code == 400
    assert "tool calling is not supported" in refused.json()["error"]["message"]
    assert chat(app, tools=tools, tool_choice="none").status_code == 200
    tools[0]["function"]["description"] = "x" * 2**20
    assert "tools" in chat(app, tools=tools, tool_choice="none").json()["error"]["message"]
    assert engine.calls[0].inputs == {"prompt": "f"}


def test_images_and_templates_that_refuse_are_the_callers_fault() -> None:
    _, _, app = make_server()
    parts = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    refused = chat(app, messages=[{"role": "user", "content": parts}])
    assert refused.status_code == 400
    assert "text parts only" in refused.json()["error"]["message"]
    _, _, app = make_server(chat_template="{{ raise_exception('no system role') }}")
    assert "no system role" in chat(app).json()["error"]["message"]


def test_a_model_without_template_and_a_server_without_tokenizer_say_so() -> None:
    engine = FakeEngine()
    engine.tokenizer.chat_template = None
    _, _, app = make_server(engine)
    assert "no chat template" in chat(app).json()["error"]["message"]
    _, _, app = make_server(FakeEngine(tokenizer=None), chat_template="x")
    assert "no tokenizer" in chat(app).json()["error"]["message"]


def test_best_of_above_n_is_one_event() -> None:
    _, _, app = make_server()
    (answer,) = events(chat(app, stream=True, best_of=2))
    assert answer["choices"][0]["message"]["content"] == "Hello"


def test_tokenize_and_detokenize_speak_of_the_same_prompt() -> None:
    _, _, app = make_server()
    answer = ask(app, "POST", "/tokenize", json={"prompt": "Hi", "return_token_strs": True}).json()
    assert answer == {
        "tokens": [1, 72, 105],
        "count": 3,
        "max_model_len": 100,
        "token_strs": ["\x01", "H", "i"],
    }
    body = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
    answer = ask(app, "POST", "/tokenize", json=body).json()
    assert answer["tokens"] == [ord(c) for c in "<user>Hi"]
    answer = ask(app, "POST", "/detokenize", json={"tokens": answer["tokens"]}).json()
    assert answer == {"prompt": "<user>Hi"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/tokenize", {}, id="nothing to tokenise"),
        pytest.param("/tokenize", {"prompt": "a", "messages": HISTORY}, id="both forms"),
        pytest.param("/detokenize", {"tokens": [0x110000]}, id="no such token"),
        pytest.param("/detokenize", {"tokens": [-1]}, id="negative token"),
        pytest.param("/tokenize", {"prompt": "a", "chat_template": "x"}, id="stray template"),
    ],
)
def test_token_routes_refuse_what_makes_no_sense(path: str, body: dict[str, Any]) -> None:
    _, _, app = make_server()
    response = ask(app, "POST", path, json=body)
    expected = 200 if body.get("chat_template") else 400  # a template without messages is unused
    assert response.status_code == expected


def test_what_the_engine_refuses_is_said_in_the_bodys_own_names() -> None:
    _, _, app = make_server(FakeEngine(max_model_len=10))
    response = chat(app, messages=[{"role": "user", "content": "x" * 50}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_templates_of_requests_wait_in_a_short_line() -> None:
    _, state, _ = make_server(trust_request_chat_template=True)

    async def crowd() -> list[str]:
        release = asyncio.Event()
        said = []

        async def one() -> None:
            try:
                async with state.template_slot():
                    await release.wait()
                said.append("rendered")
            except EngineOverloadedError:
                said.append("refused")

        tasks = [asyncio.create_task(one()) for _ in range(100)]
        for _ in range(3):
            await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*tasks)
        return said

    said = asyncio.run(crowd())
    assert (said.count("rendered"), said.count("refused")) == (68, 32)
    assert state.num_templates == 0
