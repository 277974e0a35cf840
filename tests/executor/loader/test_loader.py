"""Loading: every form of checkpoint, its faults by name, shards, dummies and digests."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.layers.linear import LayerFactory, UnquantizedLinearMethod
from executor.loader.assign import WeightAssigner
from executor.loader.checkpoint import open_checkpoint
from executor.loader.loader import fill_with_dummies, load_model
from executor.model_config import ModelShape
from executor.models.llama import LlamaForCausalLM
from executor.parallel import TensorParallel
from ipc.config import LoadConfig
from ipc.errors import ConfigError, EngineStartError
from tests.executor.forward_driver import Driver, load, model_config

PROMPT = [3, 17, 42, 7, 9, 23, 5]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def make_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {"model.embed_tokens.weight": random(51, 32), "lm_head.weight": random(51, 32)}
    weights["model.norm.weight"] = 1 + random(32)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in [
            ("self_attn.q_proj", 32, 32),
            ("self_attn.k_proj", 16, 32),
            ("self_attn.v_proj", 16, 32),
            ("self_attn.o_proj", 32, 32),
            ("mlp.gate_proj", 48, 32),
            ("mlp.up_proj", 48, 32),
            ("mlp.down_proj", 32, 48),
        ]:
            weights[f"{prefix}{name}.weight"] = random(rows, columns)
        weights[f"{prefix}input_layernorm.weight"] = 1 + random(32)
        weights[f"{prefix}post_attention_layernorm.weight"] = 1 + random(32)
    return weights


def make_checkpoint(path: Path, form: str = "safetensors") -> dict[str, Tensor]:
    """A Llama in one file, in two with an index, or pickled."""
    weights = make_weights()
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    if form == "safetensors":
        save_file(weights, path / "model.safetensors")
    elif form == "pt":
        torch.save(weights, path / "pytorch_model.bin")
    else:
        names = sorted(weights)
        files = {n: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, n in enumerate(names)}
        for file in set(files.values()):
            save_file({n: weights[n] for n in names if files[n] == file}, path / file)
        index = {"metadata": {}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def logits_of(path: Path, load_format: str = "auto", **changes: Any) -> Tensor:
    return Driver(load(path, load_format, **changes).model).prefill(PROMPT)


@pytest.mark.parametrize(
    ("form", "load_format"),
    [
        pytest.param("sharded", "auto", id="shards with an index"),
        pytest.param("sharded", "safetensors", id="shards, by name"),
        pytest.param("pt", "auto", id="pickled, found automatically"),
        pytest.param("pt", "pt", id="pickled, by name"),
        pytest.param("pt", "npcache", id="numpy cache"),
    ],
)
def test_every_form_gives_the_same_model(form: str, load_format: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one")
    make_checkpoint(tmp_path / "other", form)
    assert torch.equal(logits_of(tmp_path / "one"), logits_of(tmp_path / "other", load_format))


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert logits_of(tmp_path).isfinite().all()
    with pytest.raises(EngineStartError, match=r"pytorch_model\.bin"):
        load(tmp_path, "pt")


def test_options_that_no_loader_takes_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"--model-loader-extra-config.*got turbo"):
        load_model(
            model_config(tmp_path),
            LoadConfig(model_loader_extra_config={"turbo": True}),
            device=torch.device("cpu"),
            tp=TensorParallel(),
            on_progress=lambda *_: None,
        )


@pytest.mark.parametrize("load_format", ["safetensors", "pt", "auto", "npcache"])
def test_a_form_that_is_not_there_is_an_error(load_format: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=f"--load-format {load_format}"):
        load(tmp_path, load_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numpy_cache_serves_later_loads_without_the_pickle(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = make_checkpoint(tmp_path, "pt")
    pickle = tmp_path / "pytorch_model.bin"
    torch.save({name: value.to(dtype) for name, value in weights.items()}, pickle)
    first = logits_of(tmp_path, "npcache")
    pickle.unlink()
    assert torch.equal(logits_of(tmp_path, "npcache"), first)


def test_the_numpy_cache_of_another_checkpoint_is_replaced(tmp_path: Path) -> None:
    weights = make_checkpoint(tmp_path, "pt")
    before = logits_of(tmp_path, "npcache")
    doubled = {name: value.double() * 2 for name, value in weights.items()}
    torch.save(doubled, tmp_path / "pytorch_model.bin")
    after = logits_of(tmp_path, "npcache")
    assert not torch.equal(before, after)
    assert torch.equal(after, logits_of(tmp_path, "pt"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "pt")
    torch.save({"model.norm.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EngineStartError, match=r"pytorch_model\.bin"):
        load(tmp_path)


class _Canary:
    """Leaves a mark when it is unpickled without restraint."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "inside state_dict"])
