"""A rank's place in its group: shares, replicated heads, and a group of one."""

import pytest
import torch

from executor.parallel import TensorParallel
from ipc.errors import ConfigError


def test_a_group_of_one_changes_nothing() -> None:
    tp, x = TensorParallel(), torch.randn(2, 3)
    assert tp.split(7) == 7
    assert tp.all_reduce(x) is x
    assert tp.all_gather(x, dim=-1) is x


def test_shares_must_be_even() -> None:
    assert TensorParallel(1, 4).split(12) == 3
    with pytest.raises(ConfigError, match="--tensor-parallel-size 4 does not divide 6"):
        TensorParallel(0, 4).split(6)


def test_fewer_key_value_heads_than_ranks_are_replicated() -> None:
    ranks = [TensorParallel(rank, 4) for rank in range(4)]
    assert [tp.split_kv_heads(2) for tp in ranks] == [1, 1, 1, 1]
    assert [tp.kv_head_start(2) for tp in ranks] == [0, 0, 1, 1]
    assert [tp.kv_head_start(8) for tp in ranks] == [0, 2, 4, 6]
    with pytest.raises(ConfigError, match="does not divide 3"):
        ranks[0].split_kv_heads(3)


def test_a_rank_outside_its_group_is_a_bug() -> None:
    with pytest.raises(ValueError, match="rank 2 is outside a group of 2"):
        TensorParallel(2, 2)
