"""LLMEngine: the contract of stepping by hand, on a scripted core and on the bundled model."""

import gc
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from frontend.engine_args import EngineArgs
from frontend.llm_engine import LLMEngine
from frontend.lora_request import LoRARequest
from frontend.outputs import RequestOutput
from frontend.stat_loggers import IterationStats
from ipc.config import EngineConfig
from ipc.errors import EngineDeadError, UnsupportedError
from ipc.messages import AddRequest
from ipc.operations import (
    CheckWorkers,
    IsSleeping,
    ResetPrefixCache,
    Sleep,
    StartProfile,
    StopProfile,
    WakeUp,
)
from ipc.sampling_params import SamplingParams
from tests.frontend.builders import TINY, FakeClient, FakeCore, always, make_limits, make_tokenizer

EXPECTED = json.loads((Path(__file__).parents[1] / "expected.json").read_text())["base"]


@cache
def tiny_config() -> EngineConfig:
    args = EngineArgs(
        model=str(TINY), dtype="float32", device="cpu", max_model_len=256, worker_threads=1
    )
    return args.create_engine_config()


@cache
def tiny_engine() -> LLMEngine:
    """The bundled model in this process; every test leaves it without open requests."""
    return LLMEngine(vllm_config=tiny_config())


def make_engine(core: FakeCore | None = None, **options: Any) -> LLMEngine:
    """An engine on a scripted core that says "hello"."""
    core = core or FakeCore(always("hello"))
    engine = LLMEngine(vllm_config=tiny_config(), core_client=FakeClient(core), **options)
    engine.set_tokenizer(make_tokenizer())
    return engine


