"""LLM: batches in order, errors before work, nothing left behind."""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest

from frontend.engine_args import EngineArgs
from frontend.llm import LLM, pair_prompts
from frontend.llm_engine import LLMEngine
from ipc.config import EngineConfig
from ipc.errors import ConfigError, EngineGenerateError, RequestError, UnsupportedError
from ipc.messages import AddRequest, EngineOutput, EngineOutputs, FinishReason
from ipc.sampling_params import RequestOutputKind, SamplingParams
from tests.frontend.builders import EOS, TINY, FakeClient, FakeCore, make_tokenizer


@cache
def tiny_config() -> EngineConfig:
    return EngineArgs(model=str(TINY), device="cpu", max_model_len=64).create_engine_config()


def echo(request: AddRequest, index: int) -> Iterable[int]:
    """The prompt backwards, then the end."""
    return [*reversed(request.prompt_token_ids), EOS]


def make_llm(core: FakeCore | None = None) -> LLM:
    """An LLM on a scripted core that says its prompts backwards."""
    client = FakeClient(core or FakeCore(echo))
    llm = LLM.from_engine(LLMEngine(vllm_config=tiny_config(), core_client=client))
    llm.set_tokenizer(make_tokenizer())
    return llm


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_the_constructors_arguments_are_the_contracts() -> None:
    parameters = list(inspect.signature(LLM.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters[1:-1]] == [
        ("tokenizer", None),
        ("tokenizer_mode", "auto"),
        ("skip_tokenizer_init", False),
        ("trust_remote_code", False),
        ("tensor_parallel_size", 1),
        ("dtype", "auto"),
        ("quantization", None),
        ("revision", None),
        ("tokenizer_revision", None),
        ("seed", 0),
        ("gpu_memory_utilization", 0.9),
        ("swap_space", 4),
        ("enforce_eager", False),
        ("max_context_len_to_capture", None),
        ("max_seq_len_to_capture", 8192),
        ("disable_custom_all_reduce", False),
    ]
    assert parameters[0].name == "model"
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_unknown_arguments_are_type_errors_and_bad_values_name_their_flag() -> None:
    with pytest.raises(TypeError, match="modle"):
        LLM(str(TINY), modle=1)
    with pytest.raises(ConfigError, match="gpu-memory-utilization"):
        LLM(str(TINY), gpu_memory_utilization=2.0)


@pytest.mark.parametrize(
    ("prompts", "ids", "expected"),
    [
        pytest.param("abc", None, ["cba"], id="one text"),
        pytest.param(["ab", "cd"], None, ["ba", "dc"], id="texts"),
        pytest.param({"prompt": "abc"}, None, ["cba"], id="a mapping"),
        pytest.param([97, 98], None, ["ba"], id="one list of ids"),
        pytest.param([[97], [98]], None, ["a", "b"], id="lists of ids"),
        pytest.param(None, [[97, 98], [99]], ["ba", "c"], id="ids by keyword"),
        pytest.param(None, [97, 98], ["ba"], id="one list of ids by keyword"),
        pytest.param(["x", "y"], [[97, 98], [99]], ["ba", "c"], id="both: ids count"),
        pytest.param(["ab", {"prompt": "cd"}, [97]], None, ["ba", "dc", "a"], id="a mixture"),
        pytest.param([], None, [], id="none at all"),
    ],
)
def test_every_form_of_prompts_works(prompts: Any, ids: Any, expected: list[str]) -> None:
    outputs = make_llm().generate(prompts, prompt_token_ids=ids, use_tqdm=False)
    assert texts(outputs) == expected


def test_both_texts_and_ids_show_the_text() -> None:
    (output,) = make_llm().generate("x", prompt_token_ids=[[97]], use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids) == ("x", [97])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({}, "either prompts or", id="neither prompts nor ids"),
        pytest.param(
            {"prompts": ["a"], "prompt_token_ids": [[1], [2]]}, "got 1 and 2", id="two lengths"
        ),
        pytest.param(
            {"prompts": ["a", "b"], "sampling_params": [SamplingParams()]},
            r"prompts \(2\), got 1",
            id="too few parameters",
        ),
    ],
)
def test_mismatches_are_value_errors(arguments: dict[str, Any], words: str) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match=words):
        llm.generate(**arguments)
    assert not llm.llm_engine.has_unfinished_requests()


def test_parameters_default_pair_up_or_serve_all() -> None:
    core = FakeCore(echo)
    llm = make_llm(core)
    llm.generate(["a", "b"], use_tqdm=False)
    llm.generate(["a", "b"], SamplingParams(max_tokens=7), use_tqdm=False)
    llm.generate(["a", "b"], [SamplingParams(max_tokens=n) for n in (1, 2)], use_tqdm=False)
    limits = [m.params.max_tokens for m in core.sent if isinstance(m, AddRequest)]
    assert limits == [16, 16, 7, 7, 1, 2]


