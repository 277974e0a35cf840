"""POST /v1/completions on a scripted engine: forms, choices, streams, log-probabilities."""

import asyncio
import json
from typing import Any

import pytest

from ipc.errors import EngineDeadError, EngineGenerateError, EngineOverloadedError, RequestError
from tests.frontend.openai.fake_engine import FakeEngine, complete, drive, events, make_server


def test_an_answer_has_the_openai_form() -> None:
    engine, _, app = make_server()
    answer = complete(app, max_tokens=32).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fake"
    assert answer["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop",
         "stop_reason": None}
    ]  # fmt: skip
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert engine.calls[0].params.temperature == 1.0


def test_max_tokens_defaults_to_sixteen_and_cuts_with_reason_length() -> None:
    engine, _, app = make_server(FakeEngine(answer="a" * 40))
    choice = complete(app).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a" * 16, "length")
    assert engine.calls[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        pytest.param("ab", [{"prompt": "ab"}], id="text"),
        pytest.param(["a", "b"], [{"prompt": "a"}, {"prompt": "b"}], id="texts"),
        pytest.param([5, 6], [{"prompt_token_ids": [5, 6]}], id="token ids"),
        pytest.param(
            [[5], [6, 7]], [{"prompt_token_ids": [5]}, {"prompt_token_ids": [6, 7]}], id="id lists"
        ),
    ],
)
def test_all_four_forms_of_a_prompt_reach_the_engine(prompt: Any, expected: list[Any]) -> None:
    engine, _, app = make_server()
    assert complete(app, prompt=prompt).status_code == 200
    assert [call.inputs for call in engine.calls] == expected


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_choices_are_numbered_prompt_times_n(stream: bool) -> None:
    _, _, app = make_server()
    response = complete(app, prompt=["a", "b"], n=2, stream=stream, temperature=1)
    texts = dict.fromkeys(range(4), "")
    chunks = events(response) if stream else [response.json()]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "Hello", 1: "HELLO", 2: "Hello", 3: "HELLO"}


