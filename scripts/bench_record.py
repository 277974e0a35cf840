"""Results as JSON lines: each is on disk at once, with what is needed to compare it later."""

import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def describe_run(commit: str | None) -> Result:
    """What every line of one run has in common: machine, versions, revision."""
    return {
        "device": _gpu_name() or platform.machine(),
        "torch": importlib.metadata.version("torch"),
        "triton": _version_or_none("triton"),
        "python": platform.python_version(),
        "commit": commit or _revision(),
    }


class Recorder:
    """Owns the file that results are appended to; None: they are only printed."""

    def __init__(self, path: Path | None, run: Result) -> None:
        self._path = path
        self._run = run
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, measure: str, figures: Result, *, model: str | None, round: int = 0) -> None:
        """Keep one measurement and print its figures."""
        row: Result = {"measure": measure, "model": model, "round": round}
        row |= figures
        row["date"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        row |= self._run
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        told = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        print(f"{model or 'machine'} {measure}: {told}", flush=True)


def read_rows(path: Path) -> list[Result]:
    """Every line of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _gpu_name() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip()


def _version_or_none(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit of this checkout, with a mark when files differ from it; None outside of git."""
    root = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=root, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
