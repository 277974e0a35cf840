"""The command that compiles ahead: what it refuses, and that a list tells the next start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HF_CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "do_layer_norm_before": True,
    "torch_dtype": "bfloat16",
}


def run_command(model: Path, cache: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import sys; from frontend.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["compile-kernels", str(model), "--skip-tokenizer-init", "--load-format", "dummy"]
    return subprocess.run(
        [sys.executable, "-c", code, *words, *flags],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    return directory


@pytest.mark.slow
def test_everything_is_compiled_for_a_gpu_that_is_not_here_and_once(
    model: Path, tmp_path: Path
) -> None:
    flags = ("--target", "sm_90", "--enforce-eager", "--max-num-seqs", "4")

    first = run_command(model, tmp_path / "cache", *flags)
    assert first.returncode == 0, first.stderr
    (found,) = (tmp_path / "cache").glob("heliograph-*.json")
    entries = json.loads(found.read_text())["entries"]
    assert len(entries) > 5
    assert all((tmp_path / "cache" / entry).is_dir() for entry in entries)

    changed_ns = found.stat().st_mtime_ns
    again = run_command(model, tmp_path / "cache", *flags)
    assert again.returncode == 0, again.stderr
    assert found.stat().st_mtime_ns == changed_ns


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        pytest.param(("--device", "cpu"), "nothing to compile for a CPU", id="a CPU"),
        pytest.param((), "--device cuda", id="no GPU here, and none named"),
        pytest.param(("--target", "h200"), "--target must be like sm_90", id="a product's name"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_line(
    model: Path, tmp_path: Path, flags: tuple[str, ...], text: str
) -> None:
    done = run_command(model, tmp_path / "cache", *flags)

    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
