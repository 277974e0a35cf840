"""Programs written for vLLM run on Heliograph, in a process of their own; ours stays as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from frontend.compat import MODULES, VERSION
from tests.frontend.make_tokenizers import TINY

SCRIPTS = Path(__file__).parent / "compat_scripts"
ROOT = Path(__file__).resolve().parents[2]


def run_code(code: str, *, before: str = "from frontend.compat import install; install()") -> str:
    """Run a program and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_script(name: str, *arguments: str) -> list[str]:
    """Run one of the programs as ``heliograph run`` does; the lines it prints."""
    code = "import sys; from frontend.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_name_in_every_module_resolves() -> None:
    places = {module: sorted(names) for module, names in MODULES.items()}
    code = (
        "import importlib, json\n"
        f"places = json.loads({json.dumps(json.dumps(places))})\n"
        "for module, names in places.items():\n"
        "    loaded = importlib.import_module(module)\n"
        "    assert all(getattr(loaded, name) is not None for name in names), module\n"
        "    assert set(names) <= set(dir(loaded))\n"
        "print('torch' in __import__('sys').modules)"
    )
    assert run_code(code) == "False"


def test_names_are_our_objects() -> None:
    code = (
        "import vllm, vllm.config, frontend, ipc.config\n"
        "from vllm.usage.usage_lib import UsageContext\n"
        "from vllm.engine.async_llm_engine import AsyncLLMEngine\n"
        "from vllm.v1.engine.async_llm import AsyncLLM\n"
        "assert vllm.LLM is frontend.LLM and AsyncLLM is AsyncLLMEngine is frontend.AsyncLLM\n"
        "assert vllm.config.VllmConfig is ipc.config.EngineConfig\n"
        "assert UsageContext is frontend.UsageContext\n"
        "print(vllm.__version__)"
    )
    assert run_code(code) == VERSION


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("from vllm import Nonsense", "ImportError", ["'Nonsense'", "SamplingParams", "LLM"]),
        ("import vllm.attention", "ImportError", ["'attention'", "engine", "outputs"]),
        ("import vllm.attention.backends", "ImportError", ["'attention'"]),
        ("from vllm.utils import Nonsense", "ImportError", ["'Nonsense'", "random_uuid"]),
        ("import vllm; vllm.nonsense", "AttributeError", ["'nonsense'", "SamplingParams"]),
        ("import vllm; print(hasattr(vllm, 'nonsense')); 1 / 0", "ZeroDivisionError", []),
    ],
)
def test_unknown_names_say_what_exists(code: str, error: str, words: list[str]) -> None:
    wrapped = f"try:\n    {code}\nexcept Exception as err:\n    print(type(err).__name__, err)"
    output = run_code(wrapped)
    assert error in output
    assert all(word in output for word in words)


def test_an_installed_vllm_is_hidden_in_this_process_only(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("WHO = 'the real one'")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vllm"
    switch = "from frontend.compat import install, uninstall\n"
    assert run_code("print(vllm.WHO)", before=path) == "the real one"
    hidden = f"{path}\n{switch}install(); install(); import vllm; print(hasattr(vllm, 'WHO'))"
    assert run_code(hidden, before="") == "False"
    restored = f"{path}\n{switch}install(); uninstall(); import vllm; print(vllm.WHO)"
    assert run_code(restored, before="") == "the real one"


def test_a_script_is_run_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 5")
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, vllm, neighbour\n"
        "print(__name__, sys.argv[1:], neighbour.VALUE, vllm.SamplingParams(n=2).n)"
    )
    code = f"from frontend.compat import run_script; run_script({str(script)!r}, ['a', '-b'])"
    assert run_code(code, before="") == "__main__ ['a', '-b'] 5 2"


def test_the_server_can_be_run_as_a_module() -> None:
    code = (
        "from frontend.compat import run_module\n"
        "run_module('vllm.entrypoints.openai.api_server', ['--help'])"
    )
    output = run_code(code, before="")
    for flag in ("--model", "--max-num-seqs", "--port", "--api-key"):
        assert flag in output


def test_other_modules_have_no_program_of_their_own() -> None:
    code = (
        "from frontend.compat import run_module\n"
        "try:\n    run_module('vllm.utils')\nexcept ImportError as err:\n    print(err)"
    )
    assert "cannot be directly executed" in run_code(code, before="")


def test_a_program_that_steps_the_engine_runs_unchanged() -> None:
    flags = ["--model", str(TINY), "--dtype", "float32", "--max-num-seqs", "8"]
    lines = run_script("stepping.py", *flags)
    assert [line.split(":")[0] for line in lines] == ["0", "1", "2"]
    assert [line.split()[1] for line in lines] == ["1", "2", "1"]


def test_programs_for_batches_and_for_event_loops_run_unchanged_and_agree() -> None:
    offline = run_script("offline.py", str(TINY))
    assert len(offline) == 3
    assert offline[0].startswith("'def add(a, b):' -> ")
    assert run_script("streaming.py", str(TINY)) == offline[:2]
