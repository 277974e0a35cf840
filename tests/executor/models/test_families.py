"""Every family against Hugging Face: a small random model, float32, on the CPU.

The prompt's logits in one chunk and in several, the continuation token by token, and 64 greedy
tokens must agree. Weights are made large enough that the logits are far from uniform.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.executor.forward_driver import Driver, load

REPOSITORY = Path(__file__).parents[3]
PROMPT = [3, 17, 42, 7, 99, 23, 5, 81, 64, 12, 77, 31, 2, 90, 55, 18, 44, 61, 9, 70, 33, 26, 88]
SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OPT_SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 48,
}
GPT2_SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
}

CASES = {
    "llama": ("Llama", SMALL),
    "llama with biases and tied embeddings": (
        "Llama",
        SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama with a head size of its own": ("Llama", SMALL | {"head_dim": 20}),
    "mistral with a window": ("Mistral", SMALL | {"sliding_window": 10}),
    "qwen2": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen2 with windows in the upper layers": (
        "Qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        SMALL | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20},
    ),
    "gemma3": (
        "Gemma3Text",
        SMALL
        | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20, "num_hidden_layers": 4}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    ),
    "phi3": ("Phi3", SMALL),
    "phi3 with a partial rotation and a window": (
        "Phi3",
        SMALL | {"partial_rotary_factor": 0.5, "sliding_window": 9},
    ),
    "opt": ("OPT", OPT_SMALL),
    "opt with norms after, and a smaller embedding": (
        "OPT",
        OPT_SMALL
        | {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2", GPT2_SMALL),
    "gpt2 scaled by layer": ("GPT2", GPT2_SMALL | {"scale_attn_by_inverse_layer_idx": True}),
}


def make_model(family: str, values: dict[str, Any]) -> Any:
    """A random Hugging Face model whose logits tell tokens apart."""
    torch.manual_seed(0)
    names = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    values = dict(values)
    if family == "Gemma3Text":
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    config = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, names.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # A tied head prefers the token it was given, unless the embedding is weak.
                is_embedding = "embed" in name or "wte" in name
                tied = is_embedding and config.tie_word_embeddings
                parameter.normal_(0.0, 0.03 if tied else 0.3 if is_embedding else 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_attn_implementation("eager")  # the only one that applies Gemma 2's soft cap
    return model.float().eval()


def hf_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


def hf_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_family_agrees_with_hugging_face(case: str, tmp_path: Path) -> None:
    family, values = CASES[case]
    reference = make_model(family, values)
    reference.save_pretrained(tmp_path)
    driver = Driver(load(tmp_path).model)

    expected = hf_logits(reference, PROMPT)
    torch.testing.assert_close(driver.prefill(PROMPT), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(driver.prefill(PROMPT, chunk=5), expected, atol=1e-4, rtol=1e-4)
    greedy = hf_greedy(reference, PROMPT, 64)
    assert len(set(greedy)) > 4, "the case proves little: the model repeats itself"
    assert driver.greedy(PROMPT, 64) == greedy


@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3", "opt", "gpt2", "phi3"])
def test_a_batch_gives_each_request_the_bits_it_gets_alone(case: str, tmp_path: Path) -> None:
    make_model(*CASES[case]).save_pretrained(tmp_path)
    driver = Driver(load(tmp_path).model)
    alone = [driver.prefill(PROMPT[:length])[-1] for length in (7, 23, 1)]

    sequences = [driver.add(PROMPT[:length]) for length in (7, 23, 1)]
    together = driver.step([(s, len(s.token_ids)) for s in sequences])
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(many[-1], one)


def test_the_bundled_model_reproduces_its_oracle() -> None:
    expected = json.loads((REPOSITORY / "tests/expected.json").read_text())
    driver = Driver(load(REPOSITORY / "scripts/demo_models/tiny").model, num_blocks=256)

    for case in expected["base"]:
        ids = driver.greedy(case["prompt_ids"], len(case["ids"]))
        driver.free += driver.sequences.pop().blocks
        assert ids == case["ids"], case["prompt"]


def test_gemma3_serves_the_text_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    _, values = CASES["gemma3"]
    values = values | {"layer_types": values["layer_types"][:4]}
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.Gemma3Config(
        text_config=values,
        vision_config=vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    reference = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    reference.save_pretrained(tmp_path)

    logits = Driver(load(tmp_path).model).prefill(PROMPT)
    torch.testing.assert_close(logits, hf_logits(reference, PROMPT), atol=1e-4, rtol=1e-4)