@pytest.mark.parametrize("load_format", ["auto", "pt", "npcache"])
def test_the_canary_in_a_pickle_stays_silent(form: str, load_format: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "pt")
    mark = tmp_path / "canary-ran"
    state: dict[str, Any] = {"model.norm.weight": torch.ones(32), "x": _Canary(mark)}
    file = tmp_path / "pytorch_model.bin"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        content = {"state_dict": state} if form == "inside state_dict" else state
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(EngineStartError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path, LoadConfig(load_format=load_format))
    assert not mark.exists()
    with contextlib.suppress(Exception):  # and it would sing
        torch.load(file, weights_only=False)
    assert mark.exists()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.eye(3).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.eye(3).to_sparse_csr(), id="compressed rows"),
        pytest.param(lambda: torch.empty(3, device="meta"), id="without values"),
    ],
)
def test_a_tensor_that_is_not_plain_is_refused(make: Callable[[], Tensor], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "pt")
    torch.save({"model.norm.weight": make()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EngineStartError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path, LoadConfig())


@pytest.mark.parametrize("file", ["../model.bin", "/etc/passwd", "a/b.safetensors", "..", "", "\0"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_it_only(index: str, file: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "model.bin")
    (tmp_path / "m" / index).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(EngineStartError, match="not a file beside it"):
        open_checkpoint(tmp_path / "m", LoadConfig())


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param({"files": {}, "tensors": {"a": ["../out.npy", "float32"]}}, id="outside"),
        pytest.param({"files": {}, "tensors": {"a": ["object.npy", "object"]}}, id="objects"),
        pytest.param({"files": {}, "tensors": 5}, id="no table"),
    ],
)
def test_a_hostile_numpy_cache_is_refused(manifest: dict[str, Any], tmp_path: Path) -> None:
    directory = tmp_path / "m"
    cache = directory / "np-cache" / "m"
    cache.mkdir(parents=True)
    mark = tmp_path / "canary-ran"
    np.save(cache.parent / "out.npy", np.ones(3))
    np.save(cache / "object.npy", np.array([_Canary(mark)], dtype=object), allow_pickle=True)
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineStartError, match="numpy cache"):
        open_checkpoint(directory, LoadConfig(load_format="npcache"))
    assert not mark.exists()


def spoil(path: Path, weights: dict[str, Tensor], fault: str) -> None:
    file = path / "model.safetensors"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "garbage":
        file.write_bytes(b"\x10" * 1000)
    elif fault == "missing":
        del weights["model.layers.1.self_attn.k_proj.weight"]
    elif fault == "unexpected":
        weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    elif fault == "shape":
        weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 31)
    elif fault == "twice":
        weights["model.layers.0.self_attn.qkv_proj.weight"] = torch.ones(64, 32)
    if fault not in ("truncated", "garbage"):
        save_file(weights, file)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", r"model\.safetensors"),
        ("garbage", r"model\.safetensors"),
        ("missing", r"layers\.1\.self_attn\.qkv_proj\.weight \(part 2\) is missing"),
        ("unexpected", r"model\.layers\.0\.self_attn\.q_norm\.weight is unexpected"),
        ("shape", r"up_proj\.weight has shape \[48, 31\], expected \[48, 32\]"),
        ("twice", r"a second time"),
    ],
)
def test_a_broken_checkpoint_is_an_error_that_names_what_is_wrong(
    fault: str, message: str, tmp_path: Path
) -> None:
    weights = make_checkpoint(tmp_path)
    spoil(tmp_path, weights, fault)
    with pytest.raises(EngineStartError, match=message):
        load(tmp_path)


