"""Linear layers: rows do not depend on their mates, and the ranks' shards make the whole."""

import pytest
import torch
from torch import Tensor

from executor.layers.cpu_linear import fixed_tiles, pack
from executor.layers.embedding import LMHead, VocabParallelEmbedding
from executor.layers.linear import (
    ColumnParallelLinear,
    GatedLinear,
    LayerFactory,
    Linear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from executor.loader.assign import Slot, WeightAssigner
from executor.loader.sources import MemorySource
from executor.models.interface import CheckpointNames
from executor.parallel import TensorParallel
from kernels.activation import SILU

CPU = torch.device("cpu")


class FakeTensorParallel(TensorParallel):
    """A rank of a group that does not exist: collectives return this rank's part alone."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor


def factory(rank: int = 0, size: int = 1, *, deterministic: bool = True) -> LayerFactory:
    method = UnquantizedLinearMethod(deterministic=deterministic)
    return LayerFactory(FakeTensorParallel(rank, size), torch.float32, method)


def fill(layer: torch.nn.Module, **weights: Tensor) -> None:
    assigner = WeightAssigner(layer, CheckpointNames(), {})
    for name, value in weights.items():
        assigner.fill(Slot(name, None), MemorySource(value))
    layer.finish_loading(CPU) if isinstance(layer, Linear) else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(640, 384), (384, 1024), (96, 32), (33, 7), (128, 2048)])
def test_a_row_does_not_depend_on_how_many_share_the_batch(
    n: int, k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    x = torch.randn(300, k).to(dtype)
    run = pack(weight, bias, deterministic=True)

    whole = run(x)
    torch.testing.assert_close(
        whole.float(),
        x.float() @ weight.float().T + bias.float(),
        atol=0.7 if dtype == torch.bfloat16 else 1e-3,
        rtol=1e-2,
    )
    for rows in [*range(1, 20), 31, 32, 33, 47, 63, 64, 65, 80, 128, 129, 257]:
        assert torch.equal(run(x[:rows]), whole[:rows]), f"{rows} rows"
    assert torch.equal(run(x[200:201]), whole[200:201])
    assert run(x[:0]).shape == (0, n)


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_fixed_tiles_always_multiply_the_same_number_of_rows(rows: int) -> None:
    seen: list[int] = []

    def run(x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return x * 2

    x = torch.randn(rows, 3)
    assert torch.equal(fixed_tiles(run, 4)(x), x * 2)
    assert set(seen) == {4}


@pytest.mark.parametrize("deterministic", [True, False])
def test_column_shards_lie_beside_each_other(deterministic: bool) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 8), torch.randn(24), torch.randn(5, 8)
    whole = x @ weight.T + bias
    parts = []
    for rank in (0, 1):
        layer = ColumnParallelLinear(
            8, [16, 8], factory(rank, 2, deterministic=deterministic), bias=True
        )
        fill(layer, weight=weight, bias=bias)
        parts.append(layer(x).split((8, 4), dim=-1))
    first, second = (torch.cat([p[i] for p in parts], dim=-1) for i in (0, 1))
    torch.testing.assert_close(torch.cat((first, second), dim=-1), whole)


@pytest.mark.parametrize("deterministic", [True, False])
def test_gated_shards_hold_matching_gate_and_up_features(deterministic: bool) -> None:
    torch.manual_seed(0)
    gate, up, x = torch.randn(16, 8), torch.randn(16, 8), torch.randn(5, 8)
    parts = []
    for rank in (0, 1):
        layer = GatedLinear(8, 16, SILU, factory(rank, 2, deterministic=deterministic))
        fill(layer, weight=torch.cat((gate, up)))
        parts.append(layer(x))
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(torch.cat(parts, dim=-1), expected)


def test_row_shards_add_up_with_one_bias() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(5, 8)
    total = torch.zeros(5, 6)
    for rank in (0, 1):
        layer = RowParallelLinear(8, 6, factory(rank, 2), bias=True)
        fill(layer, weight=weight, bias=bias)
        total += layer(x[:, rank * 4 : rank * 4 + 4])
    torch.testing.assert_close(total, x @ weight.T + bias)


def test_ranks_beyond_the_key_value_heads_hold_copies() -> None:
    head_dim, x = 4, torch.randn(3, 8)
    weight = torch.randn((4 + 2 + 2) * head_dim, 8)  # 4 query heads, 2 key and value heads
    q, k, v = (x @ weight.T).split((16, 8, 8), dim=-1)
    for rank in range(4):
        layer = QKVParallelLinear(8, 4, 2, head_dim, factory(rank, 4))
        fill(layer, weight=weight)
        own_q, own_k, own_v = layer(x).split(head_dim, dim=-1)
        head = slice(rank // 2 * head_dim, (rank // 2 + 1) * head_dim)
        torch.testing.assert_close(own_q, q[:, rank * head_dim : (rank + 1) * head_dim])
        torch.testing.assert_close(own_k, k[:, head])
        torch.testing.assert_close(own_v, v[:, head])


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_does_not_divide_is_padded_and_cut(tied: bool) -> None:
    torch.manual_seed(0)
    table, ids = torch.randn(7, 4), torch.tensor([0, 3, 4, 6, 2])
    hidden = torch.randn(3, 4)
    embedded, logits = torch.zeros(5, 4), []
    for rank in (0, 1):
        embedding = VocabParallelEmbedding(7, 4, factory(rank, 2))
        fill(embedding, weight=table)
        embedded += embedding(ids)
        head = LMHead(7, 4, factory(rank, 2), tied_to=embedding if tied else None)
        fill(head, **({} if tied else {"weight": table}))
        logits.append(head.run(hidden))
    torch.testing.assert_close(embedded, table[ids])
    torch.testing.assert_close(torch.cat(logits, dim=-1)[:, :7], hidden @ table.T)
    assert head(hidden).dtype == torch.float32


def test_a_layer_that_was_not_loaded_says_so() -> None:
    with pytest.raises(RuntimeError, match="before its weights were loaded"):
        ColumnParallelLinear(8, 8, factory())(torch.randn(1, 8))
