"""``import frontend`` is cheap, and every public name can be had."""

import subprocess
import sys

import pytest

import frontend

HEAVY = ("torch", "transformers", "triton", "numpy", "zmq", "fastapi", "msgspec")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, frontend; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", frontend.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(frontend, name) is not None
    assert name in dir(frontend)


def test_all_public_names_together_load_no_model_library() -> None:
    code = (
        "import sys, frontend; [getattr(frontend, n) for n in frontend.__all__];"
        "print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        frontend.LMM  # noqa: B018


def test_one_class_has_two_names() -> None:
    assert frontend.AsyncLLM is frontend.AsyncLLMEngine
    assert frontend.AsyncEngineDeadError is frontend.EngineDeadError
