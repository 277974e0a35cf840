"""Which kernels an engine will launch: its first steps, run on no device at all.

The model, cut to a few layers, and all that belongs to a step live on PyTorch's meta device: shapes
without values. Within ``PretendedGpu`` such tensors pass for a GPU's, so everything takes the way
that it will take there, and each launch of a Triton kernel ends where its compilation would begin.
That is noted: a variant is what Triton names its cache entry by, so what is compiled from the notes
is what the real launch finds. Needs no GPU. Only for a process of its own: while it lasts, torch
and Triton tell lies about the machine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from executor.cuda_graphs import Recording
from executor.kernel_cache import Target
from executor.kernel_compiler import Variant
from executor.kv_cache import KVCache
from executor.loader.assign import parameter_bytes
from executor.loader.loader import LoadedModel, build_model, finish_model
from executor.model_config import ModelShape
from executor.model_runner import ModelRunner
from executor.models import registry
from executor.parallel import TensorParallel
from executor.rank_setup import dtype_of, make_states, plan_graphs, run_first_steps
from ipc.config import EngineConfig, ModelConfig
from ipc.errors import UnsupportedError

META = torch.device("meta")
_NUM_BLOCKS = 1 << 20  # of a cache without memory; the first steps name fewer
_LAYERS_OF_A_KIND = 2  # the first layer of a step does what the others find done


def find_variants(
    config: EngineConfig, target: Target, on_variant: Callable[[Variant], None]
) -> None:
    """Tell of every variant that the first steps of a rank launch, each once, as they come.

    Raises:
        UnsupportedError: the model runs through transformers, whose code needs a real device.
        ConfigError: the model cannot be built as configured.
    """
    if not registry.is_native(config.model_config.hf_config):
        raise UnsupportedError("kernels of models that run through transformers are not foreseen")
    with _stand_in(target), _noting(on_variant):
        _run_start(config)


def _run_start(config: EngineConfig) -> None:
    """What a worker's start launches, its recorded steps included."""
    tp = _AbsentMates(0, config.parallel_config.tensor_parallel_size)
    loaded = load_skeleton(config.model_config, tp)
    kv_cache = KVCache(
        loaded.model.kv_cache_specs(),
        num_blocks=_NUM_BLOCKS,
        num_swap_blocks=0,
        block_size=config.cache_config.block_size,
        dtype=dtype_of(config),
        device=META,
    )
    runner = ModelRunner(loaded.model, kv_cache, make_states(config, META))
    run_first_steps(config, runner, is_gpu=True)
    if (plan := plan_graphs(config, loaded, tp_size=tp.size)) is not None:
        runner.use_graphs(_EagerRecorder(), plan.sizes).rehearse()


def load_skeleton(model_config: ModelConfig, tp: TensorParallel) -> LoadedModel:
    """The model without its weights, and with a few layers that stand for all."""
    shape = ModelShape.from_hf(
        model_config.hf_config,
        max_model_len=model_config.max_model_len,
        disable_sliding_window=model_config.disable_sliding_window,
    )
    weights_bytes = parameter_bytes(build_model(model_config, shape, tp))
    model = build_model(model_config, cut_short(shape), tp)
    finish_model(model, META)
    return LoadedModel(model, weights_bytes, digest="")


def cut_short(shape: ModelShape) -> ModelShape:
    """The model with a few layers, among them every kind that it has."""
    kept: list[int] = []
    counts: dict[Any, int] = {}
    for layer, kind in enumerate(zip(shape.ropes, shape.sliding_windows, strict=True)):
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= _LAYERS_OF_A_KIND:
            kept.append(layer)
    return replace(
        shape,
        num_layers=len(kept),
        ropes=tuple(shape.ropes[layer] for layer in kept),
        sliding_windows=tuple(shape.sliding_windows[layer] for layer in kept),
    )


class _AbsentMates(TensorParallel):
    """A rank whose group is not there: the collectives change shapes alone."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor if self.size == 1 else torch.cat([tensor] * self.size, dim=dim)


class _EagerRecorder:
    """Runs what is to be rehearsed; records nothing."""

    def rehearse(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def record(self, run: Callable[[], Tensor]) -> Recording:
        raise NotImplementedError("nothing can be recorded without a device")


class PretendedGpu(TorchFunctionMode):
    """Meta tensors pass for a GPU's; what only a GPU could do is left out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ is Tensor.is_cuda:
            return args[0].is_meta
        if name == "pin_memory":
            return args[0]
        if _is_any_meta(args):
            if name.endswith("_") and not name.endswith("__"):
                return args[0]  # only values would change
            if (make_result := _RESULTS.get(name)) is not None:
                return make_result(*args)
        if kwargs.pop("pin_memory", False) and func is torch.empty:
            func = torch.zeros  # nobody will fill it: let it say that all is well
        return func(*args, **kwargs)


def _is_any_meta(args: Any) -> bool:
    first = args[0][0] if args and isinstance(args[0], list | tuple) and args[0] else None
    return any(isinstance(arg, Tensor) and arg.is_meta for arg in (first, *args))


def _attended(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    log_sums = torch.empty((*q.shape[:3], 1), dtype=torch.float32, device=META)
    return torch.empty_like(q), log_sums


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first = tensors[0]
    shape = list(first.shape)
    shape.insert(dim % (first.ndim + 1), len(tensors))
    return torch.empty(shape, dtype=first.dtype, device=META)


def _embedded(token_ids: Tensor, weight: Tensor, *_: object) -> Tensor:
    return torch.empty((*token_ids.shape, weight.shape[1]), dtype=weight.dtype, device=META)


# What the meta device lacks, or finds only by importing a compiler, which takes seconds.
_RESULTS: dict[str, Callable[..., Any]] = {
    "_cudnn_attention_forward": _attended,
    "stack": _stacked,
    "embedding": _embedded,
}


class _DriverWithoutDevice:
    """What a launch asks of Triton's driver before it compiles."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget("cuda", target.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def _stand_in(target: Target) -> Iterator[None]:
    """Have this process believe in a GPU of the target's kind."""
    properties = SimpleNamespace(
        multi_processor_count=target.num_multiprocessors,
        major=target.arch // 10,
        minor=target.arch % 10,
    )
    with ExitStack() as stack:
        for name, answer in (
            ("get_device_properties", properties),
            ("get_device_capability", divmod(target.arch, 10)),
        ):
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, _a=answer: _a))
        driver.set_active(_DriverWithoutDevice(target))
        stack.enter_context(PretendedGpu())
        yield


@contextmanager
def _noting(on_variant: Callable[[Variant], None]) -> Iterator[None]:
    """Note what would be compiled; nothing is, and nothing is launched."""
    run = JITFunction.run

    def never_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def compile_nothing(self: Any, *args: Any) -> object:
        return note_variant(on_variant, self, *args)

    with (
        patch.object(JITFunction, "run", never_launch),
        patch.object(JITFunction, "_do_compile", compile_nothing),
    ):
        yield


def note_variant(
    on_variant: Callable[[Variant], None],
    function: Any,
    key: Any,
    signature: dict[str, Any],
    device: int,
    *rest: Any,  # constants, options, attributes, and whether it is for a launch
) -> Variant:
    """Keep what Triton is asked to compile; returns what takes the place of the kernel."""
    constants, options, attributes, _ = rest
    variant = Variant(function, signature, constants, attributes, options)
    on_variant(variant)
    function.device_caches[device][0][key] = variant  # the next such launch is not new
    return variant
