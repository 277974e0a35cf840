"""Copies by several threads: nothing is lost, nothing is torn, and a failure is told."""

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from executor.loader.copier import Copier, pieces

NUM_THREADS = 4


class PlainLane:
    """Copies at once, in pieces of a few bytes."""

    def __init__(self) -> None:
        self.is_finished = False
        self.thread = threading.get_ident()

    def copy(self, target: Tensor, values: Tensor) -> None:
        assert threading.get_ident() == self.thread, "a lane belongs to one thread"
        if values.numel() == 0:
            raise ValueError("the file is cut short")
        for target_piece, piece in pieces(target, values, 64):
            assert target_piece.numel() * target_piece.element_size() <= 64
            target_piece.copy_(piece)

    def finish(self) -> None:
        self.is_finished = True


@pytest.mark.parametrize(
    "shape", [(), (3,), (100,), (7, 5), (3, 100), (2, 3, 40), (1, 1)], ids=lambda shape: str(shape)
)
def test_pieces_cover_a_tensor_once(shape: Sequence[int]) -> None:
    values = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.int32).view(shape)
    target = torch.zeros(shape, dtype=torch.int32)

    for target_piece, piece in pieces(target, values, 64):
        assert target_piece.numel() * 4 <= 64
        target_piece += piece

    assert torch.equal(target, values)


def test_every_copy_is_there_when_the_context_is_left() -> None:
    lanes: list[PlainLane] = []

    def make_lane() -> PlainLane:
        lanes.append(PlainLane())
        return lanes[-1]

    sources = [torch.randn(n % 17 + 1, 9, dtype=torch.float32) for n in range(200)]
    # Every other one is a column range of something wider, and of another type.
    targets = [torch.zeros(len(s), 20, dtype=torch.bfloat16)[:, 3:12] for s in sources]
    with Copier(make_lane, NUM_THREADS) as copier:
        for target, source in zip(targets, sources, strict=True):
            copier.copy(target, source)

    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(torch.bfloat16))
    assert 1 <= len(lanes) <= NUM_THREADS
    assert all(lane.is_finished for lane in lanes)


def copy_with_a_broken_one(error: Exception | None) -> None:
    with Copier(PlainLane, NUM_THREADS) as copier:
        for n in range(100):
            copier.copy(torch.zeros(4), torch.zeros(0 if n == 50 else 4))
            if n == 50 and error is not None:
                raise error


def test_a_failed_copy_is_raised_and_no_thread_is_left() -> None:
    before = threading.active_count()

    with pytest.raises(ValueError, match="cut short"):
        copy_with_a_broken_one(None)

    assert threading.active_count() == before


def test_the_callers_own_failure_is_not_hidden() -> None:
    with pytest.raises(KeyError, match="nobody knows"):
        copy_with_a_broken_one(KeyError("a name that nobody knows"))
