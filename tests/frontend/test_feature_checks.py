"""Features: arguments are checked first, then what this version lacks is refused by name."""

from typing import Any

import pytest

from frontend.engine_args import EngineArgs
from frontend.feature_checks import (
    LORA_RANKS,
    check_features,
    make_lora_config,
    make_speculative_config,
    make_tokenizer_pool_config,
    make_vision_config,
)
from ipc.config import (
    CacheConfig,
    DecodingConfig,
    EngineConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
    TokenizerPoolConfig,
    VisionLanguageConfig,
)
from ipc.errors import ConfigError

LORA = {"enable_lora": True}
DRAFT = {"speculative_model": "draft", "num_speculative_tokens": 3}
NGRAM = {"speculative_model": "[ngram]", "num_speculative_tokens": 3}
IMAGES = {
    "image_input_type": "pixel_values",
    "image_token_id": 5,
    "image_input_shape": "1,3,336,336",
    "image_feature_size": 576,
}


def make_args(**options: Any) -> EngineArgs:
    """Arguments for some model."""
    return EngineArgs(model="m", **options)


def make_config(**parts: Any) -> EngineConfig:
    """A config of some model."""
    return EngineConfig(**({"model_config": ModelConfig(model="m")} | parts))


@pytest.mark.parametrize("rank", LORA_RANKS)
def test_the_wide_set_of_adapter_ranks_is_known(rank: int) -> None:
    config = make_lora_config(make_args(**LORA, max_lora_rank=rank))
    assert config is not None
    assert config.max_lora_rank == rank


def test_adapters_on_the_host_default_to_those_on_the_device() -> None:
    config = make_lora_config(make_args(**LORA, max_loras=3, long_lora_scaling_factors=[4.0]))
    assert config is not None
    assert (config.max_cpu_loras, config.long_lora_scaling_factors) == (3, (4.0,))
    assert make_lora_config(make_args()) is None


