"""Configuration: one frozen dataclass per concern, the sub-configs that users know by name.

Plain values only, so that msgspec carries the sum (``EngineConfig``) to other processes. What the
engine *discovers* at start-up (the number of KV blocks, say) is a message, never a config field.
Nothing here reads a file: ``frontend/engine_args.py`` fills these in and cross-checks them.
A constructor elsewhere takes its own sub-config, never the sum.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ipc.errors import ConfigError

BLOCK_SIZES = (8, 16, 32)
DTYPES = ("float32", "float16", "bfloat16")
INT8 = "int8"  # the one --quantization that is available: made while loading, on a CPU
LOAD_FORMATS = ("auto", "safetensors", "pt", "npcache", "dummy")


@dataclass(frozen=True)
class ModelConfig:
    """The model, its tokenizer, and what requests to it may ask."""

    model: str  # as the user named it
    tokenizer: str | None = None  # None: the model's
    tokenizer_mode: str = "auto"  # "auto", "slow"
    trust_remote_code: bool = False
    dtype: str = "auto"  # after resolution one of DTYPES
    seed: int = 0
    revision: str | None = None
    code_revision: str | None = None
    rope_scaling: dict[str, Any] | None = None
    tokenizer_revision: str | None = None
    max_model_len: int | None = None  # after resolution never None
    quantization: str | None = None
    quantization_param_path: str | None = None
    enforce_eager: bool = False
    max_context_len_to_capture: int | None = None
    max_seq_len_to_capture: int = 8192
    max_logprobs: int = 5
    disable_sliding_window: bool = False
    skip_tokenizer_init: bool = False
    served_model_name: str | list[str] | None = None
    deterministic: bool | None = None  # None: resolved (on for float32 on the CPU)
    # -- filled in by resolution --
    model_path: str = ""  # the directory that holds the checkpoint
    tokenizer_path: str = ""
    code_path: str = ""  # the directory of the model's own code, when it is not model_path
    hf_config: dict[str, Any] = field(default_factory=dict)  # config.json, rope_scaling merged in
    generation_config: dict[str, Any] = field(default_factory=dict)  # {} when there is none

    @property
    def served_names(self) -> list[str]:
        """Every name the model answers to; the first one labels answers and metrics."""
        if not self.served_model_name:
            return [self.model]
        if isinstance(self.served_model_name, str):
            return [self.served_model_name]
        return list(self.served_model_name)

    @property
    def resolved_max_model_len(self) -> int:
        """``max_model_len`` after resolution."""
        assert self.max_model_len is not None, "the model config was not resolved"
        return self.max_model_len

    @property
    def eos_token_ids(self) -> list[int]:
        """End-of-text ids: the generation config's, else the model config's."""
        eos = self.generation_config.get("eos_token_id")
        if eos is None:
            text_config = self.hf_config.get("text_config")
            eos = self.hf_config.get("eos_token_id")
            if eos is None and isinstance(text_config, dict):
                eos = text_config.get("eos_token_id")
        if eos is None:
            return []
        return [int(i) for i in eos] if isinstance(eos, list) else [int(eos)]


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache: its unit, its share of memory, and whether prefixes are reused."""

    block_size: int = 16
    gpu_memory_utilization: float = 0.90
    swap_space: float = 4.0  # GiB of host memory per worker
    cache_dtype: str = "auto"
    num_gpu_blocks_override: int | None = None
    sliding_window: int | None = None
    enable_prefix_caching: bool = True
    cpu_kv_cache_space: float | None = None  # GiB, CPU device only; None: min(4, a quarter of RAM)

    def __post_init__(self) -> None:
        """Reject what could only fail later."""
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"--block-size must be one of {BLOCK_SIZES}, got {self.block_size}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.swap_space < 0:
            raise ConfigError(f"--swap-space must not be negative, got {self.swap_space}")
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 2:
            raise ConfigError(
                f"--num-gpu-blocks-override must be at least 2 (one is the null block), "
                f"got {self.num_gpu_blocks_override}"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How many workers there are, and what carries the plans to them."""

    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    worker_use_ray: bool = False
    max_parallel_loading_workers: int | None = None
    disable_custom_all_reduce: bool = False
    ray_workers_use_nsight: bool = False
    distributed_executor_backend: str | None = None  # None, "uniproc", "mp", "ray"
    executor_class: str | None = None  # "package.module:Class": takes the place of the backend
    worker_threads: int | None = None  # CPU device: torch threads per worker; None: all cores
    iteration_timeout_s: float = 60.0  # without a result for so long workers are stuck; 0: never
    enable_recovery: bool = True  # start another core when one is lost
    flight_record_dir: str | None = None  # where recordings of lost cores are kept; None: none is
    flight_recorder_mb: int = 64  # of one core's recording, which ends when it is full
    loading_hang_s: float = 600.0  # a core without progress for so long is ended; 0: never
    compiling_hang_s: float = 600.0
    stepping_hang_s: float = 30.0

    @property
    def world_size(self) -> int:
        """Workers of one replica."""
        return self.pipeline_parallel_size * self.tensor_parallel_size


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits on one scheduler step, and the order of waiting requests."""

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int = 2048
    use_v2_block_manager: bool = True
    num_lookahead_slots: int = 0
    delay_factor: float = 0.0
    enable_chunked_prefill: bool = True
    policy: str = "fcfs"  # "fcfs", "priority"
    preemption_mode: str | None = None  # None: recompute, swap for several branches; or by name
    max_steps_in_flight: int | None = None  # None: 2, or 3 while steps are very short
    max_waiting_requests: int | None = None  # None: 4 * max_num_seqs beyond the running ones
    max_waiting_tokens: int | None = None  # None: 1024 for each request that may wait; 0: no limit
    max_prefill_slowdown: float = 0.0  # of a step with streams, by prompts; 0: no limit
    plans_late: bool = False  # a step just before the running one ends; needs a loop that wakes up

    def __post_init__(self) -> None:
        """Reject what could only fail later, and name the flag to change."""
        if self.max_num_seqs < 1:
            raise ConfigError(f"--max-num-seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_model_len and not self.enable_chunked_prefill:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) is below "
                f"--max-model-len ({self.max_model_len}): without --enable-chunked-prefill the "
                f"longest prompt would never fit in one step"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) is below "
                f"--max-num-seqs ({self.max_num_seqs}): a decode step could not serve everyone"
            )
        if self.num_lookahead_slots < 0:
            raise ConfigError(
                f"--num-lookahead-slots must not be negative, got {self.num_lookahead_slots}"
            )
        if self.delay_factor < 0:
            raise ConfigError(
                f"--scheduler-delay-factor must not be negative, got {self.delay_factor}"
            )
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"--scheduling-policy must be fcfs or priority, got {self.policy!r}")
        if self.preemption_mode not in (None, "recompute", "swap"):
            raise ConfigError(
                f"--preemption-mode must be recompute or swap, got {self.preemption_mode!r}"
            )
        if self.max_steps_in_flight is not None and not 1 <= self.max_steps_in_flight <= 8:
            raise ConfigError(
                f"--max-steps-in-flight must be between 1 and 8, got {self.max_steps_in_flight}"
            )
        if self.max_prefill_slowdown and not 1 < self.max_prefill_slowdown < math.inf:
            raise ConfigError(
                f"--max-prefill-slowdown must be above 1, or 0 for no limit, "
                f"got {self.max_prefill_slowdown:g}"
            )


