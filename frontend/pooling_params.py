"""PoolingParams: what a caller may ask of one pooling request."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class PoolingParams:
    """How to pool. ``additional_data`` is passed through for the model's own use."""

    additional_data: Any | None = None

    def clone(self) -> "PoolingParams":
        """A copy; ``additional_data`` is shared."""
        return PoolingParams(self.additional_data)
