"""From what was asked to what will run: reads the checkpoint's files and replaces every "auto".

The functions take a config and return a new one; resolving twice changes nothing. What is found
is fixed here, in one place, so that every process works with the same values.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from frontend.context_length import check_rope_scaling, choose_max_model_len, text_config
from frontend.devices import choose_device
from frontend.feature_checks import (
    check_features,
    check_quantization_device,
    check_quantization_method,
)
from frontend.hf_config_checks import check_eos_token_id, check_hf_config
from frontend.model_files import check_custom_code, check_weights, find_directory
from frontend.tokenizer_config import read_json, read_tokenizer_config
from ipc.config import (
    DTYPES,
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    SchedulerConfig,
)
from ipc.errors import ConfigError

logger = logging.getLogger(__name__)

_GIB = 2**30
_DTYPE_NAMES = {"half": "float16", "float": "float32"} | {name: name for name in DTYPES}
_DEFAULT_SWAP_SPACE = CacheConfig().swap_space
_SWAP_REFUSED, _SWAP_LARGE = 0.7, 0.4  # shares of host memory
_MAX_SEQS = 2**16
_MAX_BATCHED_TOKENS = 2**24
_MAX_BLOCKS = 2**31 - 1  # block ids are 32-bit integers
_LARGEST_MSGPACK_INT = 2**64


def resolve_engine_config(config: EngineConfig, *, is_here: bool = True) -> EngineConfig:
    """Check and complete a config, however it was made. Reads files, starts nothing.

    Args:
        is_here: whether the engine is to run on this machine; else its device is not looked for.

    Raises:
        ConfigError: a value cannot work; the message names the flag.
    """
    check_features(config)
    device_config = resolve_device(config.device_config, is_here=is_here)
    check_quantization_device(config.model_config.quantization, device_config.device)
    model_config = resolve_model_config(config.model_config, config.load_config, device_config)
    return replace(
        config,
        device_config=device_config,
        model_config=model_config,
        cache_config=_resolve_cache(config.cache_config, model_config, device_config),
        scheduler_config=_resolve_scheduler(config.scheduler_config, model_config),
    )


def resolve_device(config: DeviceConfig, *, is_here: bool = True) -> DeviceConfig:
    """Choose the device; one elsewhere is what it is said to be."""
    device = choose_device(config.device, None if is_here else lambda: None)
    if config.device == "auto":
        logger.info("--device auto: using %s", device)
    return replace(config, device=device)


def resolve_model_config(
    config: ModelConfig, load_config: LoadConfig, device_config: DeviceConfig
) -> ModelConfig:
    """Find the checkpoint, read its settings, and settle dtype and length.

    Raises:
        ConfigError: as ``resolve_engine_config``.
    """
    if config.hf_config and config.dtype in DTYPES and config.max_model_len is not None:
        return config  # resolved before, perhaps on another machine
    _check_model_numbers(config)
    model_path = find_directory(
        config.model,
        revision=config.revision,
        download_dir=load_config.download_dir,
        load_format=load_config.load_format,
    )
    tokenizer_path = _find_tokenizer(config, model_path, load_config)
    hf_config = read_hf_config(model_path)
    for directory in {model_path, tokenizer_path}:
        check_custom_code(directory, trust_remote_code=config.trust_remote_code)
    check_weights(model_path, load_config.load_format)
    _check_quantized_checkpoint(hf_config, model_path)
    if config.rope_scaling is not None:
        check_rope_scaling(config.rope_scaling, "--rope-scaling")
        hf_config["rope_scaling"] = config.rope_scaling
    tokenizer_limit = (
        None
        if config.skip_tokenizer_init
        else read_tokenizer_config(tokenizer_path).model_max_length
    )
    dtype = _resolve_dtype(config.dtype, hf_config, device_config.device)
    return replace(
        config,
        model_path=str(model_path),
        tokenizer_path=str(tokenizer_path),
        code_path=_find_code(config, hf_config, load_config),
        hf_config=hf_config,
        generation_config=read_generation_config(model_path),
        dtype=dtype,
        max_model_len=choose_max_model_len(
            config.max_model_len,
            hf_config,
            tokenizer_limit=tokenizer_limit,
            is_window_limit=config.disable_sliding_window,
        ),
        deterministic=_resolve_deterministic(config, dtype, device_config.device),
    )


def read_hf_config(model_path: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    hf_config = read_json(model_path / "config.json")
    if not hf_config:
        raise ConfigError(f"--model: {model_path} has no config.json, so it is no model")
    try:
        encodable: dict[str, Any] = _encodable(hf_config)
    except (RecursionError, OverflowError) as err:
        raise ConfigError(f"--model: {model_path / 'config.json'} cannot be used: {err}") from err
    check_hf_config(encodable, "config.json")
    return encodable


def read_generation_config(model_path: Path) -> dict[str, Any]:
    """The checkpoint's ``generation_config.json``; {} when there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    path = model_path / "generation_config.json"
    try:
        encodable: dict[str, Any] = _encodable(read_json(path))
    except (RecursionError, OverflowError) as err:
        raise ConfigError(f"--model: {path} cannot be used: {err}") from err
    check_eos_token_id(encodable, "generation_config.json")
    return encodable


