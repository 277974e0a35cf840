"""The contract of EngineArgs, and one configuration from keywords or from a command line."""

import argparse
import json
import logging
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from frontend.engine_args import AsyncEngineArgs, EngineArgs, main
from frontend.usage_context import UsageContext
from ipc.config import EngineConfig, decode_config, encode_config
from ipc.errors import ConfigError
from tests.frontend.make_tokenizers import TINY

CONTRACT = {
    "model": "facebook/opt-125m",
    "served_model_name": None,
    "tokenizer": None,
    "skip_tokenizer_init": False,
    "tokenizer_mode": "auto",
    "trust_remote_code": False,
    "download_dir": None,
    "load_format": "auto",
    "dtype": "auto",
    "kv_cache_dtype": "auto",
    "quantization_param_path": None,
    "seed": 0,
    "max_model_len": None,
    "worker_use_ray": False,
    "distributed_executor_backend": None,
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "max_parallel_loading_workers": None,
    "block_size": 16,
    "enable_prefix_caching": False,
    "use_v2_block_manager": False,
    "swap_space": 4,
    "gpu_memory_utilization": 0.90,
    "max_num_batched_tokens": None,
    "max_num_seqs": 256,
    "max_logprobs": 5,
    "disable_log_stats": False,
    "revision": None,
    "code_revision": None,
    "rope_scaling": None,
    "tokenizer_revision": None,
    "quantization": None,
    "enforce_eager": False,
    "max_context_len_to_capture": None,
    "max_seq_len_to_capture": 8192,
    "disable_custom_all_reduce": False,
    "tokenizer_pool_size": 0,
    "tokenizer_pool_type": "ray",
    "tokenizer_pool_extra_config": None,
    "enable_lora": False,
    "max_loras": 1,
    "max_lora_rank": 16,
    "fully_sharded_loras": False,
    "lora_extra_vocab_size": 256,
    "long_lora_scaling_factors": None,
    "lora_dtype": "auto",
    "max_cpu_loras": None,
    "device": "auto",
    "ray_workers_use_nsight": False,
    "num_gpu_blocks_override": None,
    "num_lookahead_slots": 0,
    "model_loader_extra_config": None,
    "image_input_type": None,
    "image_token_id": None,
    "image_input_shape": None,
    "image_feature_size": None,
    "scheduler_delay_factor": 0.0,
    "enable_chunked_prefill": False,
    "guided_decoding_backend": "auto",  # 2024: outlines; ours chooses
    "speculative_model": None,
    "num_speculative_tokens": None,
    "speculative_max_model_len": None,
    "speculative_disable_by_batch_size": None,
    "ngram_prompt_lookup_max": None,
    "ngram_prompt_lookup_min": None,
}


def make_config(**overrides: Any) -> EngineConfig:
    """The tiny model's config on the CPU."""
    return EngineArgs(**({"model": str(TINY), "device": "cpu"} | overrides)).create_engine_config()


def config_from_line(*words: str) -> EngineConfig:
    """As ``make_config``, from a command line."""
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    args = parser.parse_args(["--model", str(TINY), "--device", "cpu", *words])
    return EngineArgs.from_cli_args(args).create_engine_config()


def test_the_fields_of_2024_keep_their_names_order_and_defaults() -> None:
    assert len(CONTRACT) == 65
    first = {f.name: f.default for f in fields(EngineArgs)[:65]}
    assert list(first) == list(CONTRACT)
    assert first == CONTRACT
    names = [f.name for f in fields(AsyncEngineArgs)][len(fields(EngineArgs)) :]
    assert names[:3] == ["engine_use_ray", "disable_log_requests", "max_log_len"]


def test_every_field_has_a_flag_and_an_empty_line_gives_the_defaults() -> None:
    parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser())
    flags = {word for action in parser._actions for word in action.option_strings}
    for f in fields(AsyncEngineArgs):
        assert "--" + f.name.replace("_", "-") in flags
    assert AsyncEngineArgs.from_cli_args(parser.parse_args([])) == AsyncEngineArgs()
    only_async = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(), async_args_only=True)
    assert "model" not in vars(only_async.parse_args([]))


def test_the_short_flags_of_2024_work() -> None:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    args = parser.parse_args(["-tp", "2", "-pp", "3", "-q", "awq"])
    assert (args.tensor_parallel_size, args.pipeline_parallel_size) == (2, 3)
    assert args.quantization == "awq"


