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
