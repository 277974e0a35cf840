"""EngineArgs: everything an engine can be told, as a dataclass and as a command line.

Field names, order and defaults up to ``ngram_prompt_lookup_min`` are those of mid-2024 vLLM; ours
follow. ``create_engine_config`` checks and resolves everything before any process is started.

``python -m frontend.engine_args --encode FLAGS`` writes the resulting config to stdout as msgpack
and ends with exit code 2 and the reason on stderr when it cannot.
"""

import argparse
import logging
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from frontend.config_resolution import resolve_device, resolve_engine_config, resolve_model_config
from frontend.engine_flags import (
    UNSET_FALSE,
    JsonObject,
    Names,
    add_flags,
    as_json_object,
    check_fields,
    flag,
    is_unset,
)
from frontend.feature_checks import (
    check_features,
    make_lora_config,
    make_speculative_config,
    make_tokenizer_pool_config,
    make_vision_config,
)
from frontend.usage_context import UsageContext
from ipc.config import (
    CacheConfig,
    DecodingConfig,
    DeviceConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    encode_config,
)
from ipc.errors import ConfigError
from ipc.failpoints import make_debug_config

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "facebook/opt-125m"
_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_SECRET_WORDS = {"key", "token", "secret", "password", "credential", "credentials"}


@dataclass
class EngineArgs:
    """The arguments of one engine. Everything but the model may stay as it is."""

    model: str = flag(DEFAULT_MODEL, help="name on the Hugging Face hub, or a local directory")
    served_model_name: Names | None = flag(  # noqa: RUF009 - a field, not a value
        None, help="names the model answers to; the first labels answers and metrics"
    )
    tokenizer: str | None = flag(None, help="name or directory of the tokenizer; unset: the model")
    skip_tokenizer_init: bool = flag(False, help="load no tokenizer: token ids in, token ids out")
    tokenizer_mode: str = flag(
        "auto", choices=("auto", "slow"), help="auto: the fast tokenizer where there is one"
    )
    trust_remote_code: bool = flag(False, help="accept checkpoints that bring their own code")
    download_dir: str | None = flag(
        None, help="where checkpoints are cached; unset: the hub's cache"
    )
    load_format: str = flag(
        "auto",
        choices=("auto", "pt", "safetensors", "npcache", "dummy", "tensorizer"),
        help="form of the weights; auto: safetensors, else .bin; dummy: random weights",
    )
    dtype: str = flag(
        "auto",
        choices=_DTYPES,
        help="type of weights and activations; auto: the checkpoint's, fitted to the device",
    )
    kv_cache_dtype: str = flag(
        "auto",
        choices=("auto", "fp8", "fp8_e5m2", "fp8_e4m3"),
        help="type of the KV cache; auto: the model's",
    )
    quantization_param_path: str | None = flag(
        None, help="JSON file of KV cache scales, for --kv-cache-dtype fp8"
    )
    seed: int = flag(0, help="seed of the random numbers of requests that bring none")
    max_model_len: int | None = flag(
        None, help="prompt plus output tokens of one request; unset: what the model allows"
    )
    worker_use_ray: bool = flag(False, help="old spelling of --distributed-executor-backend ray")
    distributed_executor_backend: str | None = flag(
        None, choices=("ray", "mp", "uniproc"), help="what carries steps to the workers"
    )
    pipeline_parallel_size: int = flag(1, aliases=("-pp",), help="pipeline stages")
    tensor_parallel_size: int = flag(1, aliases=("-tp",), help="devices that share each layer")
    max_parallel_loading_workers: int | None = flag(
        None, help="workers that load weights at the same time; bounds host memory"
    )
    block_size: int = flag(16, help="tokens in one block of the KV cache: 8, 16 or 32")
    enable_prefix_caching: bool = flag(
        UNSET_FALSE, help="reuse the KV cache of common prefixes; on unless turned off"
    )
    use_v2_block_manager: bool = flag(
        False, help="accepted for compatibility; there is one block manager, the modern one"
    )
    swap_space: float = flag(4, help="GiB of host memory per worker for swapped requests")
    gpu_memory_utilization: float = flag(
        0.90, help="share of the GPU's memory that this engine may use, in (0, 1]"
    )
    max_num_batched_tokens: int | None = flag(
        None, help="tokens computed in one step; unset: chosen by device and chunked prefill"
    )
    max_num_seqs: int = flag(256, help="sequences that may run in one step")
    max_logprobs: int = flag(5, help="most log-probabilities that a request may ask for")
    disable_log_stats: bool = flag(False, help="log no throughput lines")
    revision: str | None = flag(None, help="branch, tag or commit of the model")
    code_revision: str | None = flag(None, help="branch, tag or commit of the model's own code")
    rope_scaling: JsonObject | None = flag(  # noqa: RUF009 - a field, not a value
        None, help='RoPE scaling, e.g. {"type": "dynamic", "factor": 2.0}'
    )
    tokenizer_revision: str | None = flag(None, help="branch, tag or commit of the tokenizer")
    quantization: str | None = flag(
        None, aliases=("-q",), help="int8: quantized while loading, on a CPU"
    )
    enforce_eager: bool = flag(False, help="capture no CUDA graphs")
    max_context_len_to_capture: int | None = flag(
        None, help="old spelling of --max-seq-len-to-capture"
    )
    max_seq_len_to_capture: int = flag(
        8192, help="contexts longer than this run without CUDA graphs"
    )
    disable_custom_all_reduce: bool = flag(False, help="reduce with NCCL alone")
    tokenizer_pool_size: int = flag(0, help="workers that tokenise; 0: in the event loop's process")
    tokenizer_pool_type: str = flag(
        "ray",
        choices=("ray", "process", "thread"),
        help="ray: Ray actors where Ray is installed, else processes",
    )
    tokenizer_pool_extra_config: JsonObject | None = flag(  # noqa: RUF009 - a field, not a value
        None, help="further options of the tokenizer pool"
    )
    enable_lora: bool = flag(False, help="serve LoRA adapters")
    max_loras: int = flag(1, help="adapters in one batch")
    max_lora_rank: int = flag(16, help="largest rank of an adapter")
    fully_sharded_loras: bool = flag(False, help="shard both halves of an adapter")
    lora_extra_vocab_size: int = flag(256, help="tokens that an adapter may add: 0, 256 or 512")
    long_lora_scaling_factors: tuple[float, ...] | None = flag(
        None, help="RoPE scaling factors of long-context adapters"
    )
    lora_dtype: str | None = flag(
        "auto",
        choices=("auto", "float16", "bfloat16", "float32"),
        help="type of adapter weights; auto: the model's",
    )
    max_cpu_loras: int | None = flag(
        None, help="adapters kept in host memory, at least --max-loras; unset: --max-loras"
    )
    device: str = flag(
        "auto", choices=("auto", "cuda", "cpu", "neuron"), help="auto: a GPU if there is one"
    )
    ray_workers_use_nsight: bool = flag(False, help="profile Ray workers with nsight")
    num_gpu_blocks_override: int | None = flag(
        None, help="exact number of KV cache blocks, whatever the memory"
    )
    num_lookahead_slots: int = flag(0, help="cache slots reserved per sequence and step")
    model_loader_extra_config: JsonObject | None = flag(  # noqa: RUF009 - a field, not a value
        None, help="further options of the weight loader"
    )
    image_input_type: str | None = flag(
        None, choices=("pixel_values", "image_features"), help="form of images in prompts"
    )
    image_token_id: int | None = flag(None, help="token id that stands for an image")
    image_input_shape: str | None = flag(None, help="largest image, e.g. 1,3,336,336")
    image_feature_size: int | None = flag(None, help="tokens that one image takes")
    scheduler_delay_factor: float = flag(
        0.0, help="wait this many times the last prompt's latency before the next prompt"
    )
    enable_chunked_prefill: bool = flag(
        UNSET_FALSE, help="split long prompts over steps; on unless turned off"
    )
    guided_decoding_backend: str = flag(
        "auto",
        choices=("auto", "outlines", "lm-format-enforcer", "xgrammar", "llguidance"),
        help="engine of guided decoding",
    )
    speculative_model: str | None = flag(None, help="draft model, or [ngram]")
    num_speculative_tokens: int | None = flag(None, help="tokens drafted per step")
    speculative_max_model_len: int | None = flag(None, help="longer sequences are not drafted for")
    speculative_disable_by_batch_size: int | None = flag(
        None, help="no drafts for new requests above this many running ones"
    )
    ngram_prompt_lookup_max: int | None = flag(None, help="longest n-gram looked up, with [ngram]")
    ngram_prompt_lookup_min: int | None = flag(None, help="shortest n-gram looked up, with [ngram]")
    # -- ours --
    max_steps_in_flight: int | None = flag(
        None,
        help="steps planned before the first is answered; 1: the plain loop; unset: 2 (the second "
        "as late as possible while requests arrive), and 3 while steps are very short",
    )
    max_prefill_slowdown: float = flag(
        2.0,
        help="how many times as long a step of running streams may take for prompts that enter, "
        "while few wait; 0: no limit",
    )
    scheduling_policy: str = flag(
        "fcfs", choices=("fcfs", "priority"), help="order of waiting requests"
    )
    preemption_mode: str | None = flag(
        None,
        choices=("recompute", "swap"),
        help="what happens to a preempted request; unset: swap for several branches",
    )
    deterministic: bool | None = flag(
        None, help="batch-invariant kernels; unset: on for float32 on the CPU"
    )
    cpu_kv_cache_space: float | None = flag(
        None, help="GiB of KV cache on the CPU device; unset: 4, less on a small machine"
    )
    max_waiting_requests: int | None = flag(
        None, help="requests that may wait; more are refused; unset: 4 times --max-num-seqs"
    )
    max_waiting_tokens: int | None = flag(
        None,
        help="prompt tokens that may wait; more are refused; 0: no limit; unset: 1024 for each "
        "request that may wait",
    )
    worker_threads: int | None = flag(None, help="CPU device: threads per worker; unset: all cores")
    engine_iteration_timeout: float = flag(
        60.0, help="seconds without a step's result after which workers count as stuck; 0: never"
    )
    recovery: bool = flag(True, help="go on with another core when one dies; else end with it")
    flight_record_dir: str | None = flag(None, help="record the core, prompts too, for a replay")
    flight_recorder_mb: int = flag(64, help="MiB after which a core's recording ends")
    loading_hang_s: float = flag(600.0, help="end a core that loads without progress; 0: never")
    compiling_hang_s: float = flag(600.0, help="the same while it compiles or warms up")
    stepping_hang_s: float = flag(30.0, help="the same while it has requests to serve")
    executor_class: str | None = flag(None, help="executor of your own, as package.module:Class")
    disable_sliding_window: bool = flag(
        False, help="attend to everything, and limit the length to the model's sliding window"
    )
    debug_faults: bool = flag(False, help=argparse.SUPPRESS)  # admits the next one
    failpoints: Names | None = flag(None, help=argparse.SUPPRESS)  # noqa: RUF009 - a field

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add one flag per field; returns the parser."""
        add_flags(parser, EngineArgs, "engine")
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Build from parsed arguments; what other flags put there is ignored."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)})

    def create_engine_config(
        self, usage_context: UsageContext | None = None, *, is_here: bool = True
    ) -> EngineConfig:
        """Check and resolve everything. Reads files, starts nothing.

        Args:
            is_here: whether the engine is to run on this machine; else its device is not looked
                for.

        Raises:
            ConfigError: a value cannot work; the message names the flag.
        """
        check_fields(self)
        load_config = self._load_config()
        parallel_config = self._parallel_config()
        optional_configs = {
            "lora_config": make_lora_config(self),
            "speculative_config": make_speculative_config(self),
            "vision_language_config": make_vision_config(self),
            "tokenizer_pool_config": make_tokenizer_pool_config(self),
        }
        cache_config = self._cache_config()
        device_config = resolve_device(DeviceConfig(self.device), is_here=is_here)
        draft = EngineConfig(
            model_config=self._model_config(),
            cache_config=cache_config,
            parallel_config=parallel_config,
            device_config=device_config,
            load_config=load_config,
            decoding_config=DecodingConfig(self.guided_decoding_backend),
            debug_config=make_debug_config(self.failpoints, is_debug=self.debug_faults),
            **optional_configs,  # type: ignore[arg-type]
        )
        check_features(draft)
        model_config = resolve_model_config(draft.model_config, load_config, device_config)
        scheduler_config = self._scheduler_config(
            model_config.resolved_max_model_len, device_config.device
        )
        config = resolve_engine_config(
            replace(draft, model_config=model_config, scheduler_config=scheduler_config),
            is_here=is_here,
        )
        log_effective_config(config, usage_context)
        return config

    def _model_config(self) -> ModelConfig:
        max_seq_len_to_capture = self.max_seq_len_to_capture
        if self.max_context_len_to_capture is not None:
            if self.max_context_len_to_capture < 1:
                raise ConfigError(
                    f"--max-context-len-to-capture must be at least 1, "
                    f"got {self.max_context_len_to_capture}"
                )
            logger.warning(
                "--max-context-len-to-capture is now called --max-seq-len-to-capture; using %d",
                self.max_context_len_to_capture,
            )
            max_seq_len_to_capture = self.max_context_len_to_capture
        return ModelConfig(
            model=self.model,
            tokenizer=self.tokenizer,
            tokenizer_mode=self.tokenizer_mode,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            seed=self.seed,
            revision=self.revision,
            code_revision=self.code_revision,
            rope_scaling=as_json_object("--rope-scaling", self.rope_scaling),
            tokenizer_revision=self.tokenizer_revision,
            max_model_len=self.max_model_len,
            quantization=self.quantization,
            quantization_param_path=self.quantization_param_path,
            enforce_eager=self.enforce_eager,
            max_context_len_to_capture=self.max_context_len_to_capture,
            max_seq_len_to_capture=max_seq_len_to_capture,
            max_logprobs=self.max_logprobs,
            disable_sliding_window=self.disable_sliding_window,
            skip_tokenizer_init=self.skip_tokenizer_init,
            served_model_name=self.served_model_name,
            deterministic=self.deterministic,
        )

    def _cache_config(self) -> CacheConfig:
        return CacheConfig(
            block_size=self.block_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            swap_space=float(self.swap_space),
            cache_dtype=self.kv_cache_dtype,
            num_gpu_blocks_override=self.num_gpu_blocks_override,
            enable_prefix_caching=_on_unless_refused(self.enable_prefix_caching),
            cpu_kv_cache_space=self.cpu_kv_cache_space,
        )

    def _parallel_config(self) -> ParallelConfig:
        return ParallelConfig(
            pipeline_parallel_size=self.pipeline_parallel_size,
            tensor_parallel_size=self.tensor_parallel_size,
            worker_use_ray=self.worker_use_ray,
            max_parallel_loading_workers=self.max_parallel_loading_workers,
            disable_custom_all_reduce=self.disable_custom_all_reduce,
            ray_workers_use_nsight=self.ray_workers_use_nsight,
            distributed_executor_backend=self.distributed_executor_backend,
            executor_class=self.executor_class,
            worker_threads=self.worker_threads,
            iteration_timeout_s=float(self.engine_iteration_timeout),
            enable_recovery=self.recovery,
            flight_record_dir=self.flight_record_dir,
            flight_recorder_mb=self.flight_recorder_mb,
            loading_hang_s=float(self.loading_hang_s),
            compiling_hang_s=float(self.compiling_hang_s),
            stepping_hang_s=float(self.stepping_hang_s),
        )

    def _load_config(self) -> LoadConfig:
        return LoadConfig(
            load_format=self.load_format,
            download_dir=self.download_dir,
            model_loader_extra_config=as_json_object(
                "--model-loader-extra-config", self.model_loader_extra_config
            )
            or {},
        )

    def _scheduler_config(self, max_model_len: int, device: str) -> SchedulerConfig:
        is_chunked = _on_unless_refused(self.enable_chunked_prefill)
        max_num_batched_tokens = self.max_num_batched_tokens
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(
                _default_token_budget(self.enable_chunked_prefill, max_model_len, device),
                self.max_num_seqs,
            )
        return SchedulerConfig(
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=max_model_len,
            use_v2_block_manager=True,
            num_lookahead_slots=self.num_lookahead_slots,
            delay_factor=self.scheduler_delay_factor,
            enable_chunked_prefill=is_chunked,
            policy=self.scheduling_policy,
            preemption_mode=self.preemption_mode,
            max_steps_in_flight=self.max_steps_in_flight,
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
            max_prefill_slowdown=self.max_prefill_slowdown,
        )


def _default_token_budget(
    enable_chunked_prefill: bool | None, max_model_len: int, device: str
) -> int:
    """512 where chunking was asked for, as in 2024: short steps. Else a balance."""
    if is_unset(enable_chunked_prefill):
        return 8192 if device == "cuda" else 2048
    return 512 if enable_chunked_prefill else max(max_model_len, 2048)


@dataclass
class AsyncEngineArgs(EngineArgs):
    """The arguments of an engine that serves an event loop."""

    engine_use_ray: bool = flag(False, help="accepted: the engine is a process of its own anyway")
    disable_log_requests: bool = flag(False, help="log no line per request")
    max_log_len: int | None = flag(
        None, help="most characters and token ids of a prompt that a log line shows"
    )
    # -- ours --
    disable_vllm_metric_names: bool = flag(
        False, help="export metrics under our own names only, without the vllm: ones"
    )

    @staticmethod
    def add_cli_args(
        parser: argparse.ArgumentParser, async_args_only: bool = False
    ) -> argparse.ArgumentParser:
        """Add the engine's flags and the async ones; returns the parser."""
        if not async_args_only:
            add_flags(parser, EngineArgs, "engine")
        add_flags(parser, AsyncEngineArgs, "async engine", besides=EngineArgs)
        return parser

    def create_engine_config(
        self, usage_context: UsageContext | None = None, *, is_here: bool = True
    ) -> EngineConfig:
        """As for ``EngineArgs``."""
        if self.engine_use_ray is True:
            logger.warning(
                "--engine-use-ray has no effect: the engine already runs in a process of its own"
            )
        if self.max_log_len is not None and self.max_log_len < 0:
            raise ConfigError(f"--max-log-len must not be negative, got {self.max_log_len}")
        return super().create_engine_config(usage_context, is_here=is_here)


