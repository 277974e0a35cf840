"""Programmatic dependent launch: a kernel's programs start while the kernel before still runs.

Such a kernel is launched with ``launch_pdl=True``. It may read what nobody writes (weights), must
call ``gdc_wait`` before it touches anything else, its own outputs included, and lets its successor
start by ``gdc_launch_dependents``, as early as it likes: the wait is for the whole of the kernel
before, so waits follow each other however many kernels have been let in.
"""

import functools

from triton import knobs
from triton.runtime import driver

_FIRST_ARCH = 90

_switch = {"on": True}


def switch(on: bool) -> None:
    """Turn it on or off for all launches to come; graphs that were captured keep what they have."""
    _switch["on"] = on


def is_on() -> bool:
    """Whether launches should ask for it: the switch is on, and the GPU can do it."""
    return _switch["on"] and not knobs.runtime.interpret and _target_arch() >= _FIRST_ARCH


def options() -> dict[str, bool]:
    """What a launch passes on: the kernel's ``PDL`` constant, and the request itself."""
    return {"PDL": True, "launch_pdl": True} if is_on() else {"PDL": False}


@functools.cache
def _target_arch() -> int:
    return int(driver.active.get_current_target().arch)
