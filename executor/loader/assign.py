"""Fill a model's parameters from sources, each exactly once, each rank its own pieces.

Knows nothing of files: it matches names, checks shapes and copies ranges. The layers' ``sharding``
says which ranges; the model's ``packed_modules`` which checkpoint tensors lie in one parameter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from executor.layers.sharding import Sharding
from executor.loader.sources import Ranges, TensorSource, TransposedSource
from executor.models.interface import CheckpointNames, PackedModules
from ipc.errors import EngineStartError

OnFilled = Callable[[str], None]
Copy = Callable[[Tensor, Tensor], object]  # target, values


@dataclass(frozen=True, slots=True)
class Slot:
    """A place to fill: a whole parameter, or one of the checkpoint tensors packed into it."""

    parameter: str
    part: int | None  # None: the whole, which may be several parts fused in the checkpoint


class WeightAssigner:
    """Owns which slots are filled. Every parameter must be filled exactly once."""

    def __init__(
        self, model: nn.Module, names: CheckpointNames, packed_modules: PackedModules
    ) -> None:
        self._names = names
        self._parameters = dict(model.named_parameters())
        self._shardings = {name: _sharding(model, name) for name in self._parameters}
        self._slots_by_module = {
            part: (packed, index)
            for packed, parts in packed_modules.items()
            for index, part in enumerate(parts)
        }
        self._filled: set[tuple[str, int]] = set()
        self._on_filled: OnFilled | None = None
        self._problems: list[str] = []
        self._copy: Copy = Tensor.copy_

    def copy_by(self, copy: Copy) -> None:
        """Have values copied by this function, which may be done with it later."""
        self._copy = copy

    def tell_when_filled(self, on_filled: OnFilled) -> None:
        """Have ``fill_all`` pass on each parameter's name when it is complete, and forget it.

        So whoever is told may replace the parameter and let its memory go.
        """
        self._on_filled = on_filled

    def slot_of(self, checkpoint_name: str) -> Slot | None:
        """Where a checkpoint tensor goes; None when the model has no use for it."""
        local = self._names.local_name(checkpoint_name)
        if local is None:
            return None
        if local in self._parameters:
            return Slot(local, None)
        path = local.split(".")
        for place in range(len(path) - 1):
            packed = self._slots_by_module.get(path[place])
            if packed is not None:
                name = ".".join([*path[:place], packed[0], *path[place + 1 :]])
                return Slot(name, packed[1])
        return Slot(local, None)

    def fill_all(
        self, tensors: Mapping[str, TensorSource], on_tensor: Callable[[str], None]
    ) -> None:
        """Fill from a checkpoint, and check that nothing is missing, doubled, or left over.

        Raises:
            EngineStartError: lists every tensor that does not fit.
        """
        for name, source in tensors.items():
            slot = self.slot_of(name)
            if slot is not None:
                if name.endswith(self._names.transposed) and self._names.transposed:
                    source = TransposedSource(source)
                self._fill(slot, source, name)
            on_tensor(name)
        self._problems += [f"{name} is missing" for name in self._missing()]
        if self._problems:
            shown = "; ".join(self._problems[:8])
            more = f"; and {len(self._problems) - 8} more" if len(self._problems) > 8 else ""
            raise EngineStartError(f"the checkpoint does not fit the model: {shown}{more}")

    def slots(self) -> Iterator[tuple[Slot, tuple[int, ...]]]:
        """Every slot with the shape of the checkpoint tensor for it; packed ones part by part."""
        for name, parameter in self._parameters.items():
            sharding = self._shardings[name]
            if sharding is None:
                yield Slot(name, None), tuple(parameter.shape)
                continue
            for part in range(len(sharding.parts)):
                yield Slot(name, part), self._full_shape(name, part)

    def fill(self, slot: Slot, source: TensorSource) -> None:
        """Copy this rank's ranges of ``source`` into the slot."""
        parameter = self._parameters[slot.parameter]
        sharding = self._shardings[slot.parameter]
        if sharding is None:
            self._copy(parameter.data, source.read(_whole(source.shape)))
            return
        if sharding.padded:
            parameter.data.zero_()
        for index, part in enumerate(sharding.parts):
            if slot.part not in (None, index) or part.length == 0:
                continue
            offset = sharding.source_start(index) if slot.part is None else 0
            start = offset + part.start
            ranges = list(_whole(source.shape))
            ranges[sharding.dim] = slice(start, start + part.length)
            values = source.read(tuple(ranges))
            place = sharding.target_start(index)
            self._copy(parameter.data.narrow(sharding.dim, place, part.length), values)

    def _fill(self, slot: Slot, source: TensorSource, checkpoint_name: str) -> None:
        if slot.parameter not in self._parameters:
            if not self._is_tied_head(slot.parameter):
                self._problems.append(f"{checkpoint_name} is unexpected")
            return
        expected = self._full_shape(slot.parameter, slot.part)
        if source.shape != expected:
            self._problems.append(
                f"{checkpoint_name} has shape {list(source.shape)}, expected {list(expected)}"
            )
            return
        marks = {(slot.parameter, i) for i in self._parts_of(slot)}
        if marks & self._filled:
            self._problems.append(f"{checkpoint_name} fills {slot.parameter} a second time")
            return
        self._filled |= marks
        self.fill(slot, source)
        name = slot.parameter
        whole = {(name, i) for i in self._parts_of(Slot(name, None))}
        if self._on_filled is not None and whole <= self._filled:
            self._parameters[name] = nn.Parameter(
                self._parameters[name].to("meta"), requires_grad=False
            )
            self._on_filled(name)

    def _is_tied_head(self, parameter: str) -> bool:
        """A tied head has no weight of its own; some checkpoints repeat the embedding there."""
        return parameter == "lm_head.weight"

    def _parts_of(self, slot: Slot) -> range:
        sharding = self._shardings[slot.parameter]
        if slot.part is not None:
            return range(slot.part, slot.part + 1)
        return range(1 if sharding is None else len(sharding.parts))

    def _full_shape(self, name: str, part: int | None) -> tuple[int, ...]:
        shape, sharding = list(self._parameters[name].shape), self._shardings[name]
        if sharding is not None:
            full = sharding.full if part is None else sharding.parts[part].full
            shape[sharding.dim] = full
        return tuple(shape)

    def _missing(self) -> list[str]:
        wanted = [(n, i) for n in self._parameters for i in self._parts_of(Slot(n, None))]
        names = []
        for name, part in wanted:
            if (name, part) not in self._filled:
                names.append(name if part == 0 else f"{name} (part {part + 1})")
        return names


def _sharding(model: nn.Module, parameter: str) -> Sharding | None:
    module, _, name = parameter.rpartition(".")
    return getattr(model.get_submodule(module), "sharding", {}).get(name)


def _whole(shape: tuple[int, ...]) -> Ranges:
    return tuple(slice(0, size) for size in shape)


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all weights on this rank, as they lie in memory, packed ones included."""
    packed: int = sum(getattr(module, "packed_bytes", 0) for module in model.modules())
    return parameter_bytes(model) + packed


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters on this rank."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
