"""Drawn ids in the table and in the result: both paths agree."""

import pytest
import torch

from kernels import store_samples as store


@pytest.mark.parametrize("run", [store.store_samples_reference, store.store_samples_triton])
@pytest.mark.parametrize("num_requests", [0, 1, 5, 130])
def test_ids_land_behind_each_rows_last_token(run, num_requests: int) -> None:
    tokens = torch.full((num_requests + 2, 20), -1, dtype=torch.int32)
    rows = torch.arange(num_requests).flip(0).int()
    seq_lens = (torch.arange(num_requests) % 19).int()
    token_ids = torch.arange(num_requests) * 1001 + 3
    is_bad = torch.arange(num_requests) % 3 == 1
    out = torch.full((2, num_requests), -1, dtype=torch.int32)

    run(token_ids, is_bad, rows, seq_lens, tokens, out)

    for b in range(num_requests):
        assert int(tokens[rows[b], seq_lens[b]]) == int(token_ids[b])
    assert int((tokens >= 0).sum()) == num_requests, "nothing else was written"
    assert out.tolist() == [token_ids.tolist(), is_bad.int().tolist()]


def test_what_does_not_fit_is_refused() -> None:
    ids, bad, i32 = torch.zeros(3).long(), torch.zeros(3).bool(), torch.zeros(3).int()
    tokens, out = torch.zeros(4, 8).int(), torch.zeros(2, 3).int()

    with pytest.raises(ValueError, match="one entry"):
        store.store_samples(ids, bad, i32[:2], i32, tokens, out)
    with pytest.raises(ValueError, match="one entry"):
        store.store_samples(ids, bad, i32, i32, tokens, out[:1])
    with pytest.raises(ValueError, match="flags bool"):
        store.store_samples(ids, bad.int(), i32, i32, tokens, out)
    with pytest.raises(ValueError, match="are int32"):
        store.store_samples(ids, bad, i32.long(), i32, tokens, out)
    with pytest.raises(ValueError, match="contiguous"):
        store.store_samples(ids, bad, i32, i32, tokens[:, ::2], out)
    store.store_samples(ids, bad, i32, i32, tokens, out)
