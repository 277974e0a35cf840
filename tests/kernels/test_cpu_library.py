"""How the CPU's compiled functions come to be, and what happens where they cannot."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from kernels import cpu_library
from kernels.cpu_library import library_for

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has not loaded anything yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_library, "load", cpu_library.load.__wrapped__)
    return tmp_path / "heliograph"


def runtimes() -> set[str]:
    """The OpenMP libraries that this process has mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if "libgomp" in line}


def fake_compiler(directory: Path, script: str) -> None:
    directory.mkdir()
    path = directory / "gcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@needs_compiler
def test_it_is_compiled_once_and_nothing_else_is_left(cache: Path) -> None:
    assert cpu_library.load() is not None
    (built,) = cache.iterdir()
    before = built.stat().st_mtime_ns, built.stat().st_ino

    assert cpu_library.load() is not None

    assert list(cache.iterdir()) == [built]
    assert (built.stat().st_mtime_ns, built.stat().st_ino) == before


@needs_compiler
def test_it_shares_the_threads_of_torch(cache: Path) -> None:
    before = runtimes()
    assert any("torch" in path for path in before)
    assert cpu_library.load() is not None
    assert runtimes() == before


def test_without_a_compiler_there_is_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert cpu_library.load() is None
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_is_told_with_its_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_compiler(tmp_path / "bin", "echo 'no such target' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    assert cpu_library.load() is None

    assert "no such target" in caplog.text
    assert list(cache.iterdir()) == []


def test_what_others_could_have_written_is_not_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_compiler(tmp_path / "bin", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    cache.mkdir()
    cache.chmod(0o777)

    assert cpu_library.load() is None

    assert "can be written by others" in caplog.text


def test_only_bfloat16_has_functions(cpu_path: str) -> None:
    narrow, wide = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    assert library_for(narrow, wide) is None
    assert (library_for(narrow, None) is not None) == (cpu_path == "compiled")
