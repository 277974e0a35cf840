"""Build a model and fill it: config -> modules on the meta device -> weights in their final place.

Every weight goes straight from its file (mapped into memory) into the fused, sharded parameter on
the target device, in the target dtype; there is no second copy of the model anywhere.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from executor.layers.linear import LayerFactory, LinearMethod, UnquantizedLinearMethod
from executor.loader.assign import WeightAssigner, weights_bytes
from executor.loader.checkpoint import open_checkpoint
from executor.loader.copier import Copier, PinnedLane
from executor.loader.sources import DummySource, TensorSource
from executor.model_config import ModelShape
from executor.models import registry
from executor.models.interface import CausalLM
from executor.parallel import TensorParallel
from executor.quantization import int8_dynamic
from executor.quantization.int8_dynamic import Int8LinearMethod
from ipc.config import INT8, LoadConfig, ModelConfig
from ipc.errors import ConfigError

OnProgress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what is worth knowing about its weights."""

    model: CausalLM
    weights_bytes: int  # on this rank
    digest: str  # sha256: config, tensors' names, shapes and types, file sizes; equal on all ranks


def load_model(
    model_config: ModelConfig,
    load_config: LoadConfig,
    *,
    device: torch.device,
    tp: TensorParallel,
    on_progress: OnProgress,
) -> LoadedModel:
    """Load this rank's part of the model.

    On a CPU, set torch's thread count first: the form of each weight is chosen by trying it.

    Raises:
        ConfigError: the model cannot be built as configured.
        EngineStartError: the checkpoint is broken or does not fit the model.
    """
    unknown = sorted(load_config.model_loader_extra_config)
    if unknown:
        raise ConfigError(
            f"--model-loader-extra-config: the loader of --load-format {load_config.load_format} "
            f"takes no options, got {', '.join(unknown)}"
        )
    if model_config.quantization == INT8:
        int8_dynamic.check_supported(device)
    if not registry.is_native(model_config.hf_config):
        return _load_fallback(model_config, load_config, device, tp, on_progress)
    shape, _ = _shape_and_dtype(model_config)
    model = build_model(model_config, shape, tp)
    _allocate(model, device)
    assigner = WeightAssigner(model, model.checkpoint_names, model.packed_modules)
    if load_config.load_format == "dummy":
        lines = fill_with_dummies(assigner, model_config.seed, device, on_progress)
    else:
        if model_config.quantization == INT8:
            assigner.tell_when_filled(int8_dynamic.finish_when_filled(model, device))
        lines = _fill_from_files(assigner, model_config, load_config, device, on_progress)
    finish_model(model, device)
    return LoadedModel(model, weights_bytes(model), _digest(model_config.hf_config, lines))


def build_model(model_config: ModelConfig, shape: ModelShape, tp: TensorParallel) -> Any:
    """An architecture of our own in ``shape``, on the meta device: nothing is allocated."""
    _, dtype = _shape_and_dtype(model_config)
    with torch.device("meta"):
        model_class = registry.resolve(model_config.hf_config)
        factory = LayerFactory(
            tp, dtype, _linear_method(model_config), deterministic=bool(model_config.deterministic)
        )
        return model_class(shape, factory)


def _linear_method(model_config: ModelConfig) -> LinearMethod:
    if model_config.quantization == INT8:
        return Int8LinearMethod()
    return UnquantizedLinearMethod(deterministic=bool(model_config.deterministic))


