"""Which kind of device this machine offers, found out without importing torch or touching a GPU."""

import ctypes
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ipc.errors import ConfigError

_DEVICES = ("auto", "cuda", "cpu", "neuron")


def choose_device(wanted: str, why_no_cuda: Callable[[], str | None] | None = None) -> str:
    """ "cuda" or "cpu" for a ``--device``.

    Raises:
        ConfigError: no such device, or none of its kind here.
    """
    if wanted not in _DEVICES:
        raise ConfigError(f"--device must be one of {', '.join(_DEVICES)}, got {wanted!r}")
    if wanted == "neuron":
        raise ConfigError("--device neuron is not supported; use cuda or cpu")
    if wanted == "cpu":
        return "cpu"
    reason = (why_no_cuda or find_why_no_cuda)()
    if reason is None:
        return "cuda"
    if wanted == "cuda":
        raise ConfigError(f"--device cuda: {reason}")
    return "cpu"


def find_why_no_cuda() -> str | None:
    """None when workers can use CUDA, else the reason why not.

    The driver is loaded but not initialised: a process that has initialised it must not fork,
    and this one belongs to the user.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return "this machine shows no NVIDIA GPU"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver library libcuda.so.1 cannot be loaded"
    return _why_torch_lacks_cuda()


def _why_torch_lacks_cuda() -> str | None:
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    if torch_version.endswith("+cpu"):
        return f"the installed torch ({torch_version}) is a build for CPUs only"
    return None