def test_the_callers_parameters_stay_as_they_were() -> None:
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    (output,) = make_llm().generate("abc", params, use_tqdm=False)
    assert (output.outputs[0].text, params.output_kind) == ("cba", RequestOutputKind.DELTA)
    assert params.seed is None


def test_the_order_is_the_inputs_even_when_the_end_is_not() -> None:
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 5)]
    outputs = make_llm().generate(["a" * 9, "b" * 9, "c" * 9], params, use_tqdm=False)
    assert texts(outputs) == ["a" * 9, "b", "c" * 5]
    assert [output.request_id for output in outputs] == ["0", "1", "2"]


def test_one_prompt_too_long_refuses_all_and_leaves_nothing_behind() -> None:
    core = FakeCore(echo)
    llm = make_llm(core)
    with pytest.raises(RequestError, match="1000"):
        llm.generate(["a", "b" * 1000, "c"], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert not core.has_unfinished
    assert texts(llm.generate("ab", use_tqdm=False)) == ["ba"]


def test_a_prompt_too_long_can_be_an_empty_output_as_in_2024() -> None:
    prompts = ["ab", "b" * 1000, "cd"]
    outputs = make_llm().generate(prompts, use_tqdm=False, allow_long_prompts=True)
    assert texts(outputs) == ["ba", "", "dc"]
    assert outputs[1].finished
    assert outputs[1].outputs[0].finish_reason == "length"
    assert len(outputs[1].prompt_token_ids) == 1000


def test_an_interrupt_ends_everything_and_the_engine_goes_on() -> None:
    core = FakeCore(echo)
    llm = make_llm(core)

    def interrupt(request: AddRequest, index: int) -> Iterable[int]:
        yield 97
        raise KeyboardInterrupt

    core.script = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert not core.has_unfinished
    core.script = echo
    assert texts(llm.generate(["ab"], use_tqdm=False)) == ["ba"]


def test_a_request_that_fails_ends_the_others_and_says_which() -> None:
    core = FakeCore(echo)
    llm = make_llm(core)
    step = core.step

    def failing_step() -> EngineOutputs:
        req_id = list(core.requests)[1]
        error = EngineOutput(req_id, 0, 0, [], FinishReason.ERROR, error="NaN in the logits")
        return EngineOutputs(0, 0, [*step().outputs[:1], error])

    core.step = failing_step  # type: ignore[method-assign]
    with pytest.raises(EngineGenerateError, match="prompt 1: NaN"):
        llm.generate(["abc", "b"], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_the_bar_is_on_stderr_and_shows_speed(capsys: pytest.CaptureFixture[str]) -> None:
    make_llm().generate(["ab", "cd"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "tokens/s" in captured.err
    make_llm().generate(["ab"], use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_swapping_the_tokenizer_takes_effect() -> None:
    llm = make_llm()
    first = llm.get_tokenizer()
    llm.set_tokenizer(make_tokenizer())
    assert llm.get_tokenizer() is not first
    assert texts(llm.generate("ab", use_tqdm=False)) == ["ba"]


def test_a_chat_goes_through_the_template() -> None:
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}{{ mark }}{% endif %}"
    )
    llm, hello = make_llm(), [{"role": "user", "content": "hi"}]
    options: Any = {"chat_template": template, "chat_template_kwargs": {"mark": "a:"}}
    assert llm.chat(hello, use_tqdm=False, **options)[0].prompt == "u:hi;a:"
    two = llm.chat([hello, hello * 2], use_tqdm=False, **options)
    assert [output.prompt for output in two] == ["u:hi;a:", "u:hi;u:hi;a:"]
    (plain,) = llm.chat(hello, use_tqdm=False, add_generation_prompt=False, **options)
    assert plain.prompt == "u:hi;"


def test_a_chat_without_any_template_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        make_llm().chat([{"role": "user", "content": "hi"}])


def test_recommended_parameters_come_from_the_checkpoint() -> None:
    recommended = tiny_config().model_config.generation_config
    params = make_llm().get_default_sampling_params()
    assert params.temperature == recommended.get("temperature", 1.0)
    assert params.top_p == recommended.get("top_p", 1.0)


def test_what_this_version_lacks_is_refused_with_a_sentence() -> None:
    llm = make_llm()
    for use in (llm.encode, llm.embed, llm.score, llm.beam_search, llm.collective_rpc):
        with pytest.raises(UnsupportedError, match="not available"):
            use("x")
    assert llm.reset_mm_cache() is True
    with pytest.raises(UnsupportedError, match="images"):
        llm.generate("a", multi_modal_data={"image": 1})


def test_pairing_keeps_forms_apart() -> None:
    assert pair_prompts("a", None) == ["a"]
    assert pair_prompts(None, [[1], [2]]) == [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]
