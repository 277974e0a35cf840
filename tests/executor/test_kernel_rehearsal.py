"""Which kernels a start launches is found out, and compiled, without a GPU."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from executor.kernel_rehearsal import cut_short
from executor.model_config import ModelShape
from ipc.processes import child_environment
from tests.executor.rehearsed_kernels import COMPILED, HF_CONFIG


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    environment = {k: v for k, v in child_environment().items() if k != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rehearsed_kernels.py"))],
        env=environment | {"TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_rehearsal_meets_every_kind_of_step(report: Any) -> None:
    # Prompts, decode steps, cache, sampling with and without filters, edits, log-probabilities.
    expected = {
        "_prefill_kernel",
        "_decode_kernel",
        "_qkv_kernel",
        "_draw_kernel",
        "_penalties_kernel",
        "_token_bias_kernel",
        "_bitmask_kernel",
        "_prepare_kernel",
        "_store_samples_kernel",
    }
    assert expected <= set(report["found"])


def test_recorded_steps_are_rehearsed_unless_there_will_be_none(report: Any) -> None:
    assert "_store_samples_kernel" not in report["eager"]
    assert not Counter(report["eager"]) - Counter(report["found"])


def test_a_launch_finds_what_was_compiled_ahead(report: Any) -> None:
    names = [name for name, _ in report["hits"]]
    assert Counter(names) == Counter(report["chosen"])
    assert set(names) == COMPILED
    assert all(is_hit for _, is_hit in report["hits"])


def test_progress_counts_kernels_and_their_launchers(report: Any) -> None:
    total = report["num_entries"]
    assert total > len(report["chosen"]) + 1  # the driver's functions, and a launcher or more
    assert report["told"] == [[done, total] for done in range(total + 1)]


def test_a_model_is_cut_to_two_layers_of_each_kind() -> None:
    shape = ModelShape.from_hf(HF_CONFIG)
    assert cut_short(shape).num_layers == 2

    windows = (None, 64, 64, 64, None)
    shape = cut_short(dataclasses.replace(shape, sliding_windows=windows))
    assert shape.sliding_windows == (None, 64, 64, None)
    assert (shape.num_layers, len(shape.ropes)) == (4, 4)
