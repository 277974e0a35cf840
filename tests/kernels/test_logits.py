"""Changes to logits: the definitions on values worked out by hand, then both paths against them."""

import pytest
import torch

from kernels import logits as module
from tests.kernels.cases import assert_close, random


def penalty_inputs(B: int, V: int) -> tuple[torch.Tensor, ...]:
    counts = (random(B, V, seed=1) * 2).clamp(min=0).int()
    prompt_mask = random(B, V, seed=2) > 1
    return (
        counts,
        prompt_mask,
        random(B, seed=3),
        random(B, seed=4),
        random(B, seed=5).exp(),
    )


def random_bitmask(R: int, V: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(V)
    return torch.randint(-(2**31), 2**31, (R, -(-V // 32)), generator=generator).int()


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    counts = torch.tensor([[3, 0, 0, 1, 0]], dtype=torch.int32)
    prompt = torch.tensor([[False, True, True, False, False]])

    module.apply_penalties(
        logits, counts, prompt, torch.tensor([0.5]), torch.tensor([0.1]), torch.tensor([2.0])
    )

    # Repetition for the first four; presence and frequency for the two of the output.
    expected = [2 / 2 - 0.3 - 0.5, -2 * 2, 2 / 2, -2 * 2 - 0.1 - 0.5, 1]
    assert_close(logits, torch.tensor([expected]))


@pytest.mark.parametrize(("B", "V"), [(3, 1500), (1, 33), (0, 8)])
def test_penalty_kernel_equals_definition(B: int, V: int) -> None:
    inputs = penalty_inputs(B, V)
    logits = random(B, V) * 5
    logits[:, 0] = -torch.inf
    expected = logits.clone()

    module.apply_penalties_triton(logits, *inputs)

    module.apply_penalties_reference(expected, *inputs)
    assert_close(logits, expected)


@pytest.mark.parametrize("run", [module.apply_token_bias_cpu, module.apply_token_bias_triton])
def test_bias_adds_up_and_bans(run) -> None:
    logits = random(3, 200)
    expected = logits.clone()
    rows = torch.tensor([0, 2, 2, 1, 1])
    token_ids = torch.tensor([199, 5, 5, 0, 7])
    values = torch.tensor([1.5, -2.0, 0.25, -torch.inf, 100.0])

    run(logits, rows, token_ids, values)
    run(logits, rows[:0], token_ids[:0], values[:0])

    module.apply_token_bias_reference(expected, rows, token_ids, values)
    assert_close(logits, expected)
    assert logits[1, 0] == -torch.inf


@pytest.mark.parametrize(
    "run",
    [module.apply_bitmask_reference, module.apply_bitmask_cpu, module.apply_bitmask_triton],
)
def test_bitmask_by_hand(run) -> None:
    logits = torch.zeros(3, 34)
    bitmask = torch.tensor([[1 | -(2**31), 2]], dtype=torch.int64).int()  # tokens 0, 31 and 33

    run(logits, torch.tensor([1]), bitmask)

    assert logits[1].isfinite().nonzero().squeeze(1).tolist() == [0, 31, 33]
    assert not logits[0].any()
    assert not logits[2].any()


@pytest.mark.parametrize("run", [module.apply_bitmask_cpu, module.apply_bitmask_triton])
@pytest.mark.parametrize("V", [1, 64, 1500])
def test_bitmask_equals_definition(run, V: int) -> None:
    logits = random(4, V)
    expected = logits.clone()
    rows, bitmask = torch.tensor([3, 0]), random_bitmask(2, V)

    run(logits, rows, bitmask)
    run(logits, rows[:0], bitmask[:0])

    module.apply_bitmask_reference(expected, rows, bitmask)
    assert logits.equal(expected)


@pytest.mark.parametrize("run", [module.has_nan, module.has_nan_triton])
def test_nan_is_found_in_its_row_and_infinity_is_none(run) -> None:
    logits = random(4, 5000)
    logits[1, 4999] = torch.nan
    logits[2] = -torch.inf
    logits[3, 0] = torch.inf

    found = run(logits)

    assert found.equal(module.has_nan_reference(logits))
    assert found.tolist() == [False, True, False, False]
    assert run(logits[:0]).shape == (0,)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    x, ids, values = random(2, 40), torch.tensor([0, 1]), random(2)
    counts, mask = torch.zeros(2, 40, dtype=torch.int32), torch.zeros(2, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[B, V\] float32"):
        module.has_nan(x.half())
    with pytest.raises(ValueError, match="contiguous"):
        module.has_nan(random(40, 2).t())
    with pytest.raises(ValueError, match="shapes differ"):
        module.apply_penalties(x, counts[:1], mask, values, values, values)
    with pytest.raises(ValueError, match="int32 and prompt_mask bool"):
        module.apply_penalties(x, counts.long(), mask, values, values, values)
    with pytest.raises(ValueError, match="penalty"):
        module.apply_penalties(x, counts, mask, values, values, values.double())
    with pytest.raises(ValueError, match=r"\[E\]"):
        module.apply_token_bias(x, ids, ids[:1], values)
    with pytest.raises(ValueError, match="int64"):
        module.apply_token_bias(x, ids.int(), ids, values)
    with pytest.raises(ValueError, match="float32"):
        module.apply_token_bias(x, ids, ids, values.double())
    with pytest.raises(ValueError, match="ceil"):
        module.apply_bitmask(x, ids, random_bitmask(2, 20))
    with pytest.raises(ValueError, match="bitmask int32"):
        module.apply_bitmask(x, ids, random_bitmask(2, 40).long())
