"""The noise: the same on every path and in every version, and even in all its bits."""

import math

import pytest
import torch

from kernels import gumbel
from kernels.sampling_cpu import gumbel_noise_cpu

SEEDS = torch.tensor([0, 1, -5, 2**62 + 12345, 1])
POSITIONS = torch.tensor([0, 7, 2**31 - 1, 3, 0])
FIXED_BITS = [
    [1203204691, 555632835, 703942268],
    [220520209, 2006944601, 255569704],
    [782202890, 2467070235, 3027590934],
    [3535215052, 4071034769, 2369885149],
    [1348985532, 1930604977, 3675637380],
]


def test_noise_is_the_same_on_every_path() -> None:
    noise = gumbel.gumbel_noise_reference(SEEDS, POSITIONS, 1500)

    # Same integers, so the rest is one rounding of a logarithm.
    torch.testing.assert_close(gumbel_noise_cpu(SEEDS, POSITIONS, 1500), noise, rtol=0, atol=2e-6)
    triton_noise = gumbel.gumbel_noise_triton(SEEDS, POSITIONS, 1500)
    torch.testing.assert_close(triton_noise, noise, rtol=0, atol=2e-6)
    assert gumbel.gumbel_noise(SEEDS, POSITIONS, 1500).equal(
        gumbel_noise_cpu(SEEDS, POSITIONS, 1500)
    )


def test_noise_bits_do_not_change_between_versions() -> None:
    bits = gumbel.noise_bits_reference(SEEDS, POSITIONS, 3)

    assert bits.tolist() == FIXED_BITS


def test_noise_depends_on_every_bit_of_seed_position_and_token() -> None:
    base = gumbel.noise_bits_reference(torch.tensor([77]), torch.tensor([5]), 4096)[0]
    flipped = [
        gumbel.noise_bits_reference(torch.tensor([77 ^ (1 << i)]), torch.tensor([5]), 4096)[0]
        for i in range(63)
    ] + [
        gumbel.noise_bits_reference(torch.tensor([77]), torch.tensor([5 ^ (1 << i)]), 4096)[0]
        for i in range(31)
    ]
    for other in [*flipped, base.roll(1), base.roll(256)]:
        changed = (base ^ other)[:4096]
        share = torch.stack([(changed >> i & 1).double().mean() for i in range(32)])
        assert (share - 0.5).abs().max() < 0.05  # six standard deviations


def test_uniforms_are_even_and_never_touch_the_ends() -> None:
    noise = gumbel.gumbel_noise(torch.arange(40), torch.zeros(40, dtype=torch.int64), 25_000)
    uniforms = torch.exp(-torch.exp(-noise.double()))

    assert noise.isfinite().all()
    counts = torch.histc(uniforms, bins=100, min=0, max=1)
    expected = noise.numel() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 4 * math.sqrt(2 * 99)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    numbers = torch.arange(3)
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        gumbel.gumbel_noise(numbers, numbers[:1], 4)
    with pytest.raises(ValueError, match="int64"):
        gumbel.gumbel_noise(numbers.int(), numbers, 4)
