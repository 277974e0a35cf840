"""Rotary position embeddings: cos/sin tables for every kind of scaling, read once per step.

A key in the cache keeps the rotation that it was stored with, and a block may be reused by another
request or computed again after a preemption. So a table may depend on the position and on the
engine's limits, never on how long a request happens to be. Two kinds are defined by the running
length in Hugging Face's code, and get a rule of that form here:

- ``dynamic`` (NTK): row p uses the base for a length of p + 1. This is what Hugging Face computes
  when it generates token by token; a *prompt* longer than the trained length is rotated there by
  one base, that of the prompt's length.
- ``longrope`` (Phi-3, also called su): the long factors when ``max_model_len`` passes the original
  length, else the short ones. Hugging Face switches per request; set --max-model-len to the
  original length to have the short factors.

Shapes: T packed tokens, P positions, R rotated dimensions of a head.
Sources: Su et al., arXiv:2104.09864; Peng et al. (YaRN), arXiv:2309.00071; Ding et al. (LongRoPE),
arXiv:2402.13753; the Llama 3.1 report, arXiv:2407.21783.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from executor.model_config import RopeShape
from kernels.qkv_rope_store import Rotation
from kernels.rotary import rotate_heads, widen_tables


class RotaryStep(NamedTuple):
    """One step's rotation, one for all layers of the same rotary shape."""

    cos: Tensor  # [P, R/2] float32; or [T, 1, R], gathered and widened, where positions is None
    sin: Tensor
    positions: Tensor | None  # [T]

    def rotate(self, qk: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Turn ``qk`` [T, N + K, D], the queries' heads before the keys'; ``(q, k)``."""
        assert self.positions is None, "the rows were not gathered"
        turned = rotate_heads(qk, self.cos, self.sin)
        return turned[:, :num_heads], turned[:, num_heads:]

    def rotate_pair(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The same for queries and keys that are apart already."""
        assert self.positions is None, "the rows were not gathered"
        return rotate_heads(q, self.cos, self.sin), rotate_heads(k, self.cos, self.sin)

    @property
    def rotation(self) -> Rotation:
        """The same for the kernel that looks the rows up itself."""
        assert self.positions is not None, "the rows were gathered"
        return Rotation(self.cos, self.sin, self.positions)


class RotaryEmbedding(nn.Module):
    """The tables of one rotary shape. They are made after loading, on the model's device."""

    def __init__(self, shape: RopeShape, max_model_len: int) -> None:
        super().__init__()
        self.shape = shape
        self.max_model_len = max_model_len
        self._tables: tuple[Tensor, Tensor] | None = None

    def finish_loading(self, device: torch.device) -> None:
        """Compute the tables on the CPU, so that every device has the same bits."""
        cos, sin = make_tables(self.shape, self.max_model_len)
        if device.type == "cpu":
            cos, sin = widen_tables(cos, sin)
        self._tables = (cos.to(device), sin.to(device))

    def forward(self, positions: Tensor) -> RotaryStep:
        """What the layers of a step need. On a CPU the rows are gathered once, here."""
        assert self._tables is not None, "the model was not loaded"
        cos, sin = self._tables
        if cos.device.type != "cpu":
            return RotaryStep(cos, sin, positions)
        return RotaryStep(cos.index_select(0, positions), sin.index_select(0, positions), None)


class LayerRotary(nn.Module):
    """The rotary embeddings of a model: one per distinct shape, one step's worth per layer."""

    def __init__(self, shapes: tuple[RopeShape, ...], max_model_len: int) -> None:
        super().__init__()
        distinct = list(dict.fromkeys(shapes))
        self.embeddings = nn.ModuleList(RotaryEmbedding(s, max_model_len) for s in distinct)
        self._index = [distinct.index(shape) for shape in shapes]

    def forward(self, positions: Tensor) -> list[RotaryStep]:
        """[T] -> one ``RotaryStep`` per layer; layers of equal shape share theirs."""
        steps = [embedding(positions) for embedding in self.embeddings]
        return [steps[i] for i in self._index]


def make_tables(shape: RopeShape, max_model_len: int) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, each [max_model_len, R/2] float32, attention factor included."""
    positions = torch.arange(max_model_len, dtype=torch.float32)
    if shape.kind == "dynamic":
        angles = positions[:, None] * _dynamic_frequencies(shape, max_model_len)
        return angles.cos(), angles.sin()
    frequencies, factor = inverse_frequencies(shape, max_model_len)
    angles = positions[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(shape: RopeShape, max_model_len: int) -> tuple[Tensor, float]:
    """The R/2 angular steps per position, and what scales cos and sin (attention's temperature)."""
    plain = 1.0 / _wave_numbers(shape)
    if shape.kind == "linear":
        return plain / shape.need("factor"), 1.0
    if shape.kind == "llama3":
        return _llama3(shape, plain), 1.0
    if shape.kind == "yarn":
        return _yarn(shape)
    if shape.kind == "longrope":
        return _longrope(shape, max_model_len)
    return plain, 1.0


def _wave_numbers(shape: RopeShape, theta: float | None = None) -> Tensor:
    exponents = torch.arange(0, shape.rotary_dim, 2, dtype=torch.float32) / shape.rotary_dim
    return (shape.theta if theta is None else theta) ** exponents


def _dynamic_frequencies(shape: RopeShape, max_model_len: int) -> Tensor:
    """[P, R/2]: the base grows with the length once the trained length is passed."""
    factor, trained, dim = shape.need("factor"), shape.max_position_embeddings, shape.rotary_dim
    lengths = torch.arange(1, max_model_len + 1, dtype=torch.float32).clamp_(min=trained)
    bases = shape.theta * (factor * lengths / trained - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / bases[:, None] ** exponents


def _llama3(shape: RopeShape, plain: Tensor) -> Tensor:
    """Long waves are stretched by ``factor``, short ones kept, those between blended."""
    factor, original = shape.need("factor"), shape.original_max_position_embeddings
    low, high = shape.need("low_freq_factor"), shape.need("high_freq_factor")
    turns = original * plain / (2 * math.pi)  # full turns within the original length
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * plain / factor + keep * plain


def _yarn(shape: RopeShape) -> tuple[Tensor, float]:
    """Dimensions that turn often are kept, those that never finish a turn interpolated."""
    original, dim = shape.original_max_position_embeddings, shape.rotary_dim
    factor = shape.get("factor") or shape.max_position_embeddings / original

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(shape.theta))

    low = dimension_of(shape.get("beta_fast") or 32.0)
    high = dimension_of(shape.get("beta_slow") or 1.0)
    if shape.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    waves = _wave_numbers(shape)
    frequencies = ramp / (factor * waves) + (1 - ramp) / waves
    return frequencies, _yarn_attention_factor(shape, factor)


def _yarn_attention_factor(shape: RopeShape, factor: float) -> float:
    explicit = shape.get("attention_factor")
    if explicit is not None:
        return explicit

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = shape.get("mscale"), shape.get("mscale_all_dim")
    if mscale and mscale_all:
        return temperature(mscale) / temperature(mscale_all)
    return temperature(1.0)


def _longrope(shape: RopeShape, max_model_len: int) -> tuple[Tensor, float]:
    original = shape.original_max_position_embeddings
    name = "long_factor" if max_model_len > original else "short_factor"
    factors = torch.tensor(shape.factors(name), dtype=torch.float32)
    scale = shape.get("factor") or shape.max_position_embeddings / original
    attention_factor = shape.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return 1.0 / (factors * _wave_numbers(shape)), attention_factor