def greedy(**params: Any) -> SamplingParams:
    """Greedy past the end-of-text tokens, whose text is shown, as the oracle did."""
    options = {
        "temperature": 0.0,
        "max_tokens": 32,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    return SamplingParams(**(options | params))


def run(engine: LLMEngine) -> dict[str, RequestOutput]:
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    return last


# ---------------------------------------------------------------- on a scripted core


def test_requests_are_added_stepped_and_counted() -> None:
    engine = make_engine()
    engine.add_request("a", "hi", SamplingParams(max_tokens=3))
    engine.add_request("b", {"prompt_token_ids": [1]}, SamplingParams(), arrival_time=5.0)
    assert engine.get_num_unfinished_requests() == 2
    assert [output.request_id for output in engine.step()] == ["a", "b"]
    outputs = run(engine)
    assert outputs["a"].outputs[0].text == "hel"
    assert outputs["b"].outputs[0].text == "hello"
    assert outputs["b"].metrics is not None
    assert outputs["b"].metrics.arrival_time == 5.0
    assert not engine.has_unfinished_requests()


def test_aborting_ends_without_output_and_unknown_names_are_no_error() -> None:
    engine = make_engine()
    for name in "abc":
        engine.add_request(name, "hi", SamplingParams())
    engine.abort_request("a")
    engine.abort_request(["b", "unknown"])
    assert set(run(engine)) == {"c"}


def test_arguments_of_an_added_request_travel() -> None:
    core = FakeCore(always("x"))
    engine = make_engine(core)
    engine.add_request("a", [1], SamplingParams(), priority=4, prompt_text="one")
    (message,) = core.sent
    assert isinstance(message, AddRequest)
    assert message.priority == 4
    assert run(engine)["a"].prompt == "one"


@pytest.mark.parametrize(
    ("params", "lora_request"),
    [
        pytest.param({"max_tokens": 3}, None, id="parameters of no type"),
        pytest.param(SamplingParams(), LoRARequest("x", 1, "/x"), id="an adapter without LoRA"),
    ],
)
def test_wrong_requests_are_value_errors(params: Any, lora_request: LoRARequest | None) -> None:
    engine = make_engine()
    with pytest.raises(ValueError):
        engine.add_request("a", "hi", params, lora_request=lora_request)
    assert not engine.has_unfinished_requests()


def test_it_answers_to_the_names_of_its_configs() -> None:
    engine = make_engine()
    assert engine.vllm_config.lora_config is None
    assert engine.lora_config is None
    assert engine.model_config is engine.get_model_config()
    assert engine.scheduler_config is engine.vllm_config.scheduler_config
    assert engine.get_decoding_config() is engine.decoding_config
    with pytest.raises(AttributeError, match="no attribute 'modle_config'"):
        engine.modle_config  # noqa: B018


def test_the_tokenizer_can_be_had_in_every_way() -> None:
    engine = make_engine()
    tokenizer = engine.get_tokenizer()
    assert engine.get_tokenizer_for_seq(object()) is tokenizer
    group = engine.get_tokenizer_group()
    assert group.get_lora_tokenizer(None) is tokenizer
    assert group.encode("hi") == [104, 105]
    assert engine.process_model_inputs("a", "hi")["prompt_token_ids"] == [104, 105]


def test_control_operations_are_sent() -> None:
    core = FakeCore(
        always("x"),
        results={ResetPrefixCache: True, IsSleeping: False, StopProfile: ["trace.json"]},
    )
    engine = make_engine(core)
    assert engine.reset_prefix_cache() is True
    assert engine.is_sleeping() is False
    engine.sleep(2)
    engine.wake_up()
    engine.start_profile("/traces")
    assert engine.stop_profile() == ["trace.json"]
    engine.check_health()
    assert core.calls == [
        ResetPrefixCache(),
        IsSleeping(),
        Sleep(2),
        WakeUp(),
        StartProfile("/traces"),
        StopProfile(),
        CheckWorkers(),
    ]


def test_what_this_version_lacks_is_refused_with_a_sentence() -> None:
    engine = make_engine()
    refused = [
        lambda: engine.add_lora(LoRARequest("x", 1, "/x")),
        lambda: engine.pin_lora(1),
        lambda: engine.collective_rpc("f"),
        lambda: engine.apply_model(print),
        lambda: engine.wake_up(["weights"]),
        lambda: engine.sleep(mode="keep"),
        lambda: engine.reset_prefix_cache(reset_running_requests=True),
    ]
    for use in refused:
        with pytest.raises(UnsupportedError, match="not available"):
            use()
    assert engine.list_loras() == set()
    assert engine.remove_lora(1) is False
    assert engine.reset_mm_cache() is True
    assert engine.reset_encoder_cache() is True


def test_lines_of_statistics_asked_for_often_are_written_seldom() -> None:
    lines: list[str] = []

    class Logger:
        def record(self, stats: object, iteration: IterationStats) -> None:
            pass

        def log(self) -> None:
            lines.append("line")

        def close(self) -> None:
            pass

    engine = make_engine(stat_loggers=[lambda config, index: Logger()])
    engine.do_log_stats_with_interval()
    engine.do_log_stats_with_interval()
    assert lines == ["line"]


def test_outputs_of_another_type_are_found() -> None:
    assert LLMEngine.validate_outputs(["a"], str) == ["a"]
    with pytest.raises(TypeError, match="expected RequestOutput, got str"):
        LLMEngine.validate_outputs(["a"], RequestOutput)


def test_an_engine_cannot_be_pickled() -> None:
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        pickle.dumps(make_engine())


def test_collecting_an_engine_closes_its_client() -> None:
    client = FakeClient(FakeCore(always("x")))
    engine = LLMEngine(vllm_config=tiny_config(), core_client=client)
    del engine
    gc.collect()
    assert client.is_closed


def test_after_shutdown_every_use_says_so() -> None:
    engine = make_engine()
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.add_request("a", "hi", SamplingParams())
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.check_health()


class NoteLogger:
    """Notes what it was made with and told."""

    def __init__(self, config: EngineConfig, engine_index: int) -> None:
        self.config, self.num_tokens, self.num_lines = config, 0, 0
        noted.append(self)

    def record(self, stats: object, iteration: IterationStats) -> None:
        self.num_tokens += iteration.num_generation_tokens

    def log(self) -> None:
        self.num_lines += 1

    def close(self) -> None:
        self.num_tokens = -self.num_tokens


noted: list[NoteLogger] = []


def test_stat_loggers_are_made_told_asked_and_closed() -> None:
    noted.clear()
    engine = make_engine(stat_loggers=[NoteLogger])
    engine.add_request("a", "hi", SamplingParams(max_tokens=3))
    run(engine)
    engine.do_log_stats()
    (logger,) = noted
    assert logger.config is engine.vllm_config
    assert (logger.num_tokens, logger.num_lines) == (3, 1)
    engine.shutdown()
    assert logger.num_tokens == -3


def test_a_full_core_is_no_error_here() -> None:
    core = FakeCore(always("hello"), make_limits(max_num_seqs=1, max_waiting_requests=1))
    engine = make_engine(core)
    for number in range(20):
        engine.add_request(str(number), "hi", SamplingParams())
    assert len(run(engine)) == 20


# ---------------------------------------------------------------- on the bundled model


def test_the_bundled_model_says_what_the_oracle_says() -> None:
    engine = tiny_engine()
    for number, case in enumerate(EXPECTED):
        engine.add_request(str(number), case["prompt"], greedy())
    outputs = run(engine)
    for number, case in enumerate(EXPECTED):
        completion = outputs[str(number)].outputs[0]
        assert completion.token_ids == case["ids"]
        assert completion.text == case["text"]


def test_both_forms_of_the_constructor_give_the_same_tokens() -> None:
    config = tiny_config()
    engine = LLMEngine(
        model_config=config.model_config,
        cache_config=config.cache_config,
        parallel_config=config.parallel_config,
        scheduler_config=config.scheduler_config,
        device_config=config.device_config,
        load_config=config.load_config,
        lora_config=None,
        vision_language_config=None,
        speculative_config=None,
        decoding_config=config.decoding_config,
        executor_class=None,
        log_stats=False,
    )
    case = EXPECTED[0]
    engine.add_request("a", case["prompt"], greedy())
    assert run(engine)["a"].outputs[0].token_ids == case["ids"]
    engine.shutdown()


def test_a_banned_token_never_comes_and_the_prompt_is_seen() -> None:
    engine, case = tiny_engine(), EXPECTED[0]
    banned, prompts = case["ids"][0], []

    def ban(prompt_ids: list[int], output_ids: list[int], logits: Any) -> Any:
        prompts.append((prompt_ids, len(output_ids)))
        logits[banned] = float("-inf")
        return logits

    engine.add_request("a", case["prompt"], greedy(max_tokens=5, logits_processors=[ban]))
    engine.add_request("b", case["prompt"], greedy(max_tokens=5))
    outputs = run(engine)
    assert banned not in outputs["a"].outputs[0].token_ids
    assert outputs["b"].outputs[0].token_ids == case["ids"][:5]
    assert prompts == [(case["prompt_ids"], number) for number in range(5)]


def test_a_failing_processor_fails_its_own_request_alone() -> None:
    engine, case = tiny_engine(), EXPECTED[0]

    def fail(output_ids: list[int], logits: Any) -> Any:
        raise ValueError("boom")

    engine.add_request("a", case["prompt"], greedy(logits_processors=[fail]))
    engine.add_request("b", case["prompt"], greedy(max_tokens=5))
    outputs = run(engine)
    assert outputs["a"].outputs[0].finish_reason == "error"
    assert "ValueError: boom" in (outputs["a"].error or "")
    assert outputs["b"].outputs[0].token_ids == case["ids"][:5]


def test_a_stop_string_frees_the_branch_in_the_core() -> None:
    engine, case = tiny_engine(), EXPECTED[0]
    assert "\n    for" in case["text"]
    engine.add_request("a", case["prompt"], greedy(stop="\n    for"))
    completion = run(engine)["a"].outputs[0]
    assert completion.text == case["text"].split("\n    for")[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "\n    for")
    assert engine.get_stats().num_running == 0


def test_logprobs_of_output_and_prompt_come_from_the_raw_distribution() -> None:
    engine, case = tiny_engine(), EXPECTED[0]
    engine.add_request("a", case["prompt"], greedy(max_tokens=2, logprobs=5, prompt_logprobs=1))
    output = run(engine)["a"]
    assert output.outputs[0].logprobs is not None
    first = output.outputs[0].logprobs[0]
    for top in case["top5_first"]:
        assert first[top["id"]].logprob == pytest.approx(top["logprob"], abs=1e-4)
        assert first[top["id"]].decoded_token == top["text"]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [
        token_id in (position or {})
        for token_id, position in zip(
            case["prompt_ids"][1:], output.prompt_logprobs[1:], strict=True
        )
    ] == [True] * (len(case["prompt_ids"]) - 1)


def test_several_branches_differ_and_the_best_are_chosen() -> None:
    engine = tiny_engine()
    params = SamplingParams(n=2, best_of=4, max_tokens=8, seed=1, ignore_eos=True)
    engine.add_request("a", "The", params)
    output = run(engine)["a"]
    scores = [completion.cumulative_logprob or 0.0 for completion in output.outputs]
    assert [completion.index for completion in output.outputs] == [0, 1]
    assert scores == sorted(scores, reverse=True)
    assert output.outputs[0].token_ids != output.outputs[1].token_ids


def test_requests_without_a_seed_repeat_after_a_new_start() -> None:
    def say() -> list[int]:
        engine = LLMEngine(vllm_config=tiny_config())
        engine.add_request("a", "The", SamplingParams(max_tokens=8, ignore_eos=True))
        token_ids = run(engine)["a"].outputs[0].token_ids
        engine.shutdown()
        return token_ids

    assert say() == say()
