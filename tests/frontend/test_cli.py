"""The command ``heliograph``: nothing heavy is loaded, and errors are one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from frontend import __version__
from frontend.cli import COMMANDS, main
from ipc.errors import ExitCode

ROOT = Path(__file__).parents[2]


def test_version_and_help_answer_without_loading_anything() -> None:
    command = (
        "import sys; from frontend.cli import main; code = main(['--version']); main(['--help']);"
        "heavy = {'torch', 'transformers', 'fastapi', 'zmq'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"heliograph {__version__}" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)


def test_the_server_starts_without_torch_or_transformers() -> None:
    command = (
        "import sys, frontend.__main__, frontend.async_llm;"
        "sys.exit(str({'torch', 'transformers', 'triton'} & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""


def test_a_completion_is_begun_without_the_libraries_of_the_server() -> None:
    command = (
        "import sys; from frontend.cli import main;"
        "code = main(['complete', '--prompt', 'x', '--model', '/not/there']);"
        "heavy = {'torch', 'fastapi', 'pydantic', 'uvicorn', 'jinja2'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy or 'frontend.async_llm' not in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.CONFIG, done.stderr


@pytest.mark.parametrize("words", [[], ["fly"]], ids=["no command", "unknown command"])
def test_an_unknown_command_prints_the_usage_and_exits_with_two(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert "usage: heliograph COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        pytest.param(["serve", "--port", "70000"], "--port", id="serve"),
        pytest.param(["complete"], "--prompt", id="complete without prompt"),
        pytest.param(["complete", "x", "--temperature", "-1"], "--temperature", id="temperature"),
        pytest.param(["chat", "--url", "ftp://x"], "--url", id="chat"),
        pytest.param(["run-batch", "-i", "/no", "-o", "/no"], "--input-file", id="run-batch"),
    ],
)
def test_a_configuration_error_is_one_line_that_names_the_flag(
    words: list[str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(words) == 2
    (record,) = [r for r in caplog.records if r.name == "heliograph"]
    assert name in record.getMessage()
    assert "\n" not in record.getMessage()


def test_keys_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "keys"
    assert main(["keys", str(directory)]) == 0
    assert all(Path(line).is_file() for line in capsys.readouterr().out.splitlines())
    assert main(["keys", str(directory)]) == 2


def test_run_gives_a_program_its_arguments_and_misses_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "program.py"
    script.write_text("import sys, vllm\nprint(vllm.LLM.__module__, sys.argv[1:])\n")
    code = "import sys; from frontend.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", code, "run", str(script), "a", "--b"], cwd=ROOT, check=True
    )
    assert capfd.readouterr().out == "frontend.llm ['a', '--b']\n"
    assert main(["run", str(tmp_path / "none.py")]) == 2
    assert main(["run"]) == 2
    assert main(["run", "-m"]) == 2


def test_run_finds_a_module_of_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys, vllm\nprint(vllm.LLM.__module__, sys.argv[1:])"
    )
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}\n"
        "from frontend.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "-m", "program", "a", "--b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "frontend.llm ['a', '--b']\n"
