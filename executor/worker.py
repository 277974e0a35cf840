"""One rank: the device, the model, the cache and the runner; how they start, sleep and wake.

Knows nothing of channels or processes: the in-process executor calls it directly, the worker
process (``__main__``) puts a message loop around it.
"""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch

from executor.cuda_graphs import CudaRecorder, GraphPlan
from executor.device import (
    host_memory,
    join_group,
    memory_used,
    set_up_device,
    smallest,
)
from executor.early_start import EarlyStart
from executor.kernel_build import KernelBuild
from executor.kernel_compiler import hash_compilers_aside
from executor.kv_cache import KVCache, bytes_per_block
from executor.loader.loader import LoadedModel, load_model
from executor.memory import (
    CPU_SHARE,
    DeviceMemory,
    Need,
    activation_bytes,
    check_swap_space,
    plan_cpu_blocks,
    plan_gpu_blocks,
    plan_swap_blocks,
)
from executor.model_config import ModelShape
from executor.model_runner import ModelRunner, PendingStep
from executor.parallel import TensorParallel
from executor.profiling import RankProfiler
from executor.rank_setup import dtype_of, make_states, plan_graphs, run_first_steps, shape_of
from executor.request_states import RequestStates
from executor.warm_up import watch_compilations
from executor.weights import move_weights
from ipc.config import EngineConfig, LoadConfig, ModelConfig
from ipc.errors import UnsupportedError
from ipc.messages import LoadProgress, SchedulerOutput, WorkerInfo, WorkerReady, schema_hash
from ipc.operations import AnyOperation, CheckWorkers, Sleep, StartProfile, StopProfile, WakeUp
from ipc.tensors import Frames

# What a CUDA context takes on the device before the first tensor; it cannot be asked for.
CONTEXT_BYTES = 600 * 2**20
PROGRESS_S = 0.1  # between two reports of one phase

logger = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]


class LoadModel(Protocol):
    """How a model comes to be; ``executor.loader.loader.load_model`` outside tests."""

    def __call__(
        self,
        model_config: ModelConfig,
        load_config: LoadConfig,
        *,
        device: torch.device,
        tp: TensorParallel,
        on_progress: Callable[[str, int, int], None],
    ) -> LoadedModel:
        """Build the model on the device, its weights loaded."""
        ...


class Phases:
    """Times the phases of a start and reports them; ``stage`` names the one under way."""

    def __init__(self, rank: int) -> None:
        self.stage = "starting"
        self.seconds: dict[str, float] = {}
        self._rank = rank
        self._start_s = time.monotonic()
        self._told_s = 0.0
        self._on_progress: OnProgress | None = None

    def listen(self, on_progress: OnProgress) -> None:
        """Report to this function from now on."""
        self._on_progress = on_progress

    @contextmanager
    def phase(self, stage: str) -> Iterator[None]:
        """Run the body as this phase."""
        self.stage = stage
        self.report(stage, 0, 1)
        start_s = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - start_s

    def report(self, phase: str, done: int, total: int) -> None:
        """Tell how far a phase has come; its start and its end always, the rest now and then."""
        elapsed_s = time.monotonic() - self._start_s
        is_told = done in (0, total) or elapsed_s >= self._told_s + PROGRESS_S
        if self._on_progress is not None and is_told:
            self._told_s = elapsed_s
            self._on_progress(LoadProgress(self._rank, phase, done, total, elapsed_s))


