"""The GPU's first half second, spent in a thread while torch is being imported.

CUDA's driver is asked directly: it needs no torch to say what the GPU is, and the context that it
makes is the one that torch will use.
"""

import ctypes
import threading
from collections.abc import Callable

from executor.kernel_cache import Target

_MULTIPROCESSOR_COUNT, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76  # CUdevice_attribute


class DriverError(Exception):
    """A call of the driver failed."""


def find_target(device: int) -> Target:
    """What kind of GPU that is.

    Raises:
        OSError, DriverError: there is no driver, or no such GPU.
    """
    driver, handle = _open(device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(driver.cuDeviceGetAttribute(ctypes.byref(value), number, handle))
        return value.value

    arch = 10 * attribute(_CAPABILITY_MAJOR) + attribute(_CAPABILITY_MINOR)
    return Target(arch, attribute(_MULTIPROCESSOR_COUNT))


def make_context(device: int) -> None:
    """Make the GPU's primary context, and keep it.

    Raises:
        OSError, DriverError: there is no driver, or no such GPU.
    """
    driver, handle = _open(device)
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), handle))


class EarlyContext:
    """Makes a GPU's context in a thread. What fails here fails again in torch, which says why."""

    def __init__(self, device: int, on_target: Callable[[Target], None]) -> None:
        """``on_target`` is called in the thread, as soon as it is known what the GPU is."""
        self._device = device
        self._on_target = on_target
        self._thread = threading.Thread(target=self._run, daemon=True, name="cuda-context")
        self._thread.start()

    def join(self) -> None:
        """Wait until the context is there, or will not be."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._on_target(find_target(self._device))
            make_context(self._device)
        except (OSError, DriverError):
            pass


def _open(device: int) -> tuple[ctypes.CDLL, ctypes.c_int]:
    driver = ctypes.CDLL("libcuda.so.1")
    _check(driver.cuInit(0))
    handle = ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device))
    return driver, handle


def _check(result: int) -> None:
    if result != 0:
        raise DriverError(f"CUDA's driver answered with error {result}")
