"""Admission: limits, seeds, defaults; everything refused names its field."""

from typing import Any

import msgspec
import pytest

from frontend.inputs import NewRequest, PromptTooLongError, SeedSource
from frontend.lora_request import LoRARequest
from frontend.pooling_params import PoolingParams
from ipc.caps import MAX_PROMPT_LOGPROBS
from ipc.errors import RequestError, UnsupportedError
from ipc.messages import AddRequest, encoder
from ipc.sampling_params import SamplingParams, StructuredOutputsParams
from tests.frontend.builders import EOS, VOCAB_SIZE, make_inputs, make_limits, make_request


def admit(prompt: Any = "hi", **params: Any) -> AddRequest:
    return make_inputs().admit(make_request(prompt=prompt, **params)).message


def test_a_text_is_tokenised_and_ids_are_used_as_they_are() -> None:
    assert admit("hi").prompt_token_ids == [104, 105]
    assert admit([7, 8]).prompt_token_ids == [7, 8]
    assert admit({"prompt": "hi", "prompt_token_ids": [9]}).prompt_token_ids == [9]


def test_the_prompt_text_is_kept_for_the_output() -> None:
    inputs = make_inputs()
    both = make_request(prompt={"prompt": "hi", "prompt_token_ids": [9]})
    assert inputs.admit(both).prompt == "hi"
    only_ids = make_request(prompt=[9])
    only_ids.prompt_text = "nine"
    assert inputs.admit(only_ids).prompt == "nine"


def test_the_message_can_travel_and_the_callers_parameters_stay_as_they_were() -> None:
    params = SamplingParams(
        max_tokens=None, stop=["x"], logits_processors=[lambda ids, logits: logits]
    )
    message = make_inputs().admit(NewRequest("a", "hi", params)).message
    encoder.encode(message)
    assert message.has_logits_processors
    assert message.params.logits_processors is None
    assert params.max_tokens is None
    assert params.seed is None
    assert params.stop == ["x"]
    assert params.logits_processors is not None


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        pytest.param(None, 998, id="none: the rest of the context"),
        pytest.param(5, 5, id="fits"),
        pytest.param(5000, 998, id="more than fits: the rest of the context"),
    ],
)
def test_the_token_limit_fits_the_context(max_tokens: int | None, expected: int) -> None:
    assert admit("hi", max_tokens=max_tokens).params.max_tokens == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        pytest.param({"max_tokens": None}, 998, id="none: the rest of the context"),
        pytest.param({"max_tokens": 998}, 998, id="just fits"),
        pytest.param({"max_tokens": 999, "truncate_prompt_tokens": 1}, 999, id="truncated first"),
    ],
)
def test_a_token_limit_that_must_fit_may_fill_the_context(
    params: dict[str, Any], expected: int
) -> None:
    new = make_request(prompt="hi", **params)
    new.max_tokens_must_fit = True
    assert make_inputs().admit(new).message.params.max_tokens == expected


def test_a_token_limit_that_must_fit_and_does_not_is_refused_with_the_numbers() -> None:
    new = make_request(prompt="hi", max_tokens=999)
    new.max_tokens_must_fit = True
    with pytest.raises(RequestError, match=r"at most 998: .* 2 tokens .* 1000, got 999") as caught:
        make_inputs().admit(new)
    assert caught.value.param == "max_tokens"


def test_drawn_seeds_are_the_same_after_every_start_and_differ_between_requests() -> None:
    def draw(engine_seed: int) -> list[int]:
        inputs = make_inputs(seed=engine_seed)
        seeds = [inputs.admit(make_request()).message.params.seed for _ in range(50)]
        return [seed for seed in seeds if seed is not None]

    first = draw(0)
    assert draw(0) == first
    assert len(set(first)) == 50
    assert not set(draw(1)) & set(first)
    assert all(0 <= seed < 2**63 for seed in first)


def test_a_given_seed_is_kept_and_draws_nothing() -> None:
    inputs = make_inputs()
    assert inputs.admit(make_request(seed=-5)).message.params.seed == -5
    assert inputs.admit(make_request()).message.params.seed == SeedSource(0).draw()


def test_the_tokenizers_end_of_text_id_ends_and_the_checkpoints_others_stop() -> None:
    inputs = make_inputs(generation_config={"eos_token_id": [5, EOS, 9999]})
    message = inputs.admit(make_request(stop_token_ids=[7])).message
    assert message.eos_token_ids == [EOS]
    assert message.params.stop_token_ids == [7, 5]