class Worker:
    """Owns one rank's device memory. Used by one thread.

    Before ``start`` and while asleep there is no runner, and no step can be executed.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        *,
        load: LoadModel = load_model,
    ) -> None:
        self.phases = Phases(rank)
        self._config = config
        self._rank = rank
        self._tp = TensorParallel()
        self._load = load
        self._device = torch.device("cpu")
        self._baseline_free = 0  # of the GPU, before our first tensor
        self._loaded: LoadedModel | None = None
        self._states: RequestStates | None = None
        self._runner: ModelRunner | None = None
        self._num_blocks = (0, 0)  # in the cache, in the swap pool
        self._profiler = RankProfiler(rank)

    @property
    def is_asynchronous(self) -> bool:
        """Whether an executed step still runs when ``execute`` returns."""
        return self._device.type == "cuda"

    def start(
        self,
        on_progress: OnProgress,
        rendezvous: str | None = None,
        early: EarlyStart | None = None,
    ) -> WorkerReady:
        """Set up the device, load the model, allocate the cache, run the first steps.

        Args:
            rendezvous: path of a file where the ranks meet; needed beyond one worker.
            early: what this process began beforehand; None: kernels are compiled as they are met.

        Raises:
            ConfigError: a value cannot work on this machine.
        """
        phases, config = self.phases, self._config
        phases.listen(on_progress)
        with phases.phase("device"):
            self._device = set_up_device(
                config.device_config.device,
                self._rank,
                threads=config.parallel_config.worker_threads,
                deterministic=bool(config.model_config.deterministic),
            )
            if self.is_asynchronous:
                self._baseline_free = torch.cuda.mem_get_info()[0]
            world_size = config.parallel_config.world_size
            self._tp = join_group(self._rank, world_size, rendezvous, self._device)
        kernels = _begin_kernels(self._device, early)
        with phases.phase("loading weights"):
            self._loaded = self._load_weights()
        with phases.phase("memory"):
            shape = shape_of(config)
            self._states = make_states(config, self._device)
            activations = self._activation_bytes(shape)
            self._num_blocks = self._plan_blocks(activations)
            cache_bytes = self._make_runner()
        if kernels is not None:
            with phases.phase("compiling kernels"):
                kernels.wait(partial(phases.report, phases.stage))
        with phases.phase("warming up"):
            peak = self._warm_up()
            if peak > activations and config.cache_config.num_gpu_blocks_override is None:
                self._runner = None  # the cache goes before the smaller one comes
                self._num_blocks = self._plan_blocks(peak)
                cache_bytes = self._make_runner()
        if self._graph_plan is not None:
            with phases.phase("recording graphs"):
                self._record_graphs(are_kernels_built=early is not None)
        if self.is_asynchronous:
            watch_compilations(lambda name: logger.warning("compiled while serving: %s", name))
        phases.stage = "step"
        return WorkerReady(
            rank=self._rank,
            pid=os.getpid(),
            model_digest=self._loaded.digest,
            num_gpu_blocks=self._num_blocks[0],
            num_cpu_blocks=self._num_blocks[1],
            vocab_size=shape.vocab_size,
            weights_bytes=self._loaded.weights_bytes,
            kv_cache_bytes=cache_bytes,
            phases_s=phases.seconds,
            schema_hash=schema_hash(),
        )

    def execute(self, plan: SchedulerOutput, frames: Frames = ()) -> PendingStep:
        """Launch one step; resolve the result in launch order."""
        if self._runner is None:
            raise RuntimeError(f"step {plan.step_id} was planned for a worker that is asleep")
        return self._runner.execute(plan, frames)

    def do_idle_work(self) -> bool:
        """Do a part of what will be needed later, some hundredths of a second; False: all is done.

        For moments in which nobody waits for a step.
        """
        graphs = None if self._runner is None else self._runner.graphs
        return graphs is not None and graphs.record_next()

    def call(self, operation: AnyOperation) -> object:
        """Run a control operation and return its result.

        Raises:
            RequestError: it cannot be done now; nothing has changed.
        """
        match operation:
            case Sleep():
                self._sleep(operation.level)
            case WakeUp():
                self._wake_up()
            case StartProfile():
                self._profiler.start(operation.directory)
            case StopProfile():
                return [self._profiler.stop()]
            case CheckWorkers():
                return WorkerInfo(
                    rank=self._rank,
                    pid=os.getpid(),
                    device=str(self._device),
                    num_steps=0 if self._runner is None else self._runner.num_steps,
                    memory_used_bytes=memory_used(self._device),
                )
            case _:
                raise UnsupportedError(f"{type(operation).__name__} is no operation of a worker")
        return None

    def _load_weights(self) -> LoadedModel:
        config = self._config
        return self._load(
            config.model_config,
            config.load_config,
            device=self._device,
            tp=self._tp,
            on_progress=lambda _, done, total: self.phases.report(self.phases.stage, done, total),
        )

    def _activation_bytes(self, shape: ModelShape) -> int:
        scheduler = self._config.scheduler_config
        return activation_bytes(
            shape,
            tp_size=self._tp.size,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            item_size=dtype_of(self._config).itemsize,
        )

    @property
    def _graph_plan(self) -> GraphPlan | None:
        """What steps are recorded, None where all of them run eagerly."""
        if self._device.type == "cpu" or self._loaded is None:
            return None
        return plan_graphs(self._config, self._loaded, tp_size=self._tp.size)

    def _plan_blocks(self, activations: int) -> tuple[int, int]:
        """Blocks of the cache and of the swap pool, the same on every rank."""
        config, scheduler = self._config, self._config.scheduler_config
        assert self._loaded is not None
        need = Need(
            block_bytes=bytes_per_block(
                self._loaded.model.kv_cache_specs(),
                config.cache_config.block_size,
                dtype_of(self._config),
            ),
            block_size=config.cache_config.block_size,
            max_model_len=config.model_config.resolved_max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            num_lookahead_slots=scheduler.num_lookahead_slots,
        )
        host_total, host_available = host_memory()
        check_swap_space(
            config.cache_config.swap_space,
            num_workers=config.parallel_config.world_size,
            host_bytes=host_total,
        )
        if self._device.type == "cuda":
            num_blocks = plan_gpu_blocks(self._measure(activations), config.cache_config, need)
            swap_limit = host_available
        else:
            num_blocks = plan_cpu_blocks(host_available, config.cache_config, need)
            swap_limit = host_available // CPU_SHARE
        num_blocks = smallest(num_blocks, self._tp, self._device)
        num_swap_blocks = plan_swap_blocks(
            config.cache_config.swap_space,
            need,
            host_bytes=swap_limit // config.parallel_config.world_size,
            num_gpu_blocks=num_blocks,
        )
        return num_blocks, smallest(num_swap_blocks, self._tp, self._device)

    def _measure(self, activations: int) -> DeviceMemory:
        """The GPU's memory now, with weights and rows in place and no cache."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        libraries = max(0, self._baseline_free - free - reserved)
        plan = self._graph_plan
        return DeviceMemory(
            total=total,
            free=free,
            weights=reserved,
            activations=activations,
            graphs=0 if plan is None else plan.num_bytes,
            other=CONTEXT_BYTES + libraries,
        )

    def _make_runner(self) -> int:
        """Allocate the cache and build a runner on it; returns the cache's bytes."""
        assert self._loaded is not None
        assert self._states is not None
        model = self._loaded.model
        kv_cache = KVCache(
            model.kv_cache_specs(),
            num_blocks=self._num_blocks[0],
            num_swap_blocks=self._num_blocks[1],
            block_size=self._config.cache_config.block_size,
            dtype=dtype_of(self._config),
            device=self._device,
        )
        self._runner = ModelRunner(model, kv_cache, self._states)
        return kv_cache.num_bytes

    def _warm_up(self) -> int:
        """Run the first steps; returns the bytes they needed beyond what is always there."""
        assert self._runner is not None
        if not self.is_asynchronous:
            run_first_steps(self._config, self._runner, is_gpu=self.is_asynchronous)
            return 0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_first_steps(self._config, self._runner, is_gpu=self.is_asynchronous)
        return torch.cuda.max_memory_allocated() - before

    def _record_graphs(self, *, are_kernels_built: bool) -> None:
        """Record what the first requests will need; the rest is for idle moments."""
        plan = self._graph_plan
        if plan is None or self._runner is None:
            return
        graphs = self._runner.use_graphs(
            CudaRecorder(self._device, plan.temporaries_bytes), plan.sizes
        )
        if not are_kernels_built:
            graphs.rehearse()
        graphs.record_first()
        while self._tp.size > 1 and graphs.record_next():
            pass  # now, in step with the other ranks: recorded collectives may talk to their peers

    def _sleep(self, level: int) -> None:
        """Drop the cache; at level 1 the weights wait on the host, at level 2 they go too."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None
        if level >= 2:
            self._loaded = None
        elif self._loaded is not None:
            move_weights(self._loaded.model, torch.device("cpu"))
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _wake_up(self) -> None:
        """Bring weights and an empty cache back; the number of blocks stays."""
        if self._runner is not None:
            return
        if self._loaded is None:
            self._loaded = self._load_weights()
        else:
            move_weights(self._loaded.model, self._device)
        self._make_runner()
        self._record_graphs(are_kernels_built=True)


def _begin_kernels(device: torch.device, early: EarlyStart | None) -> KernelBuild | None:
    """Begin what the first launch needs; the compiling process, None when there is none."""
    if device.type != "cuda":
        return None
    hash_compilers_aside(torch.cuda.get_device_capability(device))
    return None if early is None else early.kernels()
