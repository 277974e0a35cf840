"""Checks on the features an engine can be asked for: first whether the arguments make sense,
then whether this version has the feature. A feature that is not there is refused by name, never
ignored.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from frontend.engine_flags import as_json_object
from ipc.config import (
    INT8,
    CacheConfig,
    DecodingConfig,
    EngineConfig,
    LoRAConfig,
    ParallelConfig,
    SpeculativeConfig,
    TokenizerPoolConfig,
    VisionLanguageConfig,
)
from ipc.errors import ConfigError

if TYPE_CHECKING:
    from frontend.engine_args import EngineArgs

QUANTIZATION_METHODS = (
    "aqlm",
    "awq",
    "deepspeedfp",
    "fp8",
    "gptq",
    "gptq_marlin",
    "gptq_marlin_24",
    INT8,
    "marlin",
    "sparseml",
    "squeezellm",
)
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e5m2", "fp8_e4m3")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORA_EXTRA_VOCAB_SIZES = (0, 256, 512)
GUIDED_BACKENDS = ("auto", "outlines", "lm-format-enforcer", "xgrammar", "llguidance")
NGRAM = "[ngram]"
_MAX_WORKERS = 4096
_MAX_TIMEOUT_S = 1e6
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def make_lora_config(args: EngineArgs) -> LoRAConfig | None:
    """The adapters' config; None when LoRA is off, whose other flags are checked all the same."""
    _one_of("--max-lora-rank", args.max_lora_rank, LORA_RANKS)
    _one_of("--lora-extra-vocab-size", args.lora_extra_vocab_size, LORA_EXTRA_VOCAB_SIZES)
    _at_least("--max-loras", args.max_loras, 1)
    if args.max_cpu_loras is not None and args.max_cpu_loras < args.max_loras:
        raise ConfigError(
            f"--max-cpu-loras ({args.max_cpu_loras}) must be at least "
            f"--max-loras ({args.max_loras})"
        )
    factors = args.long_lora_scaling_factors
    if factors is not None and (not factors or any(factor <= 0 for factor in factors)):
        raise ConfigError(f"--long-lora-scaling-factors must be positive, got {factors}")
    if not args.enable_lora:
        return None
    return LoRAConfig(
        max_lora_rank=args.max_lora_rank,
        max_loras=args.max_loras,
        fully_sharded_loras=args.fully_sharded_loras,
        max_cpu_loras=args.max_cpu_loras or args.max_loras,
        lora_dtype=args.lora_dtype,
        lora_extra_vocab_size=args.lora_extra_vocab_size,
        long_lora_scaling_factors=None if factors is None else tuple(factors),
    )


def make_speculative_config(args: EngineArgs) -> SpeculativeConfig | None:
    """The config of drafting; None without ``--speculative-model``."""
    if args.num_speculative_tokens is not None:
        _at_least("--num-speculative-tokens", args.num_speculative_tokens, 1)
    if args.speculative_disable_by_batch_size is not None:
        _at_least("--speculative-disable-by-batch-size", args.speculative_disable_by_batch_size, 2)
    if args.speculative_max_model_len is not None:
        _at_least("--speculative-max-model-len", args.speculative_max_model_len, 1)
    lookup_min = _checked_lookup(args.ngram_prompt_lookup_min, args.ngram_prompt_lookup_max)
    if args.speculative_model is None:
        for flag, value in (
            ("--num-speculative-tokens", args.num_speculative_tokens),
            ("--ngram-prompt-lookup-max", args.ngram_prompt_lookup_max),
        ):
            if value is not None:
                raise ConfigError(f"{flag} needs --speculative-model")
        return None
    if not args.speculative_model:
        raise ConfigError("--speculative-model must not be empty")
    if args.num_speculative_tokens is None:
        raise ConfigError("--speculative-model needs --num-speculative-tokens")
    if args.speculative_model == NGRAM and args.ngram_prompt_lookup_max is None:
        raise ConfigError(f"--speculative-model {NGRAM} needs --ngram-prompt-lookup-max")
    return SpeculativeConfig(
        speculative_model=args.speculative_model,
        num_speculative_tokens=args.num_speculative_tokens,
        speculative_max_model_len=args.speculative_max_model_len,
        speculative_disable_by_batch_size=args.speculative_disable_by_batch_size,
        ngram_prompt_lookup_max=args.ngram_prompt_lookup_max,
        ngram_prompt_lookup_min=lookup_min,
    )


