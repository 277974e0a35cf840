"""Any other causal language model of transformers, with its attention replaced by ours.

The Hugging Face module keeps its own code and is loaded by its own loader; transformers' attention
interface hands each layer's q, k and v to ``_paged_attention``, which stores k and v in the paged
cache and attends there. The step's packed tokens are a batch of one, told apart by position ids.
Dense layers multiply through our linear forms. One rank only: nothing here is sharded.

A trial run of two tokens, right after loading, finds what each layer caches, and refuses a model
that does not play along: one whose layers do not all attend through the interface (state spaces),
or whose logits come from the hidden states in a way unknown here.
Shapes: T packed tokens, N query heads, K key/value heads, D head size.
"""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from executor.attention_metadata import AttentionMetadata, KVCacheSpec, LayerKVCache
from executor.layers.cpu_linear import Run, fixed_tiles, pack
from executor.loader.assign import weights_bytes
from executor.model_config import ModelShape
from executor.models.interface import CheckpointNames, PackedModules
from executor.quantization.int8_dynamic import quantize, quantized_bytes
from ipc.config import INT8, ModelConfig
from ipc.errors import ConfigError, EngineStartError
from kernels.paged_attention import paged_attention
from kernels.store_kv_cache import store_kv_cache

_ATTENTION = "heliograph_paged"
_GPU_TILE = 64
# Options of attention functions that change the result and that ours does not have.
_UNKNOWN_OPTIONS = ("s_aux", "position_bias", "head_mask", "chunk_size")
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(slots=True)
class _Step:
    """What the attention of every layer is given, through the module's keyword arguments."""

    kv_caches: list[LayerKVCache]
    meta: AttentionMetadata | None  # None: the trial run, which only writes ``specs``
    is_deterministic: bool = False
    specs: dict[int, KVCacheSpec] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Form:
    """How dense layers multiply."""

    is_int8: bool
    is_deterministic: bool


