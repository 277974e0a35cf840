"""From what was asked to what will run, over small checkpoints. Reads files, starts nothing."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from frontend import config_resolution
from frontend.config_resolution import (
    common_sliding_window,
    resolve_engine_config,
    resolve_model_config,
)
from ipc.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    SchedulerConfig,
)
from ipc.errors import ConfigError
from tests.frontend.make_checkpoints import write_checkpoint
from tests.frontend.make_tokenizers import TINY

GIB = 2**30


def resolve(directory: Path, *, device: str = "cpu", **options: Any) -> ModelConfig:
    """The resolved config of a checkpoint."""
    return resolve_model_config(
        ModelConfig(str(directory), **options), LoadConfig(), DeviceConfig(device)
    )


def make_config(directory: Path = TINY, **parts: Any) -> EngineConfig:
    """A config made by hand, not yet resolved."""
    parts = {"model_config": ModelConfig(str(directory))} | parts
    return EngineConfig(device_config=DeviceConfig("cpu"), **parts)


def test_a_config_made_by_hand_is_completed_and_stays_the_same_afterwards() -> None:
    config = resolve_engine_config(make_config(scheduler_config=SchedulerConfig(max_num_seqs=4)))
    assert config.model_config.model_path == str(TINY)
    assert config.scheduler_config.max_model_len == config.model_config.max_model_len == 2048
    assert config.model_config.generation_config["eos_token_id"] == [2, 0]
    assert resolve_engine_config(config) == config


def test_a_resolved_config_needs_no_files(tmp_path: Path) -> None:
    config = resolve_engine_config(make_config(write_checkpoint(tmp_path / "m")))
    shutil.rmtree(tmp_path / "m")
    assert resolve_engine_config(config) == config


@pytest.mark.parametrize(
    ("wanted", "stored", "device", "expected"),
    [
        ("auto", "float32", "cpu", "float32"),
        ("auto", "float16", "cpu", "bfloat16"),
        ("auto", "bfloat16", "cpu", "bfloat16"),
        ("auto", None, "cpu", "float32"),
        ("auto", "torch.float16", "cuda", "float16"),
        ("auto", "bfloat16", "cuda", "bfloat16"),
        ("auto", "float32", "cuda", "bfloat16"),
        ("auto", None, "cuda", "bfloat16"),
        ("half", "float32", "cpu", "float16"),
        ("float", "bfloat16", "cuda", "float32"),
        ("bfloat16", "float32", "cuda", "bfloat16"),
    ],
)
def test_dtype_fits_the_checkpoint_and_the_device(
    tmp_path: Path, wanted: str, stored: str | None, device: str, expected: str
) -> None:
    directory = write_checkpoint(tmp_path, torch_dtype=stored)
    config = resolve(directory, device=device, dtype=wanted)
    assert config.dtype == expected
    assert config.deterministic is (expected == "float32" and device == "cpu")


def test_the_newer_spelling_of_dtype_counts_and_the_choice_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_checkpoint(tmp_path, torch_dtype=None, dtype="float16")
    with caplog.at_level(logging.INFO):
        assert resolve(directory).dtype == "bfloat16"
    assert "--dtype auto: using bfloat16 on cpu (the checkpoint is float16)" in caplog.text


def test_determinism_can_be_asked_for(tmp_path: Path) -> None:
    assert resolve(write_checkpoint(tmp_path), deterministic=True).deterministic is True


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"model_type": "mistral", "sliding_window": 32}, 32, id="every layer"),
        pytest.param({"model_type": "mistral"}, 4096, id="mistral's own default"),
        pytest.param({"model_type": "mistral", "sliding_window": None}, None, id="none"),
        pytest.param({"model_type": "qwen2", "sliding_window": 32}, None, id="qwen2: off"),
        pytest.param(
            {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True},
            32,
            id="qwen2: on",
        ),
        pytest.param(
            {
                "model_type": "qwen2",
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            None,
            id="qwen2: some layers",
        ),
        pytest.param(
            {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
            None,
            id="mixed layers",
        ),
        pytest.param(
            {"sliding_window": 32, "layer_types": ["sliding_attention"] * 2}, 32, id="all named"
        ),
        pytest.param({"model_type": "gemma2", "sliding_window": 32}, None, id="gemma2 alternates"),
        pytest.param({"model_type": "llama", "sliding_window": 32}, None, id="llama ignores it"),
        pytest.param({"sliding_window": 32, "sliding_window_pattern": 4}, None, id="a pattern"),
        pytest.param(
            {"text_config": {"model_type": "mistral", "sliding_window": 8}}, 8, id="nested"
        ),
    ],
)
def test_the_cache_has_a_window_only_when_every_layer_has_it(
    config: dict[str, Any], expected: int | None
) -> None:
    assert common_sliding_window(config) == expected


def test_a_disabled_window_limits_the_length_instead(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, model_type="mistral", sliding_window=64)
    config = resolve_engine_config(make_config(directory))
    assert (config.cache_config.sliding_window, config.model_config.max_model_len) == (64, 4096)
    model_config = ModelConfig(str(directory), disable_sliding_window=True)
    config = resolve_engine_config(make_config(model_config=model_config))
    assert (config.cache_config.sliding_window, config.model_config.max_model_len) == (None, 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq is not available"),
        ({"quant_method": "int8"}, "int8 is not available"),
        ({"quant_method": "mystery"}, "unknown method 'mystery'"),
        ({}, None),
    ],
)
def test_quantized_checkpoints_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: str | None
) -> None:
    directory = write_checkpoint(tmp_path, quantization_config=settings)
    if words is None:
        resolve(directory)
        return
    with pytest.raises(ConfigError, match=words) as error:
        resolve(directory)
    assert "--quantization" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_checkpoints_with_code_of_their_own_need_trust(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path)
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"auto_map": {"AutoConfig": "code.Config"}}))
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        resolve(directory)
    assert resolve(directory, trust_remote_code=True).model_path == str(directory)


def write_hub_cache(cache: Path) -> None:
    """One model with code of its own, in two revisions."""
    root = cache / "models--org--model"
    (root / "refs").mkdir(parents=True)
    for ref, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (root / "refs" / ref).write_text(commit)
        places = {"AutoModelForCausalLM": "mine.MyForCausalLM"}
        write_checkpoint(root / "snapshots" / commit, auto_map=places)


def test_code_weights_and_tokenizer_have_revisions_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_hub_cache(tmp_path)

    def found(model: str = "org/model", **revisions: str) -> list[str]:
        config = resolve_model_config(
            ModelConfig(model, trust_remote_code=True, **revisions),
            LoadConfig(download_dir=str(tmp_path)),
            DeviceConfig("cpu"),
        )
        paths = (config.model_path, config.tokenizer_path, config.code_path)
        return [Path(path).name[:1] for path in paths]

    assert found() == ["a", "a", ""]
    assert found(revision="v2") == ["b", "b", ""]
    assert found(code_revision="v2") == ["a", "a", "b"]
    assert found(tokenizer_revision="v2") == ["a", "b", ""]
    with pytest.raises(ConfigError, match="v9"):
        found(code_revision="v9")
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    assert found(str(snapshot), code_revision="v2") == ["a", "a", ""]
    assert "--code-revision has no effect" in caplog.text


def test_a_tokenizer_of_another_directory_is_found_and_checked(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (tmp_path / "t").mkdir()
    config = resolve(directory, tokenizer=str(tmp_path / "t"))
    assert config.tokenizer_path == str(tmp_path / "t")
    assert config.model_path == str(directory)
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x"}}')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json asks for code"):
        resolve(directory, tokenizer=str(tmp_path / "t"))


def test_without_a_tokenizer_none_of_its_files_is_read(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "tokenizer.json").unlink()
    config = resolve(directory, tokenizer="/nowhere", skip_tokenizer_init=True)
    assert config.skip_tokenizer_init


def test_the_tokenizers_length_may_extend_the_models(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="--max-model-len 5000 is above"):
        resolve(directory, max_model_len=5000)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 8000}')
    assert resolve(directory, max_model_len=5000).max_model_len == 5000


def test_a_given_rope_scaling_replaces_the_checkpoints(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert resolve(directory).max_model_len == 8192
    config = resolve(directory, rope_scaling={"type": "dynamic", "factor": 3.0})
    assert config.max_model_len == 12288
    assert config.hf_config["rope_scaling"]["type"] == "dynamic"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve(tmp_path)


def test_swap_space_must_leave_memory_for_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def resolved_space(swap_space: float, memory_gib: float) -> float:
        memory = SimpleNamespace(total=memory_gib * GIB)
        monkeypatch.setattr(config_resolution.psutil, "virtual_memory", lambda: memory)
        config = make_config(cache_config=CacheConfig(swap_space=swap_space))
        return resolve_engine_config(config).cache_config.swap_space

    assert resolved_space(0, 16) == 0
    assert resolved_space(6, 16) == 6
    assert not caplog.records
    assert resolved_space(8, 16) == 8
    assert "large part" in caplog.text
    with pytest.raises(ConfigError, match="--swap-space 12"):
        resolved_space(12, 16)
    assert resolved_space(4, 4) == pytest.approx(0.8)  # the default adapts instead of failing


def test_a_window_set_by_hand_is_kept() -> None:
    config = make_config(cache_config=CacheConfig(sliding_window=16))
    assert resolve_engine_config(config).cache_config.sliding_window == 16


def test_checks_that_need_the_length_run_again(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    scheduler = SchedulerConfig(max_num_batched_tokens=2048, enable_chunked_prefill=False)
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens \(2048\)"):
        resolve_engine_config(make_config(directory, scheduler_config=scheduler))
    roomy = replace(scheduler, max_num_batched_tokens=4096)
    resolve_engine_config(make_config(directory, scheduler_config=roomy))


def test_int8_weights_are_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(model_config=ModelConfig(str(TINY), quantization="int8"))
    for device in ("cpu", "auto"):
        monkeypatch.setattr(config_resolution, "choose_device", lambda *_: "cpu")
        here = replace(config, device_config=DeviceConfig(device))
        assert resolve_engine_config(here).model_config.quantization == "int8"
    for device in ("cuda", "auto"):
        monkeypatch.setattr(config_resolution, "choose_device", lambda *_: "cuda")
        there = replace(config, device_config=DeviceConfig(device))
        with pytest.raises(ConfigError, match=r"int8 runs on the CPU only.*cuda.*--device cpu"):
            resolve_engine_config(there)
