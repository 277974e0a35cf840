"""The device of a rank: choosing it, setting torch up for it, and reading its memory.

The only file that reads the environment of others: core counts, cgroup limits, CUDA.
"""

import math
import os
from pathlib import Path

import psutil
import torch
from torch import distributed as dist

from executor.parallel import TensorParallel
from ipc.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def set_up_device(
    name: str, local_rank: int, *, threads: int | None, deterministic: bool
) -> torch.device:
    """Make torch ready for a device and return it; on a GPU this creates the context.

    Args:
        name: "cpu" or "cuda".
        threads: for the CPU device; None takes what the machine and torch agree on.

    Raises:
        ConfigError: there is no such device.
    """
    if deterministic:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    if name == "cpu":
        wanted = threads if threads is not None else min(torch.get_num_threads(), usable_cores())
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)
        return torch.device("cpu")
    if name != "cuda":
        raise ConfigError(f"--device must be cuda or cpu here, got {name!r}")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ConfigError(
            f"--device cuda: worker {local_rank} needs a GPU of its own, "
            f"torch {torch.__version__} sees {num_devices}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    return device


def join_group(
    rank: int, world_size: int, rendezvous: str | None, device: torch.device
) -> TensorParallel:
    """This rank's place among the workers; waits until all of them are there.

    Args:
        rendezvous: path of a file on this host that all ranks name; needed beyond one worker.
    """
    if world_size == 1:
        return TensorParallel()
    if rendezvous is None:
        raise ValueError(f"{world_size} workers need a file to meet at")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
    )
    return TensorParallel(rank, world_size, dist.group.WORLD)


def smallest(value: int, tp: TensorParallel, device: torch.device) -> int:
    """The smallest of all ranks' values."""
    return int(tp.all_gather(torch.tensor([value], device=device), 0).min())


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and its container's share of time."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def host_memory() -> tuple[int, int]:
    """Bytes of this host that processes may use, and those available now; containers count."""
    host = psutil.virtual_memory()
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return host.total, host.available
    return min(host.total, limit), min(host.available, max(0, limit - used))


def memory_used(device: torch.device) -> int:
    """Bytes that this process holds: on the GPU, or in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def is_device_error(err: BaseException) -> bool:
    """Whether the device itself failed, so that this process cannot go on using it."""
    return isinstance(err, torch.AcceleratorError) or "CUDA error" in str(err)