@dataclass(frozen=True)
class DeviceConfig:
    """What the workers compute on."""

    device: str = "auto"  # after resolution "cuda" or "cpu"


@dataclass(frozen=True)
class LoadConfig:
    """Where weights come from and in which form."""

    load_format: str = "auto"
    download_dir: str | None = None
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse forms that do not exist here."""
        if self.load_format == "tensorizer":
            raise ConfigError("--load-format tensorizer is not supported; use safetensors")
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"--load-format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}"
            )


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters: how many, how large."""

    max_lora_rank: int = 16
    max_loras: int = 1
    fully_sharded_loras: bool = False
    max_cpu_loras: int | None = None
    lora_dtype: str | None = "auto"
    lora_extra_vocab_size: int = 256
    long_lora_scaling_factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class VisionLanguageConfig:
    """Images in prompts."""

    image_input_type: str = "pixel_values"
    image_token_id: int = 0
    image_input_shape: tuple[int, ...] = ()
    image_feature_size: int = 0


@dataclass(frozen=True)
class SpeculativeConfig:
    """Drafting tokens ahead."""

    speculative_model: str | None = None
    num_speculative_tokens: int | None = None
    speculative_max_model_len: int | None = None
    speculative_disable_by_batch_size: int | None = None
    ngram_prompt_lookup_max: int | None = None
    ngram_prompt_lookup_min: int | None = None


@dataclass(frozen=True)
class DecodingConfig:
    """Constraints on output text."""

    guided_decoding_backend: str = "auto"


@dataclass(frozen=True)
class TokenizerPoolConfig:
    """Helpers that tokenise beside the event loop."""

    pool_size: int = 0  # 0: in line
    pool_type: str = "ray"  # "ray", "process", "thread"
    extra_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DebugConfig:
    """What developers break on purpose: nothing, outside their tests."""

    failpoints: tuple[str, ...] = ()  # see ipc/failpoints.py


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The sum: what one engine runs with, all values resolved and cross-checked."""

    model_config: ModelConfig
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    device_config: DeviceConfig = field(default_factory=DeviceConfig)
    load_config: LoadConfig = field(default_factory=LoadConfig)
    lora_config: LoRAConfig | None = None
    vision_language_config: VisionLanguageConfig | None = None
    speculative_config: SpeculativeConfig | None = None
    decoding_config: DecodingConfig = field(default_factory=DecodingConfig)
    tokenizer_pool_config: TokenizerPoolConfig | None = None
    debug_config: DebugConfig = field(default_factory=DebugConfig)


def encode_config(config: EngineConfig) -> bytes:
    """The config as msgpack, for another process."""
    return msgspec.msgpack.encode(config)


def decode_config(data: bytes) -> EngineConfig:
    """Inverse of ``encode_config``; checks run again."""
    return msgspec.msgpack.decode(data, type=EngineConfig)
