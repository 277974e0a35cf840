"""What a worker process begins before it imports torch, which takes seconds."""

from executor.cuda_driver import EarlyContext
from executor.kernel_build import KernelBuild, begin_build
from executor.kernel_cache import Target
from ipc.config import EngineConfig


class EarlyStart:
    """Owns what goes on meanwhile. On a CPU that is nothing."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._kernels: KernelBuild | None = None
        self._context: EarlyContext | None = None
        if config.device_config.device == "cuda":
            self._context = EarlyContext(rank, self._begin_kernels)

    def kernels(self) -> KernelBuild | None:
        """The compiling process, None when there is nothing to compile."""
        if self._context is not None:
            self._context.join()
        return self._kernels

    def _begin_kernels(self, target: Target) -> None:
        self._kernels = begin_build(self._config, target)
