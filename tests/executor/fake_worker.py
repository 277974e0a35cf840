"""A worker with the fake model. Run as a module it is a worker process with it.

The model's name chooses what goes wrong: "corrupt", "misconfigured" and "crash" fail while loading.
A prompt may carry orders too: token 99 fails the step, token 98 never lets it end.
"""

import os
import signal

import torch
from torch import Tensor

from executor.__main__ import run
from executor.loader.loader import LoadedModel
from executor.worker import Worker
from ipc.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from ipc.errors import ConfigError, EngineStartError
from tests.executor.fake_model import VOCAB_SIZE, FakeModel

FAILING_TOKEN, ENDLESS_TOKEN = 99, 98

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


class ObedientModel(FakeModel):
    """Fails when a prompt says so."""

    def forward(self, token_ids: Tensor, *rest: object) -> Tensor:
        if (token_ids == FAILING_TOKEN).any():
            raise RuntimeError("the fake model was told to fail")
        if (token_ids == ENDLESS_TOKEN).any():
            signal.pause()
        return super().forward(token_ids, *rest)  # type: ignore[arg-type]


def load(
    model_config: ModelConfig, load_config: LoadConfig, *, on_progress: object, **_: object
) -> LoadedModel:
    """Stands in for ``executor.loader.loader.load_model``."""
    match model_config.model:
        case "corrupt":
            raise EngineStartError("model-00001.safetensors is cut short: 10 bytes of 20")
        case "misconfigured":
            raise ConfigError("--dtype float13 does not exist")
        case "crash":
            os._exit(7)
    on_progress("weights", 1, 1)  # type: ignore[operator]
    return LoadedModel(ObedientModel(), weights_bytes=32, digest="fake")


def make_worker(config: EngineConfig, rank: int, rendezvous: str | None = None) -> Worker:
    return Worker(config, rank, rendezvous=rendezvous, load=load)  # type: ignore[arg-type]


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(make_worker)
