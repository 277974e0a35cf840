"""What later contracts name and this version does not have: each name answers with a sentence.

AsyncLLM takes these functions as methods, so their first argument is the engine.
"""

from typing import Any, NoReturn

from ipc.errors import UnsupportedError

_LATER_OPTIONS = ("session_id", "reasoning_ended")  # of generate


def check_request_options(options: dict[str, Any]) -> None:
    """Refuse options of a request that this version does not have; absent ones may be None."""
    for name in _LATER_OPTIONS:
        if options.pop(name, None) is not None:
            raise UnsupportedError(f"{name} is not available in this version", name)


async def refuse_apply_model(self: object, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse code for the workers."""
    raise UnsupportedError(
        "apply_model is not available: no code travels to the workers' processes"
    )


async def refuse_weights(self: object, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse new weights for a running engine."""
    raise UnsupportedError(
        "changing the weights of a running engine is not available in this version: start an "
        "engine with the new checkpoint"
    )


async def refuse_scaling(self: object, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse a change of the number of replicas."""
    raise UnsupportedError(
        "scale_elastic_ep is not available in this version, which has one replica per engine"
    )


async def refuse_checkpoints(self: object, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse images of a running process."""
    raise UnsupportedError("checkpoints of a running engine are not available in this version")


async def refuse_faults(self: object, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse fault handling from outside."""
    raise UnsupportedError(
        "fault control from outside is not available in this version: check_health() tells the "
        "engine's state"
    )


async def is_tracing_enabled(self: object) -> bool:
    """False: there is no tracing in this version."""
    return False


async def reset_empty_cache(self: object) -> bool:
    """True at once: images and encoder outputs, which this cache would hold, are not served."""
    return True


def check_sleep_mode(mode: str) -> None:
    """Refuse to sleep in the middle of requests."""
    if mode != "abort":
        raise UnsupportedError(
            f"sleep mode {mode!r} is not available in this version: the engine sleeps only when "
            f"idle",
            "mode",
        )


def check_cache_reset(*, reset_running_requests: bool) -> None:
    """Refuse to take cached blocks from running requests."""
    if reset_running_requests:
        raise UnsupportedError(
            "reset_running_requests is not available in this version: blocks that running "
            "requests use are kept",
            "reset_running_requests",
        )