def test_the_config_holds_all_sub_configs_and_survives_the_wire() -> None:
    config = make_config()
    assert config.model_config.model_path == str(TINY)
    assert config.model_config.max_model_len == config.scheduler_config.max_model_len == 2048
    assert config.model_config.eos_token_ids == [2, 0]
    assert config.model_config.hf_config["hidden_size"] == 384
    assert config.lora_config is None
    assert config.tokenizer_pool_config is None
    assert decode_config(encode_config(config)) == config


def test_keywords_and_the_command_line_give_the_same_config() -> None:
    by_keyword = make_config(
        max_model_len=512,
        max_num_seqs=8,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        served_model_name=["a", "b"],
        enable_prefix_caching=False,
        model_loader_extra_config={"x": 1},
        swap_space=0.5,
    )
    by_line = config_from_line(
        *("--max-model-len", "512", "--max-num-seqs", "8", "--served-model-name", "a", "b"),
        *("--rope-scaling", '{"type": "dynamic", "factor": 2.0}', "--no-enable-prefix-caching"),
        *("--model-loader-extra-config", '{"x": 1}', "--swap-space", "0.5"),
    )
    assert by_keyword == by_line
    assert by_keyword.model_config.served_names == ["a", "b"]
    assert by_keyword.model_config.hf_config["rope_scaling"] == {"type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("name", ["enable_prefix_caching", "enable_chunked_prefill"])
def test_what_cannot_change_tokens_is_on_unless_turned_off(name: str) -> None:
    def is_on(config: EngineConfig) -> bool:
        if name == "enable_prefix_caching":
            return config.cache_config.enable_prefix_caching
        return config.scheduler_config.enable_chunked_prefill

    flag = name.replace("_", "-")
    assert is_on(make_config())
    assert is_on(make_config(**{name: True}))
    assert not is_on(make_config(**{name: False}))
    assert is_on(config_from_line())
    assert not is_on(config_from_line(f"--no-{flag}"))


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        pytest.param({}, 2048, id="nothing said"),
        pytest.param({"enable_chunked_prefill": True}, 512, id="chunking asked for, as in 2024"),
        pytest.param({"enable_chunked_prefill": False}, 2048, id="no chunking"),
        pytest.param(
            {"enable_chunked_prefill": False, "max_model_len": 100}, 2048, id="at least 2048"
        ),
        pytest.param({"max_num_batched_tokens": 300}, 300, id="as asked"),
        pytest.param({"max_num_seqs": 4000}, 4000, id="room for one token each"),
    ],
)
def test_the_token_budget_follows_chunking(options: dict[str, Any], budget: int) -> None:
    assert make_config(**options).scheduler_config.max_num_batched_tokens == budget


@pytest.mark.parametrize(
    ("options", "at_fault"),
    [
        ({"max_num_batched_tokens": 100}, "--max-num-batched-tokens"),
        (
            {"max_num_batched_tokens": 1000, "enable_chunked_prefill": False},
            "--max-num-batched-tokens",
        ),
        ({"max_num_batched_tokens": 2**40}, "--max-num-batched-tokens"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"max_num_seqs": 2**20}, "--max-num-seqs"),
        ({"block_size": 7}, "--block-size"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": -0.5}, "--gpu-memory-utilization"),
        ({"swap_space": -1}, "--swap-space"),
        ({"swap_space": 1e6}, "--swap-space"),
        ({"num_gpu_blocks_override": 1}, "--num-gpu-blocks-override"),
        ({"num_gpu_blocks_override": 2**40}, "--num-gpu-blocks-override"),
        ({"num_lookahead_slots": -1}, "--num-lookahead-slots"),
        ({"scheduler_delay_factor": -0.1}, "--scheduler-delay-factor"),
        ({"max_logprobs": -2}, "--max-logprobs"),
        ({"max_model_len": 2049}, "--max-model-len"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"max_seq_len_to_capture": 0}, "--max-seq-len-to-capture"),
        ({"max_context_len_to_capture": 0}, "--max-context-len-to-capture"),
        ({"max_steps_in_flight": 0}, "--max-steps-in-flight"),
        ({"scheduling_policy": "random"}, "--scheduling-policy"),
        ({"preemption_mode": "drop"}, "--preemption-mode"),
        ({"cpu_kv_cache_space": 0}, "--cpu-kv-cache-space"),
        ({"cpu_kv_cache_space": 1e6}, "--cpu-kv-cache-space"),
        ({"max_waiting_requests": -1}, "--max-waiting-requests"),
        ({"max_waiting_tokens": -1}, "--max-waiting-tokens"),
        ({"worker_threads": 0}, "--worker-threads"),
        ({"engine_iteration_timeout": -1}, "--engine-iteration-timeout"),
        ({"executor_class": "no colon"}, "--executor-class"),
        ({"executor_class": "no_such_package.module:Class"}, "--executor-class"),
        ({"dtype": "int8"}, "--dtype"),
        ({"device": "neuron"}, "--device"),
        ({"device": "tpu"}, "--device"),
        ({"load_format": "tensorizer"}, "--load-format"),
        ({"load_format": "pt"}, "--load-format"),
        ({"served_model_name": []}, "--served-model-name"),
        ({"served_model_name": ""}, "--served-model-name"),
        ({"tokenizer_mode": "mistral"}, "--tokenizer-mode"),
        ({"tokenizer": "/nowhere"}, "--tokenizer"),
        ({"rope_scaling": {"type": "spiral"}}, "--rope-scaling"),
        ({"rope_scaling": "{"}, "--rope-scaling"),
        ({"model": "/nowhere"}, "--model"),
        ({"model": ""}, "--model"),
        ({"seed": 2**64}, "--seed"),
    ],
)
def test_a_value_that_cannot_work_is_refused_at_once_by_flag(
    options: dict[str, Any], at_fault: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=at_fault):
        make_config(**options)
    assert time.perf_counter() - start < 2.0