def test_an_index_that_lists_a_missing_file_is_an_error(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "sharded")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(EngineStartError, match=r"model-00002-of-00002\.safetensors"):
        load(tmp_path)


def test_an_index_that_lists_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "sharded")
    file = tmp_path / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(EngineStartError, match=name):
        load(tmp_path)


def test_a_head_repeated_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tied = load(tmp_path, hf_overrides={"tie_word_embeddings": True}).model
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert not torch.equal(Driver(tied).prefill(PROMPT), logits_of(tmp_path))


def test_loading_imports_no_sympy_for_it_takes_most_of_a_second(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    command = (
        "import sys; from pathlib import Path; from tests.executor.forward_driver import load;"
        "load(Path(sys.argv[1])); load(Path(sys.argv[1]), 'dummy');"
        "sys.exit('sympy' in sys.modules)"
    )
    arguments = [sys.executable, "-c", command, str(tmp_path)]
    subprocess.run(arguments, cwd=Path(__file__).parents[3], check=True)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    seen: list[tuple[str, int, int]] = []
    load_model(
        model_config(tmp_path),
        LoadConfig(),
        device=torch.device("cpu"),
        tp=TensorParallel(),
        on_progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert [stage for stage, _, _ in seen] == ["weights"] * len(make_weights())
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]


def test_the_digest_names_the_checkpoint_not_the_rank(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    whole = load(tmp_path)
    shard = load(tmp_path, tp=TensorParallel(1, 2))
    assert whole.digest == shard.digest
    assert shard.weights_bytes < whole.weights_bytes
    assert load(tmp_path, hf_overrides={"rope_theta": 7.0}).digest != whole.digest
    assert len(whole.digest) == 64


def test_dummy_weights_need_no_file_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first, again, other = (logits_of(tmp_path, "dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() > 0


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_two_ranks_hold_the_two_halves_of_the_whole(load_format: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    whole = _raw_parameters(tmp_path, load_format, TensorParallel())
    halves = [_raw_parameters(tmp_path, load_format, TensorParallel(r, 2)) for r in (0, 1)]

    for name, value in whole.items():
        parts = [half[name] for half in halves]
        if "o_proj" in name or "down_proj" in name:
            assert torch.equal(torch.cat(parts, dim=1), value), name
        elif "norm" in name:
            assert torch.equal(parts[0], value), name
        elif "qkv_proj" in name or "gate_up_proj" in name:
            sizes = (32, 16, 16) if "qkv" in name else (48, 48)
            split = [part.split([size // 2 for size in sizes]) for part in parts]
            joined = [torch.cat(pair) for pair in zip(*split, strict=True)]
            assert torch.equal(torch.cat(joined), value), name
        else:  # the vocabulary of 51 is padded to 52
            assert torch.equal(torch.cat(parts)[:51], value), name
            assert not torch.cat(parts)[51:].any(), name


def _raw_parameters(path: Path, load_format: str, tp: TensorParallel) -> dict[str, Tensor]:
    """A rank's parameters as the loader fills them, before any is packed."""
    method = UnquantizedLinearMethod()
    model = LlamaForCausalLM(ModelShape.from_hf(CONFIG), LayerFactory(tp, torch.float32, method))
    assigner = WeightAssigner(model, model.checkpoint_names, model.packed_modules)
    if load_format == "dummy":
        fill_with_dummies(assigner, 0, torch.device("cpu"), lambda stage, done, total: None)
    else:
        assigner.fill_all(open_checkpoint(path, LoadConfig()).tensors, lambda name: None)
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"quantization": "awq"}, id="by flag"),
        pytest.param(
            {"hf_overrides": {"quantization_config": {"quant_method": "awq"}}}, id="by config"
        ),
    ],
)
def test_a_quantized_checkpoint_is_refused_by_name(changes: dict[str, Any], tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="--quantization awq"):
        load(tmp_path, **changes)
