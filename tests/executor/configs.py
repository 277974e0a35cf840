"""A config for the fake model. Imports no torch, so that a parent process stays light."""

from ipc.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)

VOCAB_SIZE = 101

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def make_config(model: str = "fake", *, num_workers: int = 1, **cache: object) -> EngineConfig:
    return EngineConfig(
        model_config=ModelConfig(
            model=model, hf_config=HF_CONFIG, dtype="float32", max_model_len=64, deterministic=True
        ),
        cache_config=CacheConfig(block_size=8, **cache),  # type: ignore[arg-type]
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=256, max_num_seqs=8, max_model_len=64
        ),
        parallel_config=ParallelConfig(
            tensor_parallel_size=num_workers,
            worker_threads=1,
            distributed_executor_backend="mp" if num_workers > 1 else None,
        ),
        device_config=DeviceConfig("cpu"),
    )