def make_vision_config(args: EngineArgs) -> VisionLanguageConfig | None:
    """The config of image input; None without ``--image-input-type``."""
    parts = {
        "--image-token-id": args.image_token_id,
        "--image-input-shape": args.image_input_shape,
        "--image-feature-size": args.image_feature_size,
    }
    if args.image_input_type is None:
        for flag, value in parts.items():
            if value is not None:
                raise ConfigError(f"{flag} needs --image-input-type")
        return None
    missing = [flag for flag, value in parts.items() if value is None]
    if missing:
        raise ConfigError(f"--image-input-type needs {' and '.join(missing)}")
    assert args.image_token_id is not None
    assert args.image_input_shape is not None
    assert args.image_feature_size is not None
    _at_least("--image-token-id", args.image_token_id, 0)
    _at_least("--image-feature-size", args.image_feature_size, 1)
    return VisionLanguageConfig(
        image_input_type=args.image_input_type,
        image_token_id=args.image_token_id,
        image_input_shape=_image_shape(args.image_input_shape),
        image_feature_size=args.image_feature_size,
    )


def make_tokenizer_pool_config(args: EngineArgs) -> TokenizerPoolConfig | None:
    """The config of the tokenizer pool; None when there is none (size 0)."""
    if not 0 <= args.tokenizer_pool_size <= _MAX_WORKERS:
        raise ConfigError(
            f"--tokenizer-pool-size must be between 0 and {_MAX_WORKERS}, "
            f"got {args.tokenizer_pool_size}"
        )
    extra_config = as_json_object("--tokenizer-pool-extra-config", args.tokenizer_pool_extra_config)
    if args.tokenizer_pool_size == 0:
        return None
    return TokenizerPoolConfig(
        pool_size=args.tokenizer_pool_size,
        pool_type=args.tokenizer_pool_type,
        extra_config=extra_config or {},
    )


def check_features(config: EngineConfig) -> None:
    """Check what can be checked without reading a file.

    Raises:
        ConfigError: a value cannot work, or asks for what this version does not have.
    """
    _check_parallel(config.parallel_config)
    _check_cache(config.cache_config)
    _check_quantization(config)
    _check_decoding(config.decoding_config)
    if config.tokenizer_pool_config is not None:
        _one_of(
            "--tokenizer-pool-type",
            config.tokenizer_pool_config.pool_type,
            ("ray", "process", "thread"),
        )
    if config.lora_config is not None:
        raise ConfigError("--enable-lora: LoRA adapters are not available in this version")
    if config.speculative_config is not None:
        raise ConfigError(
            "--speculative-model: speculative decoding is not available in this version"
        )
    if config.vision_language_config is not None:
        raise ConfigError("--image-input-type: image input is not available in this version")


def check_quantization_method(method: str, where: str) -> None:
    """Refuse a quantized checkpoint or flag, by the name of the method."""
    if method not in QUANTIZATION_METHODS:
        raise ConfigError(
            f"{where}: unknown method {method!r}; known are {', '.join(QUANTIZATION_METHODS)}"
        )
    raise ConfigError(
        f"{where}: {method} is not available in this version, which runs unquantized "
        f"checkpoints only (float32, float16, bfloat16), on a CPU also with --quantization {INT8}"
    )


def check_quantization_device(method: str | None, device: str) -> None:
    """Refuse a method that the device, once chosen, does not run."""
    if method == INT8 and device != "cpu":
        raise ConfigError(
            f"--quantization {INT8} runs on the CPU only, and this engine is to use {device}: "
            f"leave it out, or pass --device cpu"
        )


