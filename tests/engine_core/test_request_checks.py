"""What is refused, and that the refusal names field and numbers."""

import re
from typing import Any

import pytest

from engine_core.request_checks import RequestLimits, check_request
from ipc.errors import RequestError, UnsupportedError
from ipc.messages import LoRASpec, ResumedBranch
from ipc.sampling_params import StructuredOutputsParams
from tests.engine_core.builders import make_request

LIMITS = RequestLimits(
    vocab_size=61, max_model_len=64, max_logprobs=5, num_usable_blocks=8, block_size=8
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"prompt": []}, "prompt must not be empty", id="empty prompt"),
        pytest.param({"prompt": 64}, "64 tokens.*64 tokens in all", id="no room for output"),
        pytest.param({"prompt": [61]}, "between 0 and 60, got 61", id="id beyond vocabulary"),
        pytest.param({"prompt": [-1]}, "prompt must hold", id="negative id"),
        pytest.param({"prompt": [2**70]}, "prompt must hold", id="id beyond any integer"),
        pytest.param({"prompt": [1.5]}, "prompt must hold", id="id that is no integer"),
        pytest.param({"n": 129}, "at most 128, got 129", id="n"),
        pytest.param({"n": 10**6}, "at most 128, got 1000000", id="huge n"),
        pytest.param({"best_of": 129}, "at most 128, got 129", id="best_of"),
        pytest.param({"logprobs": 6}, "logprobs must be at most 5", id="logprobs"),
        pytest.param({"logprobs": -1}, "at most 5.*got 61", id="all logprobs"),
        pytest.param({"prompt_logprobs": 6}, "prompt_logprobs must be", id="prompt_logprobs"),
        pytest.param({"seed": None}, "seed must be set", id="no seed"),
        pytest.param({"stop": ["x"] * 17}, "stop may hold 16", id="stop strings"),
        pytest.param({"stop": ["x" * 257]}, "longest of 257", id="a long stop string"),
        pytest.param({"stop_token_ids": [1] * 2049}, "stop_token_ids may", id="stop tokens"),
        pytest.param({"logit_bias": {61: 1.0}}, "logit_bias must hold", id="bias off vocabulary"),
        pytest.param({"allowed_token_ids": [99]}, "allowed_token_ids", id="allowed off vocabulary"),
        pytest.param({"allowed_token_ids": [1] * 62}, "may hold 61", id="too many allowed"),
        pytest.param({"bad_words_token_ids": [[1]] * 2049}, "bad_words may", id="bad words"),
        pytest.param(
            {"bad_words_token_ids": [[1] * 1029]}, "words of 1028 tokens", id="a long bad word"
        ),
        pytest.param({"cache_salt": "x" * 257}, "cache_salt must have", id="long salt"),
        pytest.param({"cache_salt": ""}, "cache_salt must have", id="empty salt"),
        pytest.param({"cache_salt": "a\0b"}, "not printable", id="salt with NUL"),
        pytest.param({"cache_salt": "\ud800"}, "not printable", id="salt with a surrogate"),
        pytest.param({"req_id": "x" * 257}, "req_id must have", id="long request id"),
        pytest.param({"resumed": [ResumedBranch(1, [2])]}, "resumed branch 1", id="no such branch"),
        pytest.param({"resumed": [ResumedBranch(0, [2])] * 2}, "there twice", id="branch twice"),
        pytest.param({"resumed": [ResumedBranch(0, [61])]}, "resumed must", id="resumed id"),
        pytest.param({"resumed": [ResumedBranch(0, [1] * 70)]}, "74 tokens", id="resumed too long"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(fields: dict[str, Any], message: str) -> None:
    request = make_request(fields.pop("req_id", "r"), fields.pop("prompt", 4), **fields)
    with pytest.raises(RequestError) as caught:
        check_request(request, LIMITS)
    assert re.search(message, str(caught.value), re.DOTALL)
    assert caught.value.param is not None


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"lora": LoRASpec("x", 1, "/x")}, id="LoRA"),
        pytest.param(
            {"structured_outputs": StructuredOutputsParams(regex="a")}, id="structured outputs"
        ),
        pytest.param({"use_beam_search": True, "best_of": 2, "temperature": 0.0}, id="beam search"),
    ],
)
def test_a_feature_that_does_not_exist_is_refused_as_such(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"(of|by) this version"):
        check_request(make_request("r", **fields), LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"n": 128}, id="n"),
        pytest.param({"logprobs": 5, "prompt_logprobs": 5}, id="logprobs"),
        pytest.param({"prompt": 63}, id="the longest prompt"),
        pytest.param({"cache_salt": "x" * 256, "req_id": "x" * 256}, id="names"),
        pytest.param({"stop": ["x" * 256] * 16}, id="stop strings"),
        pytest.param({"stop_token_ids": [1] * 2048}, id="stop tokens"),
        pytest.param({"bad_words_token_ids": [[1, 2, 3]] * 2048}, id="bad words"),
        pytest.param({"bad_words_token_ids": [[1] * 1028]}, id="a long bad word"),
        pytest.param({"prompt": [0, 60]}, id="token ids"),
        pytest.param({"stop_token_ids": [10**6]}, id="a stop token that can never be sampled"),
    ],
)
def test_a_request_at_its_limits_is_served(fields: dict[str, Any]) -> None:
    request = make_request(fields.pop("req_id", "r"), fields.pop("prompt", 4), **fields)
    check_request(request, LIMITS)


def test_log_probabilities_of_a_prompt_have_a_budget_that_its_length_uses_up() -> None:
    limits = RequestLimits(
        vocab_size=2**16, max_model_len=200, max_logprobs=-1, num_usable_blocks=99, block_size=8
    )
    check_request(make_request("r", 63, prompt_logprobs=-1), limits)  # 63 * (2**16 + 1) < 2**22
    check_request(make_request("r", 190, prompt_logprobs=20), limits)
    with pytest.raises(RequestError, match=r"the cap is 4194304") as caught:
        check_request(make_request("r", 64, prompt_logprobs=-1), limits)
    assert caught.value.param == "prompt_logprobs"


@pytest.mark.parametrize("field", ["n", "best_of"])
def test_the_field_with_too_many_branches_is_named(field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(make_request("r", **{field: 129}), LIMITS)
    assert caught.value.param == field