def test_a_stream_joins_to_the_whole_answer_and_ends_with_its_reason() -> None:
    _, _, app = make_server(FakeEngine(answer='é"\n\\😀', stop_reason="###"))
    response = complete(app, stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response)
    assert "".join(c["choices"][0]["text"] for c in chunks) == 'é"\n\\😀'
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["stop"]
    assert chunks[-1]["choices"][0]["stop_reason"] == "###"
    assert len({c["id"] for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)


def test_usage_comes_in_a_last_chunk_without_choices_when_asked_for() -> None:
    _, _, app = make_server()
    chunks = events(complete(app, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(c["usage"] is None for c in chunks[:-1])


def test_continuous_usage_counts_up() -> None:
    _, _, app = make_server()
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(complete(app, stream=True, stream_options=options))
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 5, 5]


def test_best_of_above_n_is_not_streamed_but_sent_as_one_event() -> None:
    engine, _, app = make_server()
    (answer,) = events(complete(app, stream=True, best_of=3))
    assert answer["choices"][0]["text"] == "Hello"
    assert engine.calls[0].params.best_of == 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_with_no_tokens_returns_the_prompt_alone(stream: bool) -> None:
    _, _, app = make_server()
    body = {"stream": stream, "stream_options": {"include_usage": True} if stream else None}
    response = complete(app, echo=True, max_tokens=0, **body)
    answer = events(response) if stream else [response.json()]
    choices = [choice for chunk in answer for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Hi"
    assert choices[-1]["finish_reason"] == "length"
    assert answer[-1]["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_of_token_ids_is_decoded_and_comes_once(stream: bool) -> None:
    _, _, app = make_server()
    response = complete(app, prompt=[72, 105], echo=True, stream=stream)
    answer = events(response) if stream else [response.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in answer) == "HiHello"


def test_no_tokens_without_echo_are_refused() -> None:
    _, _, app = make_server()
    response = complete(app, max_tokens=0)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


def test_logprobs_hold_the_top_tokens_offsets_and_the_floor() -> None:
    _, _, app = make_server(FakeEngine(answer="ab"))
    logprobs = complete(app, logprobs=3).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [
            {"a": -1.0, "!": -0.5, "?": -9999.0},
            {"b": -1.0, "!": -0.5, "?": -9999.0},
        ],
        "text_offset": [0, 1],
    }


def test_the_chosen_token_is_among_the_top_even_when_it_ranks_below() -> None:
    _, _, app = make_server(FakeEngine(answer="a"))
    logprobs = complete(app, logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -1.0, "!": -0.5}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_with_logprobs_covers_the_prompt_and_offsets_run_on(stream: bool) -> None:
    _, _, app = make_server(FakeEngine(answer="ab"))
    response = complete(app, prompt=[72, 105], echo=True, logprobs=1, stream=stream)
    answer = events(response) if stream else [response.json()]
    parts = [chunk["choices"][0]["logprobs"] for chunk in answer]
    chosen = [logprob for part in parts for logprob in part["token_logprobs"]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert chosen == [None, -1.0, -1.0, -1.0]
    assert [token for part in parts for token in part["tokens"]] == ["H", "i", "a", "b"]
    assert offsets == [0, 1, 2, 3]


def test_token_ids_are_returned_when_asked_for() -> None:
    _, _, app = make_server(FakeEngine(answer="ab"))
    choice = complete(app, return_token_ids=True, logprobs=0, return_tokens_as_token_ids=True)
    choice = choice.json()["choices"][0]
    assert choice["prompt_token_ids"] == [1, 72, 105]
    assert choice["token_ids"] == [97, 98]
    assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98"]
    chunks = events(complete(app, return_token_ids=True, stream=True))
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [1, 72, 105]
    assert [c["choices"][0]["token_ids"] for c in chunks] == [[97], [98]]


def test_prompt_logprobs_come_by_token_id_and_not_in_streams() -> None:
    _, _, app = make_server()
    choice = complete(app, prompt_logprobs=1).json()["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["72"] == {
        "logprob": -1.0, "rank": 2, "decoded_token": "H",
    }  # fmt: skip
    assert complete(app, prompt_logprobs=1, stream=True).status_code == 400


def test_special_tokens_priority_and_salt_reach_the_engine() -> None:
    engine, _, app = make_server()
    complete(app, add_special_tokens=False, priority=-3, cache_salt="s")
    options = engine.calls[0].options
    assert options == {
        "priority": -3, "cache_salt": "s", "tokenization_kwargs": {"add_special_tokens": False},
        "max_tokens_must_fit": True,
    }  # fmt: skip


def test_the_clients_request_id_is_echoed_and_never_the_engines_key() -> None:
    engine, _, app = make_server()
    responses = [complete(app, request_id="mine") for _ in range(2)]
    assert [r.headers["x-request-id"] for r in responses] == ["mine", "mine"]
    ids = [call.request_id for call in engine.calls]
    assert ids[0] != ids[1]
    assert "mine" not in ids[0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        pytest.param(RequestError("too long", "prompt"), 400, id="the caller's fault"),
        pytest.param(ValueError("an old-style refusal"), 400, id="an old-style refusal"),
        pytest.param(EngineOverloadedError("full", 7.4), 429, id="overloaded"),
        pytest.param(EngineGenerateError("NaN"), 500, id="failed inside"),
        pytest.param(EngineDeadError("gone"), 503, id="dead engine"),
    ],
)
def test_a_failure_before_the_first_output_becomes_a_status(
    stream: bool, failure: Exception, status: int
) -> None:
    _, _, app = make_server(FakeEngine(fail_after=0, failure=failure))
    response = complete(app, stream=stream)
    body = response.json()
    assert response.status_code == status
    assert body["error"]["message"] == body["message"] == str(failure)
    assert body["error"]["code"] == body["code"] == status
    assert body["object"] == "error"
    if status == 429:
        assert response.headers["retry-after"] == "8"


def test_a_failure_inside_a_stream_becomes_an_event_and_the_stream_ends_in_order() -> None:
    _, _, app = make_server(FakeEngine(fail_after=2, failure=EngineGenerateError("broken row")))
    response = complete(app, stream=True)
    chunks = events(response)
    assert response.status_code == 200
    assert [c["choices"][0]["text"] for c in chunks[:2]] == ["H", "e"]
    assert chunks[2]["error"]["message"] == "broken row"


def test_one_failing_prompt_of_several_ends_the_others() -> None:
    engine, _, app = make_server(FakeEngine(max_model_len=10))
    response = complete(app, prompt=["ok", "x" * 50])
    assert response.status_code == 400
    assert engine.num_open == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_every_prompt_in_the_engine(stream: bool) -> None:
    engine, state, app = make_server(FakeEngine(hang_after=2 if stream else 0))

    async def run() -> list[dict[str, Any]]:
        left = asyncio.Event()
        body = json.dumps({"prompt": ["a", "b"], "n": 2, "stream": stream}).encode()
        async with asyncio.TaskGroup() as tasks:
            driven = tasks.create_task(
                drive(app, "/v1/completions", body, lambda _: False, leaves_at_once=left)
            )
            while engine.num_open < 2:
                await asyncio.sleep(0)
            for _ in range(50):
                await asyncio.sleep(0)
            left.set()
        return driven.result()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert engine.num_open == 0
    assert len(engine.aborted) == 2
    assert state.num_open == 0
    assert state.open_req_ids == set()


def test_more_sequences_than_a_body_may_ask_for_are_refused() -> None:
    _, _, app = make_server()
    response = complete(app, prompt=["a"] * 100, n=100)
    assert response.status_code == 400
    assert "4096" in response.json()["error"]["message"]


def test_more_tokens_than_the_context_has_room_for_are_refused() -> None:
    _, _, app = make_server()
    assert complete(app, max_tokens=97).status_code == 200
    response = complete(app, max_tokens=98)  # the prompt has 3 of 100
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_body_of_many_prompts_fills_the_batch_and_not_the_queue(stream: bool) -> None:
    engine, state, app = make_server()
    state.max_prompts_at_once = 3
    response = complete(app, prompt=["a"] * 20, max_tokens=2, stream=stream)
    assert response.status_code == 200
    assert len(engine.calls) == 20
    assert engine.most_open == 3