def common_sliding_window(hf_config: dict[str, Any]) -> int | None:
    """The sliding window, when every layer has it; None when some layer sees everything."""
    config = text_config(hf_config)
    model_type = str(config.get("model_type", ""))
    window = config.get("sliding_window", 4096 if model_type == "mistral" else None)
    uses_window = config.get("use_sliding_window", not model_type.startswith("qwen"))
    if not isinstance(window, int) or not uses_window or model_type in ("llama", "opt", "gpt2"):
        return None
    layer_types = config.get("layer_types")
    if layer_types:
        return window if set(layer_types) == {"sliding_attention"} else None
    is_mixed = (
        model_type.startswith(("gemma2", "gemma3"))
        or config.get("sliding_window_pattern", 1) != 1
        or (config.get("max_window_layers") or 0) > 0
    )
    return None if is_mixed else window


def _find_tokenizer(config: ModelConfig, model_path: Path, load_config: LoadConfig) -> Path:
    is_own = config.tokenizer is not None and config.tokenizer != config.model
    if config.skip_tokenizer_init or not (is_own or config.tokenizer_revision):
        return model_path
    return find_directory(
        config.tokenizer or config.model,
        flag="--tokenizer",
        revision=config.tokenizer_revision,
        download_dir=load_config.download_dir,
    )


def _find_code(config: ModelConfig, hf_config: dict[str, Any], load_config: LoadConfig) -> str:
    """The directory of a checkpoint's own code at ``--code-revision``; "" for the model's."""
    if config.code_revision is None or not hf_config.get("auto_map"):
        return ""
    if Path(config.model).expanduser().is_dir():
        logger.warning("--code-revision has no effect: %s is a directory", config.model)
        return ""
    directory = find_directory(
        config.model, revision=config.code_revision, download_dir=load_config.download_dir
    )
    return str(directory)


def _check_model_numbers(config: ModelConfig) -> None:
    if config.max_logprobs < -1:
        raise ConfigError(f"--max-logprobs must be at least -1, got {config.max_logprobs}")
    if config.max_seq_len_to_capture < 1:
        raise ConfigError(
            f"--max-seq-len-to-capture must be at least 1, got {config.max_seq_len_to_capture}"
        )
    names = config.served_model_name
    if names is not None and (not names or not all([names] if isinstance(names, str) else names)):
        raise ConfigError("--served-model-name must not be empty")
    if config.tokenizer_mode not in ("auto", "slow"):
        raise ConfigError(f"--tokenizer-mode must be auto or slow, got {config.tokenizer_mode!r}")


def _check_quantized_checkpoint(hf_config: dict[str, Any], model_path: Path) -> None:
    """A flag was checked before; this is what the checkpoint says of itself."""
    settings = hf_config.get("quantization_config") or hf_config.get("compression_config")
    if isinstance(settings, dict):
        method = str(settings.get("quant_method", "of unknown kind")).lower()
        check_quantization_method(method, f"--model {model_path} is quantized (--quantization)")