class TransformersForCausalLM(nn.Module):
    """A Hugging Face model behind our interface."""

    packed_modules: ClassVar[PackedModules] = {}
    checkpoint_names: ClassVar[CheckpointNames] = CheckpointNames(prefixes=(), ignored=())

    def __init__(self, hf_model: Any, shape: ModelShape, form: _Form) -> None:
        super().__init__()
        self.hf_model = hf_model
        self._logit_scale = _logit_scale(shape)
        self._soft_cap = shape.final_soft_cap
        self._specs = self._try_out(shape)
        self.weights_bytes = weights_bytes(hf_model)
        self._is_deterministic = form.is_deterministic
        _replace_linears(hf_model, form)
        if hf_model.device.type == "cpu":  # packed copies have taken the dense weights' places
            self.weights_bytes = weights_bytes(hf_model)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: list[LayerKVCache],
        meta: AttentionMetadata,
    ) -> Tensor:
        """[T] and [T] -> final hidden states [T, H]."""
        return self._run(
            self.hf_model.base_model,
            token_ids,
            positions,
            _Step(kv_caches, meta, self._is_deterministic),
        )[0][0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32."""
        logits = self.hf_model.get_output_embeddings()(hidden).float() * self._logit_scale
        if self._soft_cap is None:
            return logits
        return torch.tanh(logits / self._soft_cap) * self._soft_cap

    def kv_cache_specs(self) -> list[KVCacheSpec]:
        """What each layer keeps per token, as the trial run saw it."""
        return self._specs

    def _run(self, module: Any, token_ids: Tensor, positions: Tensor, step: _Step) -> Any:
        return module(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            return_dict=False,
            paged_step=step,
        )

    def _try_out(self, shape: ModelShape) -> list[KVCacheSpec]:
        """Run two tokens without a cache; return each layer's spec."""
        device = self.hf_model.device
        token_ids = torch.tensor([1, 2], device=device) % shape.vocab_size
        positions = torch.arange(2, device=device)
        step = _Step([], None)
        name = shape.architecture
        try:
            with torch.inference_mode():
                logits = self._run(self.hf_model, token_ids, positions, step)[0][0]
                hidden = self._run(self.hf_model.base_model, token_ids, positions, step)[0][0]
                own = self.compute_logits(hidden)
        except TypeError as err:  # a keyword or an argument that its modules do not pass on
            raise ConfigError(f"{name} cannot run through transformers here: {err}") from err
        if sorted(step.specs) != list(range(shape.num_layers)):
            raise ConfigError(
                f"{name} is not supported: {len(step.specs)} of its {shape.num_layers} layers "
                f"attend through transformers' attention interface (is it a state-space model?)"
            )
        if not torch.allclose(own, logits.float(), rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"{name} is not supported: it makes its logits in a way that is not known here"
            )
        windows = tuple(step.windows[layer] for layer in range(shape.num_layers))
        if shape.hf_config.get("layer_types") and windows != shape.sliding_windows:
            raise ConfigError(
                f"{name} is not supported: its layers tell attention of windows {windows}, "
                f"its config of {shape.sliding_windows}"
            )
        return [step.specs[layer] for layer in range(shape.num_layers)]


def load_from_files(
    model_config: ModelConfig,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    use_safetensors: bool,
) -> TransformersForCausalLM:
    """Let transformers read the checkpoint, with whatever renaming its version needs.

    Raises:
        ConfigError: the model cannot run this way.
        EngineStartError: transformers could not load the checkpoint.
    """
    auto_model, config = _auto_model(model_config)
    try:
        hf_model = auto_model.from_pretrained(
            Path(model_config.model_path),
            config=config,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            trust_remote_code=model_config.trust_remote_code,
            code_revision=model_config.code_revision,
            local_files_only=True,
            use_safetensors=use_safetensors,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as err:
        raise EngineStartError(f"transformers cannot load {model_config.model}: {err}") from err
    return _wrap(hf_model.to(device), model_config, shape)


def make_random(
    model_config: ModelConfig, shape: ModelShape, dtype: torch.dtype, device: torch.device
) -> TransformersForCausalLM:
    """The model with the random weights that its own code makes from the configured seed."""
    auto_model, config = _auto_model(model_config)
    with torch.random.fork_rng():
        torch.manual_seed(model_config.seed)
        hf_model = auto_model.from_config(
            config,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            trust_remote_code=model_config.trust_remote_code,
        )
    return _wrap(hf_model.to(device), model_config, shape)


def _wrap(hf_model: Any, model_config: ModelConfig, shape: ModelShape) -> TransformersForCausalLM:
    if not getattr(hf_model, "_supports_attention_backend", False):
        raise ConfigError(
            f"{shape.architecture} is not supported: its code does not use transformers' "
            f"attention interface"
        )
    if "position_ids" not in inspect.signature(hf_model.base_model.forward).parameters:
        raise ConfigError(f"{shape.architecture} is not supported: it takes no position ids")
    form = _Form(model_config.quantization == INT8, bool(model_config.deterministic))
    return TransformersForCausalLM(hf_model.eval(), shape, form)


def check_supported(model_config: ModelConfig) -> None:
    """Refuse what is known not to work before anything is imported or read."""
    config = model_config.hf_config
    name = ", ".join(config.get("architectures") or [])
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{name} is an encoder-decoder model, which is not supported")
    strange = set(config.get("layer_types") or []) - _LAYER_TYPES
    if strange:
        raise ConfigError(f"{name} has layers of {', '.join(sorted(strange))}: not supported")
    if config.get("auto_map") and not model_config.trust_remote_code:
        raise ConfigError(
            f"{name} is defined by code in the model's own repository: "
            f"pass --trust-remote-code to run it"
        )


def _auto_model(model_config: ModelConfig) -> tuple[Any, Any]:
    """transformers' loader for causal models, and the config with our overrides in it."""
    import transformers  # takes seconds, and only this file needs it

    transformers.AttentionInterface.register(_ATTENTION, _paged_attention)
    hf_config = dict(model_config.hf_config)
    if model_config.code_path:
        return transformers.AutoModelForCausalLM, _config_of_code(model_config.code_path, hf_config)
    try:
        config = transformers.AutoConfig.from_pretrained(
            model_config.model_path,
            trust_remote_code=model_config.trust_remote_code,
            code_revision=model_config.code_revision,
            local_files_only=True,
        )
        config = type(config).from_dict(hf_config)
        config.name_or_path = model_config.model_path  # where the model's own code is looked for
    except (OSError, ValueError, KeyError) as err:
        raise ConfigError(f"transformers does not know {model_config.model}: {err}") from err
    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known and not model_config.trust_remote_code:
        raise ConfigError(f"{hf_config.get('architectures')} is not a causal language model")
    return transformers.AutoModelForCausalLM, config


def _config_of_code(code_path: str, hf_config: dict[str, Any]) -> Any:
    """The config, of the class in another revision's code; its model class becomes known too."""
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = json.loads((Path(code_path) / "config.json").read_text()).get("auto_map", {})
    missing = [name for name in ("AutoConfig", "AutoModelForCausalLM") if name not in places]
    if missing:
        raise ConfigError(f"--code-revision: {code_path} defines no {' and no '.join(missing)}")
    try:
        config_class = get_class_from_dynamic_module(places["AutoConfig"], code_path)
        model_class = get_class_from_dynamic_module(places["AutoModelForCausalLM"], code_path)
    except (OSError, ImportError, AttributeError) as err:
        raise ConfigError(f"--code-revision: the code in {code_path} fails: {err}") from err
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    hf_config.pop("auto_map", None)  # names the code beside the weights
    return config_class.from_dict(hf_config)


def _paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged_step: _Step,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, N, T, D] and [1, K, T, D] -> [1, T, N, D]."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    value_dim, head_dim = v.shape[-1], k.shape[-1]
    if value_dim < head_dim:  # one head size per cache: the rest is zero, and cut off again
        v = nn.functional.pad(v, (0, head_dim - value_dim))
    meta = paged_step.meta
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    if meta is None:
        _check_call(module, attention_mask, options)
        paged_step.specs[module.layer_idx] = KVCacheSpec(k.shape[1], head_dim)
        paged_step.windows[module.layer_idx] = window
        return torch.zeros_like(q)[None, ..., :value_dim], None
    cache = paged_step.kv_caches[module.layer_idx]
    store_kv_cache(k, v, cache.key, cache.value, meta.slot_mapping)
    out = paged_attention(
        q,
        cache.key,
        cache.value,
        block_table=meta.block_table,
        query_start_loc=meta.query_start_loc,
        seq_lens=meta.seq_lens,
        max_query_len=meta.max_query_len,
        max_seq_len=meta.max_seq_len,
        scale=head_dim**-0.5 if scaling is None else scaling,
        sliding_window=window,
        soft_cap=options.get("softcap"),
        memo=meta.memo,
        batch_invariant=paged_step.is_deterministic,
    )
    return out[None, ..., :value_dim], None


def _check_call(module: Any, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    """Refuse attention that is more than causal, windowed and soft-capped."""
    asked = [name for name in _UNKNOWN_OPTIONS if options.get(name) is not None]
    if attention_mask is not None:
        asked.append("attention_mask")
    if not (options.get("is_causal", True) and getattr(module, "is_causal", True)):
        asked.append("bidirectional attention")
    if asked:
        raise ConfigError(
            f"{type(module).__name__} of transformers needs {', '.join(asked)}, "
            f"which paged attention does not support"
        )


class _Dense(nn.Module):
    """Takes an ``nn.Linear``'s place; ``weight`` is left as a shape without memory."""

    def __init__(self, linear: nn.Linear, form: _Form) -> None:
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed_bytes = weight.nbytes
        if form.is_int8:
            self._run: Run = quantize(weight, bias)
            self.packed_bytes = quantized_bytes(weight)
        elif weight.device.type == "cpu":
            self._run = pack(weight, bias, deterministic=form.is_deterministic)
        else:
            dense: Run = lambda x: nn.functional.linear(x, weight, bias)  # noqa: E731
            self._run = fixed_tiles(dense, _GPU_TILE) if form.is_deterministic else dense
        self.weight = weight.to("meta")

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self._run(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


def _replace_linears(model: nn.Module, form: _Form) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, _Dense(child, form))


def _logit_scale(shape: ModelShape) -> float:
    """The factors that some families put between the head and the logits."""
    config = shape.hf_config
    scale = float(config.get("logit_scale") or 1.0)  # Cohere
    return scale / float(config.get("logits_scaling") or 1.0)  # Granite
