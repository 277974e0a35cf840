"""The user's own middleware, by import path: found and checked before the engine starts."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware

from ipc.errors import ConfigError


@dataclass(frozen=True, slots=True)
class UserMiddleware:
    """A class that wraps an ASGI application, or a coroutine function ``(request, call_next)``."""

    path: str
    target: Callable[..., Any]

    def add_to(self, app: Starlette) -> None:
        """Wrap ``app``; what is added last is outermost."""
        if inspect.iscoroutinefunction(self.target):
            app.add_middleware(BaseHTTPMiddleware, dispatch=self.target)
        else:
            app.add_middleware(self.target)


def load_middleware(path: str) -> UserMiddleware:
    """Import what ``--middleware`` names.

    Raises:
        ConfigError: not importable, or neither a class nor a coroutine function.
    """
    module, _, name = path.rpartition(".")
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as err:
        raise ConfigError(f"--middleware {path!r} cannot be imported: {err}") from err
    if not (inspect.isclass(target) or inspect.iscoroutinefunction(target)):
        raise ConfigError(f"--middleware {path!r} must be a class or a coroutine function")
    return UserMiddleware(path, target)
