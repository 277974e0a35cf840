"""Both ways of a CPU: the compiled functions, and torch's calls alone."""

import shutil

import pytest

from kernels import cpu_library


@pytest.fixture(
    params=[
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler"),
        ),
        "torch",
    ]
)
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test twice, once on each path; the value names it."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_library, "load", lambda: None)
    else:
        assert cpu_library.load() is not None, "there is a compiler, but no library"
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A kernel for a GPU is the same on both paths of a CPU: once is enough."""
    items[:] = [item for item in items if not _is_repeated(item)]


def _is_repeated(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    params = item.callspec.params
    run = params.get("run")
    return params.get("cpu_path") == "torch" and "triton" in getattr(run, "__name__", "")
