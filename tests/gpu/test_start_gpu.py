"""Starts on a GPU: an empty cache is filled in parallel, and then nothing is compiled any more."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from executor.kernel_cache import list_path
from ipc.processes import child_environment
from tests.executor.configs import make_config

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "scripts" / "demo_models" / "tiny"

# A worker's start as its process makes it, and what Triton compiled in that process itself.
START = """
import json, sys
from pathlib import Path
from executor.early_start import EarlyStart
from tests.gpu.test_start_gpu import make_start_config
config = make_start_config()
early = EarlyStart(config, 0)
from triton import knobs
compiled = []
knobs.compilation.listener = lambda **said: compiled.append([said["src"].name, said["cache_hit"]])
from executor.worker import Worker
worker = Worker(config, 0)
ready = worker.start(lambda _: None, early=early)
while worker.do_idle_work():
    pass
print(json.dumps({"compiled": compiled, "phases": ready.phases_s}))
"""


def make_start_config() -> Any:
    from dataclasses import replace

    from ipc.config import DeviceConfig, ModelConfig

    return replace(
        make_config(num_gpu_blocks_override=300),
        model_config=ModelConfig(
            model="tiny",
            model_path=str(MODEL),
            hf_config=json.loads((MODEL / "config.json").read_text()),
            dtype="bfloat16",
            max_model_len=64,
        ),
        device_config=DeviceConfig("cuda"),
    )


def start(cache: Path) -> Any:
    result = subprocess.run(
        [sys.executable, "-c", START],
        env=child_environment() | {"TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    cache = tmp_path_factory.mktemp("triton")
    return cache, start(cache), start(cache)


def test_an_empty_cache_is_filled_by_other_processes_before_the_first_launch(
    starts: tuple[Path, Any, Any],
) -> None:
    _, cold, _ = starts

    assert "compiling kernels" in cold["phases"]
    assert [name for name, is_hit in cold["compiled"] if not is_hit] == []
    assert len(cold["compiled"]) > 10  # each was loaded from there


def test_what_the_start_launched_is_what_was_compiled_for_it(
    starts: tuple[Path, Any, Any],
) -> None:
    cache, *_ = starts
    from executor.cuda_driver import find_target

    path = list_path(make_start_config(), find_target(0), cache)
    entries = set(json.loads(path.read_text())["entries"])

    assert {entry.name for entry in cache.iterdir() if entry.is_dir()} == entries


def test_a_warm_start_compiles_nothing_and_waits_for_nobody(
    starts: tuple[Path, Any, Any],
) -> None:
    _, _, warm = starts

    assert "compiling kernels" not in warm["phases"]
    assert [name for name, is_hit in warm["compiled"] if not is_hit] == []