def _check_parallel(config: ParallelConfig) -> None:
    for flag, size in (
        ("--tensor-parallel-size", config.tensor_parallel_size),
        ("--pipeline-parallel-size", config.pipeline_parallel_size),
    ):
        if not 1 <= size <= _MAX_WORKERS:
            raise ConfigError(f"{flag} must be between 1 and {_MAX_WORKERS}, got {size}")
    backend = config.distributed_executor_backend
    if backend not in (None, "uniproc", "mp", "ray"):
        raise ConfigError(
            f"--distributed-executor-backend must be mp, ray or uniproc, got {backend!r}"
        )
    if config.worker_use_ray and backend not in (None, "ray"):
        raise ConfigError(f"--worker-use-ray contradicts --distributed-executor-backend {backend}")
    uses_ray = config.worker_use_ray or backend == "ray"
    if config.ray_workers_use_nsight and not uses_ray:
        raise ConfigError("--ray-workers-use-nsight needs --distributed-executor-backend ray")
    if config.max_parallel_loading_workers is not None:
        _at_least("--max-parallel-loading-workers", config.max_parallel_loading_workers, 1)
    _check_worker(config)
    if uses_ray:
        flag = "--worker-use-ray" if config.worker_use_ray else "--distributed-executor-backend ray"
        raise ConfigError(f"{flag}: the Ray executor is not available in this version; use mp")
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"--tensor-parallel-size {config.tensor_parallel_size}: more than one device per "
            f"engine is not available in this version"
        )
    if config.pipeline_parallel_size > 1:
        raise ConfigError(
            f"--pipeline-parallel-size {config.pipeline_parallel_size}: pipeline stages are not "
            f"available in this version"
        )


def _check_worker(config: ParallelConfig) -> None:
    if not 0 <= config.iteration_timeout_s <= _MAX_TIMEOUT_S:
        raise ConfigError(
            f"--engine-iteration-timeout must be between 0 and {_MAX_TIMEOUT_S:g} s, "
            f"got {config.iteration_timeout_s:g}"
        )
    for name in ("loading_hang_s", "compiling_hang_s", "stepping_hang_s"):
        if not 0 <= (value := getattr(config, name)) <= _MAX_TIMEOUT_S:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be between 0 and {_MAX_TIMEOUT_S:g} s, got {value:g}")
    if not 1 <= config.flight_recorder_mb <= 4096:
        raise ConfigError(
            f"--flight-recorder-mb must be between 1 and 4096, got {config.flight_recorder_mb}"
        )
    if config.worker_threads is not None and not 1 <= config.worker_threads <= _MAX_WORKERS:
        raise ConfigError(
            f"--worker-threads must be between 1 and {_MAX_WORKERS}, got {config.worker_threads}"
        )
    if config.executor_class is None:
        return
    if not _CLASS_PATH.fullmatch(config.executor_class):
        raise ConfigError(
            f"--executor-class must be of the form package.module:Class, "
            f"got {config.executor_class!r}"
        )
    package = config.executor_class.split(":")[0].split(".")[0]
    if find_spec(package) is None:
        raise ConfigError(f"--executor-class: there is no module {package!r}")


def _check_cache(config: CacheConfig) -> None:
    _one_of("--kv-cache-dtype", config.cache_dtype, KV_CACHE_DTYPES)
    if config.cache_dtype != "auto":
        raise ConfigError(
            f"--kv-cache-dtype {config.cache_dtype}: a quantized KV cache is not available in "
            f"this version; use auto"
        )


def _check_quantization(config: EngineConfig) -> None:
    method = config.model_config.quantization
    if method not in (None, INT8):
        check_quantization_method(method, "--quantization")
    if config.model_config.quantization_param_path is not None:
        raise ConfigError(
            "--quantization-param-path holds scales for --kv-cache-dtype fp8, which is not "
            "available in this version"
        )


def _check_decoding(config: DecodingConfig) -> None:
    backend = config.guided_decoding_backend
    _one_of("--guided-decoding-backend", backend, GUIDED_BACKENDS)
    if backend != "auto":
        raise ConfigError(
            f"--guided-decoding-backend {backend}: guided decoding is not available in this version"
        )


def _checked_lookup(lookup_min: int | None, lookup_max: int | None) -> int | None:
    if lookup_max is None:
        if lookup_min is not None:
            raise ConfigError("--ngram-prompt-lookup-min needs --ngram-prompt-lookup-max")
        return None
    _at_least("--ngram-prompt-lookup-max", lookup_max, 1)
    lookup_min = 1 if lookup_min is None else lookup_min
    if not 1 <= lookup_min <= lookup_max:
        raise ConfigError(
            f"--ngram-prompt-lookup-min must be between 1 and --ngram-prompt-lookup-max "
            f"({lookup_max}), got {lookup_min}"
        )
    return lookup_min


def _image_shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError as err:
        raise ConfigError(
            f"--image-input-shape must be whole numbers with commas, got {text!r}"
        ) from err
    if any(size < 1 for size in shape):
        raise ConfigError(f"--image-input-shape must be positive, got {text!r}")
    return shape


def _one_of(flag: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _at_least(flag: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{flag} must be at least {low}, got {value}")
