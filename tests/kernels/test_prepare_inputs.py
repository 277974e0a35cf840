"""A step's inputs from rows: both paths agree, and refuse what does not fit."""

import pytest
import torch

from kernels import prepare_inputs as prepare
from kernels.prepare_inputs import Draws, DrawTables, PackedInputs, Requests

NUM_ROWS, WIDTH, BLOCK_SIZE = 9, 640, 16
GARBAGE = -7


def make_tables() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 90_000, (NUM_ROWS, WIDTH), generator=generator).int()
    blocks = torch.randperm(NUM_ROWS * WIDTH // BLOCK_SIZE, generator=generator).int()
    return tokens, blocks.view(NUM_ROWS, -1)


def make_requests(rows: list[int], seq_lens: list[int], query_lens: list[int]) -> Requests:
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    return Requests(torch.tensor(rows).int(), torch.tensor(seq_lens).int(), starts.int())


def make_packed(num_tokens: int, num_requests: int, num_columns: int) -> PackedInputs:
    """Full of what must be overwritten, or left alone."""
    return PackedInputs(
        torch.full((num_tokens,), GARBAGE, dtype=torch.int32),
        torch.full((num_tokens,), GARBAGE),
        torch.full((num_tokens,), GARBAGE),
        torch.full((num_requests, num_columns), GARBAGE, dtype=torch.int32),
    )


def make_draw_tables() -> DrawTables:
    seeds = torch.arange(NUM_ROWS) * 2**60 - 3
    return DrawTables(torch.rand(6, NUM_ROWS), torch.stack((torch.arange(NUM_ROWS) + 5, seeds)))


def make_draws(num_requests: int) -> Draws:
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    return Draws(*(torch.zeros(num_requests, dtype=t) for t in (f32, f32, f32, i32, i64, i64)))


STEPS = [
    pytest.param([4, 0, 8], [17, 640, 1], [1, 1, 1], 3, id="decode"),
    pytest.param([2], [33], [1], 1, id="one row"),
    pytest.param([7, 8, 8, 8], [513, 1, 1, 1], [1, 1, 1, 1], 4, id="decode with padded places"),
    pytest.param([1, 6, 3], [600, 5, 64], [520, 5, 1], 544, id="prompts, padded tokens"),
    pytest.param([1, 8, 8], [20, 0, 0], [20, 0, 0], 300, id="requests without tokens"),
    pytest.param([5, 2], [16, 300], [16, 284], 300, id="a full block, nothing padded"),
]


@pytest.mark.parametrize(("rows", "seq_lens", "query_lens", "num_tokens"), STEPS)
@pytest.mark.parametrize("has_draws", [False, True])
def test_the_kernel_equals_the_definition(
    rows: list[int], seq_lens: list[int], query_lens: list[int], num_tokens: int, has_draws: bool
) -> None:
    tokens, blocks = make_tables()
    requests = make_requests(rows, seq_lens, query_lens)
    tables = make_draw_tables() if has_draws else None
    found = []
    for run in (prepare.prepare_inputs_reference, prepare.prepare_inputs_triton):
        packed = make_packed(num_tokens, len(rows), 40)
        draws = make_draws(len(rows)) if has_draws else None
        run(requests, tokens, blocks, packed, BLOCK_SIZE, tables, draws)
        found.append([*packed, *(draws or ())])

    for actual, expected in zip(found[1], found[0], strict=True):
        assert actual.equal(expected)
    assert GARBAGE not in found[1][0], "every token was written"


def test_the_definition_by_hand() -> None:
    tokens, blocks = make_tables()
    requests = make_requests([3, 6], [18, 2], [2, 1])
    packed, draws, tables = make_packed(5, 2, 4), make_draws(2), make_draw_tables()

    prepare.prepare_inputs(
        requests, tokens, blocks, packed, block_size=BLOCK_SIZE, tables=tables, draws=draws
    )

    assert packed.token_ids.tolist() == [*tokens[3, 16:18].tolist(), int(tokens[6, 1]), 0, 0]
    assert packed.positions.tolist() == [16, 17, 1, 0, 0]
    second, first = int(blocks[3, 1]), int(blocks[6, 0])
    assert packed.slot_mapping.tolist() == [second * 16, second * 16 + 1, first * 16 + 1, 0, 0]
    assert packed.block_table.tolist() == [
        [*blocks[3, :2].tolist(), GARBAGE, GARBAGE],
        [first, GARBAGE, GARBAGE, GARBAGE],
    ]
    assert draws.temperature.equal(tables.floats[0, [3, 6]])
    assert draws.min_p.equal(tables.floats[2, [3, 6]])
    assert draws.top_k.tolist() == [8, 11]
    assert draws.seeds.equal(tables.whole[1, [3, 6]])
    assert draws.positions.tolist() == [18, 2]


def test_what_does_not_fit_is_refused() -> None:
    tokens, blocks = make_tables()
    requests, packed = make_requests([3], [18], [2]), make_packed(2, 1, 4)

    def run(**changes: object) -> None:
        arguments = {"requests": requests, "tokens": tokens, "blocks": blocks, "packed": packed}
        prepare.prepare_inputs(**(arguments | {"block_size": 16} | changes))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="do not fit"):
        run(requests=requests._replace(rows=requests.rows[:0]))
    with pytest.raises(ValueError, match="tables do not fit"):
        run(blocks=blocks[:4])
    with pytest.raises(ValueError, match="int64"):
        run(tokens=tokens.long())
    with pytest.raises(ValueError, match="contiguous"):
        run(blocks=blocks[:, ::2])
    with pytest.raises(ValueError, match="both or none"):
        run(draws=make_draws(1))
    with pytest.raises(ValueError, match="draw's parameter"):
        run(draws=make_draws(2), tables=make_draw_tables())
    with pytest.raises(ValueError, match="float32"):
        run(draws=make_draws(1), tables=make_draw_tables()._replace(whole=torch.zeros(2, 9)))
    run()