def test_async_flags_are_checked_and_ray_gets_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="--max-log-len"):
        AsyncEngineArgs(model=str(TINY), max_log_len=-1).create_engine_config()
    AsyncEngineArgs(model=str(TINY), engine_use_ray=True).create_engine_config()
    assert "--engine-use-ray" in caplog.text


def test_the_old_name_of_a_flag_is_mapped_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(max_context_len_to_capture=777)
    assert config.model_config.max_seq_len_to_capture == 777
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "--max-seq-len-to-capture" in warnings[0].getMessage()


def test_effective_values_are_logged_once_and_secrets_are_masked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        EngineArgs(
            model=str(TINY),
            tokenizer_mode="auto",
            model_loader_extra_config={"s3_secret_access_key": "hunter2", "plain": "seen"},
        ).create_engine_config(UsageContext.LLM_CLASS)
    lines = [r.getMessage() for r in caplog.records if "Engine configuration" in r.getMessage()]
    assert len(lines) == 1
    assert "LLM_CLASS" in lines[0]
    assert "hunter2" not in caplog.text
    for value in ("seen", "'max_model_len': 2048", "'tokenizer_mode': 'auto'", str(TINY)):
        assert value in lines[0]


def test_a_pool_of_tokenizers_is_configured_only_when_it_has_members() -> None:
    assert make_config(tokenizer_pool_type="thread").tokenizer_pool_config is None
    config = make_config(tokenizer_pool_size=2, tokenizer_pool_extra_config='{"num_cpus": 1}')
    assert config.tokenizer_pool_config is not None
    assert config.tokenizer_pool_config.extra_config == {"num_cpus": 1}


def test_the_module_writes_the_config_for_another_process() -> None:
    command = [sys.executable, "-m", "frontend.engine_args", "--encode", "--device", "cpu"]
    good = subprocess.run([*command, "--model", str(TINY)], capture_output=True, timeout=60)
    assert good.returncode == 0
    assert decode_config(good.stdout) == make_config()


@pytest.mark.parametrize("words", [["--block-size", "3"], ["--dtype", "int8"], ["--nonsense"]])
def test_the_module_ends_with_code_two_for_bad_flags(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["--encode", "--model", str(TINY), *words])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    assert words[0] in capsys.readouterr().err


def test_making_a_config_imports_nothing_heavy_and_starts_nothing() -> None:
    code = (
        "import sys, psutil; from frontend import EngineArgs;"
        f"EngineArgs(model={str(TINY)!r}).create_engine_config();"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'zmq', 'triton'};"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys();"
        "assert not psutil.Process().children()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_config_files_with_huge_numbers_reach_other_processes(tmp_path: Path) -> None:
    from tests.frontend.make_checkpoints import write_checkpoint

    directory = write_checkpoint(tmp_path, model_max_length=10**30, nested=[{"x": -(10**30)}])
    config = EngineArgs(model=str(directory), device="cpu").create_engine_config()
    assert decode_config(encode_config(config)) == config
    assert json.dumps(config.model_config.hf_config)
