"""The list of compiled kernels: when a start may trust it, and what makes it another one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from executor.kernel_cache import Target, cache_directory, is_compiled, list_path, write_list
from ipc.config import EngineConfig
from ipc.errors import ConfigError
from tests.executor.configs import make_config

H200 = Target(90, 132)


def test_a_list_is_trusted_while_all_that_it_names_is_there(tmp_path: Path) -> None:
    path = list_path(make_config(), H200, tmp_path)
    assert not is_compiled(path)

    for entry in ("A", "B", "C"):
        (tmp_path / entry).mkdir()
    write_list(path, ["A", "B", "B"])
    assert is_compiled(path)

    (tmp_path / "C").rmdir()
    assert is_compiled(path)
    (tmp_path / "B").rmdir()
    assert not is_compiled(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"entries": 3}', "{}"])
def test_a_broken_list_says_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)

    assert not is_compiled(path)


def with_model(**values: object) -> Callable[[EngineConfig], EngineConfig]:
    return lambda c: replace(c, model_config=replace(c.model_config, **values))  # type: ignore[arg-type]


def with_scheduler(**values: object) -> Callable[[EngineConfig], EngineConfig]:
    return lambda c: replace(c, scheduler_config=replace(c.scheduler_config, **values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_model(dtype="bfloat16"), id="dtype"),
        pytest.param(with_model(hf_config={"hidden_size": 8}), id="shape"),
        pytest.param(with_model(enforce_eager=True), id="nothing recorded"),
        pytest.param(with_model(deterministic=False), id="deterministic"),
        pytest.param(with_scheduler(max_num_seqs=9), id="rows"),
    ],
)
def test_what_decides_kernels_decides_the_list(
    tmp_path: Path, change: Callable[[EngineConfig], EngineConfig]
) -> None:
    config = make_config()
    assert list_path(change(config), H200, tmp_path) != list_path(config, H200, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_model(model="elsewhere", model_path="/there"), id="where it lies"),
        pytest.param(with_model(seed=7, served_model_name="x"), id="names and seeds"),
        pytest.param(with_scheduler(policy="priority"), id="order of requests"),
    ],
)
def test_what_decides_no_kernel_leaves_the_list_as_it_is(
    tmp_path: Path, change: Callable[[EngineConfig], EngineConfig]
) -> None:
    config = make_config()
    assert list_path(change(config), H200, tmp_path) == list_path(config, H200, tmp_path)


def test_each_kind_of_gpu_has_its_own_list(tmp_path: Path) -> None:
    paths = {
        list_path(make_config(), t, tmp_path) for t in (H200, Target(90, 114), Target(80, 108))
    }
    assert len(paths) == 3


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({"TRITON_CACHE_DIR": "/c", "TRITON_HOME": "/h"}, Path("/c"), id="said"),
        pytest.param({"TRITON_HOME": "/h"}, Path("/h/.triton/cache"), id="another home"),
        pytest.param({}, Path.home() / ".triton" / "cache", id="home"),
    ],
)
def test_the_cache_is_where_triton_has_it(environment: dict[str, str], expected: Path) -> None:
    assert cache_directory(environment) == expected


def test_triton_agrees_on_where_its_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    for environment in ({}, {"TRITON_CACHE_DIR": "/c"}, {"TRITON_HOME": "/h"}):
        for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert cache_directory(environment) == Path(knobs.cache.dir)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("sm_90", H200), ("sm_90:114", Target(90, 114)), ("sm_75:40", Target(75, 40))],
)
def test_a_target_is_named_as_compilers_do(text: str, expected: Target) -> None:
    assert Target.parse(text) == expected
    assert Target.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["h100", "sm90", "sm_90:", "sm_75", ""])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--target"):
        Target.parse(text)