@pytest.mark.parametrize(
    ("options", "at_fault"),
    [
        ({"max_lora_rank": 24}, "--max-lora-rank"),
        ({"max_loras": 0}, "--max-loras"),
        ({"max_loras": 4, "max_cpu_loras": 3}, "--max-cpu-loras"),
        ({"lora_extra_vocab_size": 100}, "--lora-extra-vocab-size"),
        ({"long_lora_scaling_factors": ()}, "--long-lora-scaling-factors"),
        ({"long_lora_scaling_factors": (4.0, 0.0)}, "--long-lora-scaling-factors"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_adapter_limits_that_cannot_work_are_refused(
    options: dict[str, Any], at_fault: str, enabled: bool
) -> None:
    with pytest.raises(ConfigError, match=at_fault):
        make_lora_config(make_args(enable_lora=enabled, **options))


def test_drafting_needs_a_model_and_a_number() -> None:
    assert make_speculative_config(make_args()) is None
    config = make_speculative_config(make_args(**NGRAM, ngram_prompt_lookup_max=4))
    assert config is not None
    assert (config.ngram_prompt_lookup_min, config.ngram_prompt_lookup_max) == (1, 4)
    assert make_speculative_config(make_args(**DRAFT)) is not None


@pytest.mark.parametrize(
    ("options", "at_fault"),
    [
        ({"speculative_model": "draft"}, "--num-speculative-tokens"),
        ({"num_speculative_tokens": 3}, "--speculative-model"),
        (DRAFT | {"num_speculative_tokens": 0}, "--num-speculative-tokens"),
        (DRAFT | {"speculative_model": ""}, "--speculative-model"),
        (NGRAM, "--ngram-prompt-lookup-max"),
        (NGRAM | {"ngram_prompt_lookup_max": 0}, "--ngram-prompt-lookup-max"),
        (
            NGRAM | {"ngram_prompt_lookup_max": 2, "ngram_prompt_lookup_min": 3},
            "--ngram-prompt-lookup-min",
        ),
        ({"ngram_prompt_lookup_min": 3}, "--ngram-prompt-lookup-min"),
        ({"ngram_prompt_lookup_max": 3}, "--ngram-prompt-lookup-max"),
        (DRAFT | {"speculative_max_model_len": 0}, "--speculative-max-model-len"),
        (DRAFT | {"speculative_disable_by_batch_size": 1}, "--speculative-disable-by-batch-size"),
    ],
)
def test_drafting_that_cannot_work_is_refused(options: dict[str, Any], at_fault: str) -> None:
    with pytest.raises(ConfigError, match=at_fault):
        make_speculative_config(make_args(**options))


def test_images_need_all_of_their_arguments() -> None:
    assert make_vision_config(make_args()) is None
    config = make_vision_config(make_args(**IMAGES))
    assert config is not None
    assert config.image_input_shape == (1, 3, 336, 336)
    for name in IMAGES:
        with pytest.raises(ConfigError, match="--image"):
            make_vision_config(make_args(**{key: IMAGES[key] for key in IMAGES if key != name}))


@pytest.mark.parametrize(
    ("options", "at_fault"),
    [
        ({"image_input_shape": "1,x"}, "--image-input-shape"),
        ({"image_input_shape": "1,0"}, "--image-input-shape"),
        ({"image_token_id": -1}, "--image-token-id"),
        ({"image_feature_size": 0}, "--image-feature-size"),
    ],
)
def test_image_shapes_that_cannot_work_are_refused(options: dict[str, Any], at_fault: str) -> None:
    with pytest.raises(ConfigError, match=at_fault):
        make_vision_config(make_args(**(IMAGES | options)))


@pytest.mark.parametrize("size", [-1, 10**9])
def test_pool_sizes_that_cannot_work_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="--tokenizer-pool-size"):
        make_tokenizer_pool_config(make_args(tokenizer_pool_size=size))


def test_a_plain_config_has_nothing_to_refuse() -> None:
    check_features(make_config())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lora_config": LoRAConfig()}, "--enable-lora.*not available"),
        ({"speculative_config": SpeculativeConfig("m", 3)}, "--speculative-model.*not available"),
        ({"vision_language_config": VisionLanguageConfig()}, "--image-input-type.*not available"),
        (
            {"decoding_config": DecodingConfig("outlines")},
            "--guided-decoding-backend outlines.*not available",
        ),
        ({"decoding_config": DecodingConfig("x")}, "--guided-decoding-backend must be one of"),
        ({"cache_config": CacheConfig(cache_dtype="fp8")}, "--kv-cache-dtype fp8.*not available"),
        ({"cache_config": CacheConfig(cache_dtype="int4")}, "--kv-cache-dtype must be one of"),
        (
            {"model_config": ModelConfig("m", quantization="awq")},
            "--quantization: awq is not available.*unquantized.*on a CPU also.*int8",
        ),
        (
            {"model_config": ModelConfig("m", quantization="x")},
            "--quantization: unknown method 'x'; known are aqlm, awq",
        ),
        (
            {"model_config": ModelConfig("m", quantization_param_path="p")},
            "--quantization-param-path",
        ),
        (
            {"tokenizer_pool_config": TokenizerPoolConfig(1, "smoke")},
            "--tokenizer-pool-type must be one of",
        ),
    ],
)
def test_what_this_version_lacks_is_refused_by_name(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_features(make_config(**parts))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be between"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2.*not available"),
        ({"pipeline_parallel_size": -1}, "--pipeline-parallel-size must be between"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2.*not available"),
        ({"distributed_executor_backend": "x"}, "--distributed-executor-backend must be"),
        ({"distributed_executor_backend": "ray"}, "backend ray: .*not available"),
        ({"worker_use_ray": True}, "--worker-use-ray: .*not available"),
        (
            {"worker_use_ray": True, "distributed_executor_backend": "mp"},
            "--worker-use-ray contradicts --distributed-executor-backend mp",
        ),
        ({"ray_workers_use_nsight": True}, "--ray-workers-use-nsight needs"),
        ({"max_parallel_loading_workers": 0}, "--max-parallel-loading-workers must be"),
        ({"worker_threads": 10**6}, "--worker-threads must be"),
        ({"iteration_timeout_s": -1.0}, "--engine-iteration-timeout must be"),
        ({"iteration_timeout_s": float("nan")}, "--engine-iteration-timeout must be"),
        ({"executor_class": "a.b"}, "--executor-class must be of the form"),
    ],
)
def test_parallelism_is_checked_then_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_features(make_config(parallel_config=ParallelConfig(**options)))


@pytest.mark.parametrize(
    "options",
    [
        {"distributed_executor_backend": "mp"},
        {"distributed_executor_backend": "uniproc"},
        {"max_parallel_loading_workers": 1},
        {"disable_custom_all_reduce": True},
        {"executor_class": "tests.engine_core.scripted_executor:ScriptedExecutor"},
        {"worker_threads": 2},
        {"iteration_timeout_s": 0.0},
    ],
)
def test_what_one_worker_can_do_is_accepted(options: dict[str, Any]) -> None:
    check_features(make_config(parallel_config=ParallelConfig(**options)))
