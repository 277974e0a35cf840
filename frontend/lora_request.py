"""LoRARequest: which adapter a request wants. A plain record; loading is the workers' business."""

from dataclasses import dataclass

from ipc.messages import LoRASpec


@dataclass(frozen=True, eq=False)
class LoRARequest:
    """An adapter by name, number and directory.

    The number is the identity: two requests with the same ``lora_int_id`` mean the same adapter,
    and the directory of the first one counts. ``lora_local_path`` and ``lora_path`` are two
    spellings of one value; either may be given, and both read back.
    """

    lora_name: str
    lora_int_id: int
    lora_local_path: str = ""
    long_lora_max_len: int | None = None
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict[str, object] | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        """Check the number and make both spellings of the path agree."""
        if not self.lora_name:
            raise ValueError("lora_name must not be empty")
        if isinstance(self.lora_int_id, bool) or not isinstance(self.lora_int_id, int):
            raise ValueError(f"lora_int_id must be a whole number, got {self.lora_int_id!r}")
        if self.lora_int_id < 1:
            raise ValueError(f"lora_int_id must be at least 1, got {self.lora_int_id}")
        path = self.lora_local_path or self.lora_path
        if not path:
            raise ValueError("lora_path (or lora_local_path) must not be empty")
        if self.lora_local_path and self.lora_path and self.lora_local_path != self.lora_path:
            raise ValueError(
                f"lora_path ({self.lora_path}) and lora_local_path ({self.lora_local_path}) "
                f"are two spellings of one value, but differ"
            )
        object.__setattr__(self, "lora_local_path", path)
        object.__setattr__(self, "lora_path", path)

    def __hash__(self) -> int:
        """The number is the identity."""
        return hash(self.lora_int_id)

    def __eq__(self, other: object) -> bool:
        """Same number, same adapter."""
        return isinstance(other, LoRARequest) and other.lora_int_id == self.lora_int_id

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """The adapter's number."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """The adapter's directory."""
        return self.lora_path

    @property
    def local_path(self) -> str:
        """The adapter's directory, by its older name."""
        return self.lora_path

    def to_spec(self) -> LoRASpec:
        """The adapter as the wire names it."""
        return LoRASpec(self.lora_name, self.lora_int_id, self.lora_path, self.long_lora_max_len)