def _resolve_dtype(wanted: str, hf_config: dict[str, Any], device: str) -> str:
    if wanted != "auto":
        if wanted not in _DTYPE_NAMES:
            raise ConfigError(
                f"--dtype must be one of auto, {', '.join(_DTYPE_NAMES)}, got {wanted!r}"
            )
        return _DTYPE_NAMES[wanted]
    config = text_config(hf_config)
    declared = config.get("dtype") or config.get("torch_dtype") or "float32"
    stored = str(declared).removeprefix("torch.")
    # Half precision on a GPU is kept; everything else is bfloat16, which has float32's range.
    is_kept = stored == ("float32" if device == "cpu" else "float16")
    dtype = stored if is_kept else "bfloat16"
    logger.info("--dtype auto: using %s on %s (the checkpoint is %s)", dtype, device, stored)
    return dtype


def _resolve_deterministic(config: ModelConfig, dtype: str, device: str) -> bool:
    if config.deterministic is None:
        return dtype == "float32" and device == "cpu"
    return config.deterministic


def _resolve_cache(
    config: CacheConfig, model_config: ModelConfig, device_config: DeviceConfig
) -> CacheConfig:
    override = config.num_gpu_blocks_override
    if override is not None and override > _MAX_BLOCKS:
        raise ConfigError(
            f"--num-gpu-blocks-override must be at most {_MAX_BLOCKS}, got {override}"
        )
    memory_bytes = psutil.virtual_memory().total
    space = config.cpu_kv_cache_space
    if space is not None and not 0 < space * _GIB <= memory_bytes:
        raise ConfigError(
            f"--cpu-kv-cache-space must be above 0 and at most this machine's memory "
            f"({memory_bytes / _GIB:.1f} GiB), got {space}"
        )
    window = config.sliding_window
    if model_config.disable_sliding_window:
        window = None
    elif window is None:
        window = common_sliding_window(model_config.hf_config)
    return replace(
        config,
        swap_space=_resolve_swap_space(config.swap_space, memory_bytes),
        sliding_window=window,
    )


def _resolve_swap_space(swap_space: float, memory_bytes: int) -> float:
    """Check the host memory for swapping; the default shrinks to fit a small machine."""
    share = swap_space * _GIB / memory_bytes
    if share > _SWAP_LARGE and swap_space == _DEFAULT_SWAP_SPACE:
        swap_space = round(_SWAP_LARGE / 2 * memory_bytes / _GIB, 3)
        logger.warning("--swap-space is %.3f GiB, as this machine has little memory", swap_space)
    elif share > _SWAP_REFUSED:
        raise ConfigError(
            f"--swap-space {swap_space} GiB is more than {_SWAP_REFUSED:.0%} of this machine's "
            f"memory ({memory_bytes / _GIB:.1f} GiB)"
        )
    elif share > _SWAP_LARGE:
        logger.warning(
            "--swap-space %s GiB is a large part of this machine's memory (%.1f GiB)",
            swap_space,
            memory_bytes / _GIB,
        )
    return swap_space


def _resolve_scheduler(config: SchedulerConfig, model_config: ModelConfig) -> SchedulerConfig:
    for flag, value, limit in (
        ("--max-num-seqs", config.max_num_seqs, _MAX_SEQS),
        ("--max-num-batched-tokens", config.max_num_batched_tokens, _MAX_BATCHED_TOKENS),
    ):
        if value > limit:
            raise ConfigError(f"{flag} must be at most {limit}, got {value}")
    for name, count in (
        ("--max-waiting-requests", config.max_waiting_requests),
        ("--max-waiting-tokens", config.max_waiting_tokens),
    ):
        if count is not None and count < 0:
            raise ConfigError(f"{name} must not be negative, got {count}")
    return replace(config, max_model_len=model_config.resolved_max_model_len)


def _encodable(value: Any) -> Any:
    """JSON as msgpack can carry it: whole numbers beyond 64 bits become floats."""
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, int) and not -_LARGEST_MSGPACK_INT / 2 <= value < _LARGEST_MSGPACK_INT:
        return float(value)
    return value