def test_ignored_end_of_text_ids_do_not_stop() -> None:
    inputs = make_inputs(generation_config={"eos_token_id": [5, EOS]})
    message = inputs.admit(make_request(ignore_eos=True, stop_token_ids=[7])).message
    assert message.params.stop_token_ids == [7]
    assert message.params.ignore_eos


def test_without_tokenizer_the_end_of_text_id_comes_from_the_config() -> None:
    inputs = make_inputs(tokenizer=False, generation_config={"eos_token_id": [5, 6]})
    message = inputs.admit(make_request(prompt=[1])).message
    assert (message.eos_token_ids, message.params.stop_token_ids) == ([5], [6])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        pytest.param(3, "efg", id="the last three"),
        pytest.param(100, "abcdefg", id="more than there are"),
        pytest.param(-1, "abcdefg", id="the model's limit"),
    ],
)
def test_truncation_keeps_the_end(keep: int, expected: str) -> None:
    message = admit("abcdefg", truncate_prompt_tokens=keep)
    assert message.prompt_token_ids == list(expected.encode())


def test_truncation_to_the_models_limit_leaves_room_for_output() -> None:
    message = admit([1] * 5000, truncate_prompt_tokens=-1)
    assert len(message.prompt_token_ids) == 999
    assert message.params.max_tokens == 1


def test_bad_words_are_spelled_with_and_without_a_space_before_them() -> None:
    words = admit(bad_words=["no", " so"]).bad_words_token_ids
    assert words == [list(b"no"), list(b" no"), list(b" so")]


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    with pytest.raises(PromptTooLongError, match=r"1000 tokens.*context of 1000"):
        admit([1] * 1000)
    assert len(admit([1] * 999).prompt_token_ids) == 999


def test_a_prompt_that_the_whole_cache_cannot_hold_is_refused() -> None:
    inputs = make_inputs(make_limits(num_gpu_blocks=3, block_size=16))
    inputs.admit(make_request(prompt=[1] * 31))
    with pytest.raises(PromptTooLongError, match="holds 32"):
        inputs.admit(make_request(prompt=[1] * 32))


def test_best_of_asks_for_the_logprobs_it_ranks_by() -> None:
    assert admit(n=2, best_of=3).params.logprobs == 0
    assert admit(n=2, best_of=3, logprobs=2).params.logprobs == 2
    assert admit(n=2).params.logprobs is None