def log_effective_config(config: EngineConfig, usage_context: UsageContext | None) -> None:
    """One line with every value that is in effect; secrets are masked."""
    if not logger.isEnabledFor(logging.INFO):
        return
    values = asdict(config)
    for name in ("hf_config", "generation_config"):  # the checkpoint's, not the user's
        values["model_config"].pop(name)
    logger.info(
        "Engine configuration (%s): %s",
        UsageContext.UNKNOWN_CONTEXT if usage_context is None else usage_context,
        _masked(values),
    )


def _masked(value: Any, name: str = "") -> Any:
    """``value`` with the strings under telling names replaced."""
    if isinstance(value, dict):
        return {key: _masked(item, str(key)) for key, item in value.items()}
    is_secret = not _SECRET_WORDS.isdisjoint(name.lower().replace("-", "_").split("_"))
    return "***" if is_secret and isinstance(value, str) else value


def _on_unless_refused(value: bool) -> bool:
    return True if is_unset(value) else bool(value)


def main(argv: list[str] | None = None) -> int:
    """Write the config that the flags describe to stdout. The exit code is 2 for bad flags."""
    parser = argparse.ArgumentParser(prog="python -m frontend.engine_args", description=__doc__)
    parser.add_argument("--encode", action="store_true", required=True, help="write msgpack")
    args = AsyncEngineArgs.add_cli_args(parser).parse_args(argv)
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except ConfigError as err:
        sys.stderr.write(f"error: {err}\n")
        return 2
    sys.stdout.buffer.write(encode_config(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
