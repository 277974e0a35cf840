"""Drawing on a GPU at the sizes of real batches, against the definition on the same GPU."""

import math

import pytest
import torch
from torch import Tensor

from kernels import sampling
from kernels.sampling_cpu import Rows

pytestmark = pytest.mark.gpu

KINDS: dict[str, dict[str, list[float]]] = {
    "plain": {},
    "cold": {"temperature": [0.3, 0.7, 1.3, 0.0]},
    "top-k": {"top_k": [50, 1, 1024, 7]},
    "large top-k": {"top_k": [3000, 40_000, 2048, 1025]},
    "top-p": {"top_p": [0.9, 0.5, 0.05, 0.999]},
    "min-p": {"min_p": [0.05, 0.5, 1e-6, 1.0]},
    "top-k and top-p": {"top_k": [50, 20, 1000, 5000], "top_p": [0.9, 0.95, 0.5, 0.8]},
    "all": {"top_k": [50, 0, 900, 0], "top_p": [0.9, 0.7, 1.0, 0.99], "min_p": [0.1, 1e-4, 0, 0]},
}


def rows_of(num_rows: int, kind: dict[str, list[float]], seed: int) -> Rows:
    columns = {
        "temperature": torch.ones(num_rows),
        "top_k": torch.zeros(num_rows, dtype=torch.int32),
        "top_p": torch.ones(num_rows),
        "min_p": torch.zeros(num_rows),
        "seeds": torch.arange(num_rows) * 7919 + seed,
        "positions": torch.arange(num_rows) + 11,
    }
    for name, values in kind.items():
        column = torch.tensor(values, dtype=columns[name].dtype)
        columns[name] = column.repeat(-(-num_rows // len(values)))[:num_rows]
    return Rows(**{name: column.cuda() for name, column in columns.items()})


def make_logits(num_rows: int, vocab_size: int, spread: float) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(num_rows + vocab_size)
    return torch.randn(num_rows, vocab_size, device="cuda", generator=generator) * spread


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "spread"),
    [
        pytest.param(40, 151_936, 4.0, id="peaked"),
        pytest.param(40, 151_936, 0.5, id="flat"),
        pytest.param(9, 128_257, 3.0, id="odd vocabulary"),
        pytest.param(5, 262_208, 3.0, id="large vocabulary"),
        pytest.param(17, 32_000, 2.0, id="small vocabulary"),
    ],
)
def test_draws_equal_the_definition(
    kind: str, num_rows: int, vocab_size: int, spread: float
) -> None:
    logits = make_logits(num_rows, vocab_size, spread)
    rows = rows_of(num_rows, KINDS[kind], seed=5)

    sampled = sampling.sample(logits, **rows._asdict())

    assert sampled.token_ids.tolist() == sampling.sample_reference(logits, rows).tolist()
    assert not sampled.is_bad.any()


def test_many_rows_of_every_kind_at_once() -> None:
    num_rows, vocab_size = 512, 50_257
    logits = make_logits(num_rows, vocab_size, 3.0)
    logits[:, 100:400] = -torch.inf
    logits[::7] = logits[::7].round()  # ties
    logits[13, 5], logits[300], logits[511, -1] = math.nan, -torch.inf, math.nan
    kinds = [rows_of(num_rows, kind, seed=9) for kind in KINDS.values()]
    which = torch.arange(num_rows, device="cuda") % len(kinds)
    columns = [torch.stack(same) for same in zip(*kinds, strict=True)]
    rows = Rows(*(column.gather(0, which[None])[0] for column in columns))

    sampled = sampling.sample(logits, **rows._asdict())

    bad = sampling.is_bad_reference(logits)
    assert sampled.is_bad.equal(bad)
    alone = sampling.sample_reference(logits[~bad], Rows(*(column[~bad] for column in rows)))
    assert sampled.token_ids[~bad].equal(alone)
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < vocab_size)).all()
    again = sampling.sample(logits, **rows._asdict())
    assert again.token_ids.equal(sampled.token_ids)


def test_a_graph_serves_any_mix_of_rows() -> None:
    num_rows = 16
    logits = make_logits(num_rows, 151_936, 3.0)
    buffers = rows_of(num_rows, {}, seed=0)
    sampling.sample(logits, **buffers._asdict())  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = sampling.sample(logits, **buffers._asdict())

    for seed, kind in enumerate(KINDS.values()):
        rows = rows_of(num_rows, kind, seed)
        for buffer, column in zip(buffers, rows, strict=True):
            buffer.copy_(column)
        graph.replay()

        assert sampled.token_ids.equal(sampling.sample_reference(logits, rows))
