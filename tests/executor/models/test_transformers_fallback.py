"""Architectures without a file of their own, run through transformers with our attention."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from executor.parallel import TensorParallel
from ipc.errors import ConfigError
from tests.executor.forward_driver import Driver, load

PROMPT = [3, 17, 42, 7, 99, 23, 5, 81, 64, 12, 77, 31, 2, 90, 55, 18, 44]
SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CASES = {
    "granite, which scales its logits": ("Granite", SMALL | {"logits_scaling": 3.0}),
    "cohere, with layer norms and scaled logits": ("Cohere", SMALL | {"logit_scale": 0.5}),
    "mixtral, with experts": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "starcoder2, with a window": ("Starcoder2", SMALL | {"sliding_window": 8}),
    "gpt-neox, with fused weights": (
        "GPTNeoX",
        {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    ),
    "gemma, the first": ("Gemma", SMALL | {"head_dim": 16}),
}


def save_model(family: str, values: dict[str, Any], path: Path) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**values)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.05 if "embed" in name else 0.2)
    model.float().eval().save_pretrained(path)
    return model


@pytest.mark.parametrize("case", CASES)
def test_other_families_agree_with_hugging_face(case: str, tmp_path: Path) -> None:
    reference = save_model(*CASES[case], tmp_path)
    driver = Driver(load(tmp_path).model)

    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
        reference.generation_config.eos_token_id = None
        greedy = reference.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
        )[0, len(PROMPT) :].tolist()
    torch.testing.assert_close(driver.prefill(PROMPT), expected, atol=1e-4, rtol=1e-4)
    assert driver.greedy(PROMPT, 32, chunk=5) == greedy


def test_requests_of_one_step_do_not_see_each_other(tmp_path: Path) -> None:
    save_model(*CASES["granite, which scales its logits"], tmp_path)
    driver = Driver(load(tmp_path).model)
    alone = [driver.prefill(PROMPT[:n]) for n in (5, 17, 1)]

    sequences = [driver.add(PROMPT[:n]) for n in (5, 17, 1)]
    together = driver.step([(s, len(s.token_ids)) for s in sequences])
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)


def test_dummy_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    save_model(*CASES["granite, which scales its logits"], tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    first, again, other = (
        Driver(load(tmp_path, "dummy", seed=seed).model).prefill(PROMPT) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=101, d_model=16, num_layers=1, num_heads=2, architectures=["T5Model"]
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        load(tmp_path, "dummy", hf_overrides={"num_hidden_layers": 1, "is_encoder_decoder": True})


def test_a_state_space_model_is_refused(tmp_path: Path) -> None:
    values = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    config = transformers.MambaConfig(**values, architectures=["MambaForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not supported"):
        load(tmp_path, "dummy", hf_overrides={"num_attention_heads": 1})


def test_attention_sinks_are_refused_not_ignored(tmp_path: Path) -> None:
    values = SMALL | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(**values, architectures=["GptOssForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="s_aux"):
        load(tmp_path, "dummy")


def test_chunked_attention_is_refused_not_ignored(tmp_path: Path) -> None:
    save_model(*CASES["granite, which scales its logits"], tmp_path)
    overrides = {"layer_types": ["chunked_attention", "full_attention"]}
    with pytest.raises(ConfigError, match="chunked_attention"):
        load(tmp_path, "dummy", hf_overrides=overrides)


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    save_model(*CASES["granite, which scales its logits"], tmp_path)
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2"):
        load(tmp_path, tp=TensorParallel(0, 2))


def test_code_in_the_repository_needs_permission(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SMALL, architectures=["MyForCausalLM"]).save_pretrained(tmp_path)
    overrides = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.MyForCausalLM"}}
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load(tmp_path, "dummy", hf_overrides=overrides)


OWN_CODE = """
from transformers import GraniteConfig, GraniteForCausalLM

class MyConfig(GraniteConfig):
    model_type = "mine"

class MyForCausalLM(GraniteForCausalLM):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.revision = {revision!r}
"""


def save_own_code(path: Path, revision: str) -> None:
    """A checkpoint's files but the weights, with a module that knows its revision."""
    path.mkdir(exist_ok=True)
    places = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyForCausalLM"}
    config = SMALL | {
        "model_type": "mine", "architectures": ["MyForCausalLM"], "auto_map": places
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text(OWN_CODE.format(revision=revision))


def test_code_of_another_revision_takes_the_place_of_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    save_own_code(tmp_path / "weights", "one")
    save_own_code(tmp_path / "code", "two")

    def revision(**changes: Any) -> str:
        options = {"trust_remote_code": True} | changes
        model: Any = load(tmp_path / "weights", "dummy", **options).model
        return str(model.hf_model.revision)

    assert revision() == "one"
    assert revision(code_path=str(tmp_path / "code")) == "two"
    (tmp_path / "code" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="defines no AutoConfig and no AutoModelForCausalLM"):
        revision(code_path=str(tmp_path / "code"))
