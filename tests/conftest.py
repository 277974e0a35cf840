"""Settings that must stand before torch or a kernel is imported anywhere in the run."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Interpret Triton kernels, unless tests that need a GPU were asked for.

    Triton reads the variable when a kernel's module is imported, so this cannot wait for a
    fixture. Nothing else notices: on the CPU the engine launches no kernel.
    """
    if "not gpu" in config.getoption("markexpr"):
        os.environ["TRITON_INTERPRET"] = "1"
