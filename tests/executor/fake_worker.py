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
from ipc.config import EngineConfig, LoadConfig, ModelConfig
from ipc.errors import ConfigError, EngineStartError
from tests.executor.fake_model import FakeModel

FAILING_TOKEN, ENDLESS_TOKEN = 99, 98


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


def make_worker(config: EngineConfig, rank: int) -> Worker:
    return Worker(config, rank, load=load)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(make_worker)