def finish_model(model: nn.Module, device: torch.device) -> None:
    """Every parameter is in place: let the layers choose how they compute."""
    for module in model.modules():
        finish = getattr(module, "finish_loading", None)
        is_packed = getattr(module, "packed_bytes", 0) > 0  # while the others were still loading
        if finish is not None and not is_packed:
            finish(device)
    model.eval().requires_grad_(False)


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give every parameter its memory, with whatever is in it.

    ``Module.to_empty`` would import sympy on its way through the meta device: most of a second.
    """
    allocated: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in allocated:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                allocated[parameter] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, allocated[parameter])


def _shape_and_dtype(model_config: ModelConfig) -> tuple[ModelShape, torch.dtype]:
    in_config = model_config.hf_config.get("quantization_config") or {}
    in_checkpoint = in_config.get("quant_method")
    method = in_checkpoint or model_config.quantization
    if in_checkpoint is not None or method not in (None, INT8):
        raise ConfigError(
            f"--quantization {method} is not supported by this version, nor are checkpoints in it"
        )
    if model_config.dtype not in _DTYPES:
        raise ConfigError(f"--dtype must be resolved to one of {', '.join(_DTYPES)} before loading")
    shape = ModelShape.from_hf(
        model_config.hf_config,
        max_model_len=model_config.max_model_len,
        disable_sliding_window=model_config.disable_sliding_window,
    )
    return shape, _DTYPES[model_config.dtype]


def _load_fallback(
    model_config: ModelConfig,
    load_config: LoadConfig,
    device: torch.device,
    tp: TensorParallel,
    on_progress: OnProgress,
) -> LoadedModel:
    """An architecture without a file of its own: transformers builds and reads it."""
    fallback = importlib.import_module("executor.models.transformers_fallback")
    fallback.check_supported(model_config)
    shape, dtype = _shape_and_dtype(model_config)
    if tp.size > 1:
        raise ConfigError(
            f"--tensor-parallel-size {tp.size} is not supported for {shape.architecture}, "
            f"which runs through transformers"
        )
    if load_config.load_format == "npcache":
        raise ConfigError(
            f"--load-format npcache is not supported for {shape.architecture}, "
            f"which runs through transformers"
        )
    on_progress("weights", 0, 1)
    if load_config.load_format == "dummy":
        lines = [f"dummy {model_config.seed}"]
        model = fallback.make_random(model_config, shape, dtype, device)
    else:
        checkpoint = open_checkpoint(Path(model_config.model_path), load_config)
        lines = checkpoint.fingerprint()
        is_safe = any(name.endswith(".safetensors") for name in checkpoint.file_sizes)
        model = fallback.load_from_files(
            model_config, shape, dtype, device, use_safetensors=is_safe
        )
    on_progress("weights", 1, 1)
    digest = _digest(model_config.hf_config, lines)
    return LoadedModel(model, model.weights_bytes, digest)


def _fill_from_files(
    assigner: WeightAssigner,
    model_config: ModelConfig,
    load_config: LoadConfig,
    device: torch.device,
    on_progress: OnProgress,
) -> list[str]:
    checkpoint = open_checkpoint(Path(model_config.model_path), load_config)
    total = sum(_weight(source) for source in checkpoint.tensors.values())
    done = 0

    def on_tensor(name: str) -> None:
        nonlocal done
        done += _weight(checkpoint.tensors[name])
        on_progress("weights", done, total)

    if device.type == "cpu":
        assigner.fill_all(checkpoint.tensors, on_tensor)
    else:
        with Copier(partial(PinnedLane, device)) as copier:
            assigner.copy_by(copier.copy)
            assigner.fill_all(checkpoint.tensors, on_tensor)
    return checkpoint.fingerprint()


def fill_with_dummies(
    assigner: WeightAssigner, seed: int, device: torch.device, on_progress: OnProgress
) -> list[str]:
    """Fill every parameter with values that depend on the seed and on names alone."""
    slots = list(assigner.slots())
    lines = [f"dummy {seed}"]
    for number, (slot, shape) in enumerate(slots, 1):
        name = slot.parameter
        if slot.part is not None and slot.part > 0:
            name = f"{slot.part}:{name}"
        assigner.fill(slot, DummySource(seed, name, shape, device))
        lines.append(f"{name} {shape}")
        on_progress("weights", number, len(slots))
    return lines


def _weight(source: TensorSource) -> int:
    """Values in a tensor: all that progress needs."""
    count = 1
    for size in source.shape:
        count *= size
    return count


def _digest(hf_config: Mapping[str, object], lines: list[str]) -> str:
    config = json.dumps(hf_config, sort_keys=True, default=str)
    return hashlib.sha256("\n".join([config, *lines]).encode()).hexdigest()