def test_a_salt_and_a_priority_travel() -> None:
    new = make_request()
    new.priority, new.cache_salt = -3, "tenant"
    message = make_inputs().admit(new).message
    assert (message.priority, message.cache_salt) == (-3, "tenant")
    assert admit({"prompt": "a", "cache_salt": "s"}).cache_salt == "s"


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        pytest.param("", {}, "prompt", id="an empty prompt"),
        pytest.param("a\ud800", {}, "prompt", id="half a surrogate pair"),
        pytest.param([], {}, "prompt", id="no ids"),
        pytest.param([VOCAB_SIZE], {}, "prompt_token_ids", id="an id past the vocabulary"),
        pytest.param([-1], {}, "prompt_token_ids", id="a negative id"),
        pytest.param("a", {"n": 129}, "n", id="n"),
        pytest.param("a", {"n": 1, "best_of": 129}, "best_of", id="best_of"),
        pytest.param("a", {"logprobs": 6}, "logprobs", id="logprobs"),
        pytest.param("a", {"logprobs": -1}, "logprobs", id="logprobs of everything"),
        pytest.param("a", {"prompt_logprobs": 6}, "prompt_logprobs", id="prompt_logprobs"),
        pytest.param("a", {"stop": ["x"] * 17}, "stop", id="stop strings"),
        pytest.param("a", {"stop": "x" * 257}, "stop", id="a long stop string"),
        pytest.param("a", {"stop_token_ids": [1] * 1025}, "stop_token_ids", id="stop tokens"),
        pytest.param("a", {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", id="a stop token"),
        pytest.param("a", {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias", id="a biased token"),
        pytest.param("a", {"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias", id="bias"),
        pytest.param("a", {"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", id="allowed"),
        pytest.param("a", {"bad_words": ["x"] * 1025}, "bad_words", id="bad words"),
        pytest.param("a", {"bad_words": ["x" * 257]}, "bad_words", id="a long bad word"),
        pytest.param("a", {"truncate_prompt_tokens": 1001}, "truncate_prompt_tokens", id="keep"),
        pytest.param("a", {"min_tokens": 1000, "max_tokens": None}, "min_tokens", id="min_tokens"),
        pytest.param("a", {"logits_processors": [1]}, "logits_processors", id="not callable"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    prompt: Any, params: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        admit(prompt, **params)
    assert caught.value.param == param


def test_the_caps_themselves_are_allowed() -> None:
    admit(
        n=128,
        logprobs=5,
        prompt_logprobs=5,
        stop=["x" * 256] * 16,
        stop_token_ids=[1] * 1024,
    )


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"structured_outputs": StructuredOutputsParams(regex="a")}, id="guided"),
        pytest.param({"use_beam_search": True, "best_of": 2, "temperature": 0.0}, id="beam search"),
        pytest.param({"extra_args": {"mine": 1}}, id="arguments for plugins"),
        pytest.param({"flat_logprobs": True}, id="flat logprobs"),
        pytest.param({"trace_decode_token_ids": [1]}, id="forced tokens"),
        pytest.param({"thinking_token_budget": 0}, id="thinking budget"),
        pytest.param({"repetition_detection": {"max_pattern_size": 3}}, id="repetition"),
    ],
)
def test_features_this_version_lacks_are_refused_as_such(params: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="not available in this version"):
        admit(**params)


@pytest.mark.parametrize(
    ("field", "value", "kind", "words"),
    [
        pytest.param("params", PoolingParams(), UnsupportedError, "pooling", id="pooling"),
        pytest.param("params", {"n": 1}, RequestError, "SamplingParams", id="params of no type"),
        pytest.param(
            "lora_request", LoRARequest("x", 1, "/x"), UnsupportedError, "enable_lora", id="LoRA"
        ),
        pytest.param("request_id", "a" * 257, RequestError, "256", id="a long name"),
        pytest.param("request_id", "a\nb", RequestError, "printable", id="a name of two lines"),
        pytest.param("cache_salt", "a" * 257, RequestError, "cache_salt", id="a long salt"),
        pytest.param("priority", 2**31, RequestError, "priority", id="priority"),
        pytest.param("data_parallel_rank", 1, RequestError, "data_parallel_rank", id="a rank"),
        pytest.param("trace_headers", {"a": "b"}, UnsupportedError, "tracing", id="tracing"),
        pytest.param(
            "tokenization_kwargs", {"padding": 1}, UnsupportedError, "padding", id="an option"
        ),
    ],
)
def test_the_rest_of_a_request_is_checked_too(
    field: str, value: Any, kind: type[Exception], words: str
) -> None:
    new = make_request()
    setattr(new, field, value)
    with pytest.raises(kind, match=words):
        make_inputs().admit(new)


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        pytest.param("a", {}, id="a text"),
        pytest.param([1], {"stop": "x"}, id="a stop string"),
        pytest.param([1], {"bad_words": ["x"]}, id="a bad word"),
    ],
)
def test_what_needs_the_tokenizer_says_so_when_there_is_none(
    prompt: Any, params: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="was not loaded"):
        make_inputs(tokenizer=False).admit(make_request(prompt=prompt, **params))


def test_whole_vocabulary_logprobs_need_an_engine_without_limit() -> None:
    inputs = make_inputs(max_logprobs=-1)
    assert inputs.admit(make_request(logprobs=-1)).message.params.logprobs == -1


def test_names_on_the_wire_are_never_used_twice() -> None:
    inputs = make_inputs()
    names = {inputs.admit(make_request("same")).message.req_id for _ in range(100)}
    assert len(names) == 100


def test_parameters_spoiled_after_they_were_made_are_refused() -> None:
    new = make_request()
    new.params.top_p = 2.0  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="top_p"):
        make_inputs().admit(new)


def test_log_probabilities_of_a_prompt_have_a_budget_that_its_length_uses_up() -> None:
    num_tokens = MAX_PROMPT_LOGPROBS // (VOCAB_SIZE + 1)
    limits = msgspec.structs.replace(
        make_limits(), max_model_len=2 * num_tokens, num_gpu_blocks=num_tokens
    )
    inputs = make_inputs(limits, max_logprobs=-1, max_model_len=2 * num_tokens)
    inputs.admit(make_request(prompt=[1] * num_tokens, prompt_logprobs=-1))
    with pytest.raises(RequestError, match=f"the cap is {MAX_PROMPT_LOGPROBS}") as caught:
        inputs.admit(make_request(prompt=[1] * (num_tokens + 1), prompt_logprobs=-1))
    assert caught.value.param == "prompt_logprobs"
