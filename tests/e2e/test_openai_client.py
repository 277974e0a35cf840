"""The official client against a real server with the bundled model."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.e2e.engines import load_expected
from tests.fuzz.servers import running_server

EXPECTED = load_expected()
FIBONACCI = EXPECTED[0]
AS_THE_ORACLE = {"ignore_eos": True, "skip_special_tokens": False}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server("--served-model-name", "tiny", "--max-num-seqs", "64") as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_models_lists_the_served_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_completion_gives_the_oracles_text_and_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=FIBONACCI.prompt,
        max_tokens=32,
        temperature=0,
        extra_body=AS_THE_ORACLE | {"return_token_ids": True},
    )

    assert answer.choices[0].text == FIBONACCI.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(FIBONACCI.prompt_ids)
    assert answer.usage.completion_tokens == 32
    assert answer.id.startswith("cmpl-")


def test_streamed_completions_join_to_the_whole_one(client: openai.OpenAI) -> None:
    for case in EXPECTED:
        stream = client.completions.create(
            model="tiny", prompt=case.prompt_ids, max_tokens=32, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body=AS_THE_ORACLE,
        )  # fmt: skip
        chunks = list(stream)
        assert "".join(c.choices[0].text for c in chunks if c.choices) == case.text
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 32


def test_chat_answers_and_streams_the_same(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=24
    )
    stream = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=24, stream=True
    )
    chunks = list(stream)

    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.choices[0].finish_reason == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    joined = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert joined == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_oracles(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=FIBONACCI.prompt, max_tokens=1, temperature=0, logprobs=5
    )
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello!"}], max_tokens=2,
        temperature=0, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs

    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    best = max(FIBONACCI.top_logprobs.values())
    assert logprobs.token_logprobs[0] == pytest.approx(best, abs=1e-4)
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [len(c.top_logprobs) for c in chat.choices[0].logprobs.content] == [3, 3]


def test_several_choices_differ_and_repeat_with_their_seed(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt="import", n=4, max_tokens=12, temperature=1.0, seed=5
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_stop_strings_end_the_text_before_themselves(client: openai.OpenAI) -> None:
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt=FIBONACCI.prompt, max_tokens=32, temperature=0,
            stop=["range"], stream=stream,
        )  # fmt: skip
        chunks = list(answer) if stream else [answer]
        text = "".join(c.choices[0].text for c in chunks)
        assert text == FIBONACCI.text.split("range")[0]
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        pytest.param({"temperature": -1.0}, 400, "temperature", id="out of range"),
        pytest.param({"max_tokens": 100_000}, 400, "max_tokens", id="longer than the context"),
        pytest.param({"n": 100_000}, 400, "n", id="too many choices"),
        pytest.param({"model": "other"}, 404, "other", id="unknown model"),
        pytest.param({"prompt": []}, 400, "prompt", id="empty prompt"),
        pytest.param({"logprobs": 50}, 400, "logprobs", id="too many log-probabilities"),
    ],
)
def test_errors_name_what_to_change(
    client: openai.OpenAI, body: dict[str, object], status: int, word: str
) -> None:
    request = {"model": "tiny", "prompt": "a", "max_tokens": 2} | body

    with pytest.raises(openai.APIStatusError, match=word) as info:
        client.completions.create(**request)  # type: ignore[call-overload]
    assert info.value.status_code == status


def test_64_streams_at_once_each_get_their_own_text(url: str) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def read(i: int) -> None:
                case = EXPECTED[i % len(EXPECTED)]
                stream = await client.completions.create(
                    model="tiny", prompt=case.prompt_ids, max_tokens=32, temperature=0,
                    stream=True, extra_body=AS_THE_ORACLE,
                )  # fmt: skip
                parts = [chunk.choices[0].text async for chunk in stream]
                assert "".join(parts) == case.text

            await asyncio.gather(*(read(i) for i in range(64)))

    asyncio.run(run())
