"""The records keep the positions and names of 2024, and answer to newer names."""

from dataclasses import fields

from frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from frontend.pooling_params import PoolingParams
from frontend.usage_context import UsageContext


def test_the_fields_of_2024_come_first_and_in_order() -> None:
    assert [f.name for f in fields(RequestOutput)][:8] == [
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
        "metrics",
        "lora_request",
    ]
    assert [f.name for f in fields(CompletionOutput)] == [
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
        "lora_request",
    ]
    assert [f.name for f in fields(RequestMetrics)][:6] == [
        "arrival_time",
        "last_token_time",
        "first_scheduled_time",
        "first_token_time",
        "time_in_queue",
        "finished_time",
    ]


def test_a_sequence_is_finished_when_it_has_a_reason() -> None:
    assert not CompletionOutput(0, "", [], None, None).finished()
    assert CompletionOutput(0, "", [], None, None, "stop").finished()


def test_times_answer_to_their_newer_names() -> None:
    early = RequestMetrics(arrival_time=1.0, last_token_time=1.0)
    assert (early.queued_ts, early.scheduled_ts, early.first_token_ts) == (1.0, 0.0, 0.0)
    assert early.first_token_latency == 0.0
    late = RequestMetrics(1.0, 9.0, first_scheduled_time=2.0, first_token_time=4.0)
    assert (late.scheduled_ts, late.first_token_ts, late.last_token_ts) == (2.0, 4.0, 9.0)
    assert late.first_token_latency == 3.0


def test_small_public_records() -> None:
    params = PoolingParams({"a": 1})
    assert params.clone() == params
    assert params.clone() is not params
    assert UsageContext("LLM_CLASS") is UsageContext.LLM_CLASS
