"""The first steps, and the notice of what is compiled after them. CPU only."""

from types import SimpleNamespace

import pytest
from triton import knobs

from executor.warm_up import warm_up, watch_compilations
from tests.executor.builders import Rig


@pytest.mark.parametrize("is_thorough", [False, True])
@pytest.mark.parametrize("max_model_len", [64, 2, 1])
def test_the_first_steps_leave_rows_and_cache_as_they_were(
    is_thorough: bool, max_model_len: int
) -> None:
    rig = Rig(max_model_len=max_model_len)

    warm_up(
        rig.runner,
        num_tokens=100,
        max_model_len=max_model_len,
        max_num_seqs=8,
        block_size=8,
        is_thorough=is_thorough,
    )

    assert not rig.states.num_tokens.any()
    assert not rig.states.sampling.flags.any()
    assert rig.runner.num_steps == 0
    for layer in rig.kv_cache.layers:
        assert not layer.key[1:].any(), "only the null block was written"
        assert not layer.value[1:].any()


def test_compilations_are_told_but_not_what_the_disk_cache_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    others: list[bool] = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda **said: others.append(said["cache_hit"])
    )

    watch_compilations(told.append)
    for name, cache_hit in (("a", True), ("b", False)):
        listener = knobs.compilation.listener
        assert listener is not None
        listener(
            src=SimpleNamespace(name=name), metadata={}, metadata_group={}, times=None,
            cache_hit=cache_hit,
        )  # fmt: skip

    assert told == ["b"]
    assert others == [True, False], "whoever listened before still does"
