"""The shape of a model, read from its checkpoint's config.json.

One vocabulary for every family: ``ModelShape`` holds total counts (layers split them by rank), one
rotary shape and one sliding window per layer, and the switches that differ between families. The
defaults below are those that each family's own configuration class fills in when a key is absent.
Knows no tensors and reads no files: its input is the parsed config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ipc.errors import ConfigError

# What a family assumes where its config.json is silent. Keys of the older spellings included.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": {"tie_word_embeddings": False, "attention_bias": True, "max_window_layers": 28},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 128, "max_window_layers": 28},
    "phi3": {"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "gemma2": {
        "tie_word_embeddings": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "opt": {"tie_word_embeddings": True, "activation_function": "relu"},
    "gpt2": {
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
}

# Our name -> the keys that families use for it, first hit wins.
_ALIASES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "activation": ("hidden_activation", "hidden_act", "activation_function"),
}

_MAX_COUNT = 1 << 24  # layers, heads, hidden size, vocabulary
_NO_WINDOW_FAMILIES = ("llama", "opt", "gpt2")  # their reference code ignores the key


@dataclass(frozen=True)
class RopeShape:
    """One rotary embedding: its kind, base and scaling parameters."""

    kind: str  # "default", "linear", "dynamic", "yarn", "longrope", "llama3"
    theta: float
    rotary_dim: int  # of head_dim; the rest passes through
    max_position_embeddings: int  # the config's, which some kinds scale from
    original_max_position_embeddings: int
    # The kind's own numbers; tuples, so that equal shapes are one dictionary key.
    parameters: tuple[tuple[str, float | tuple[float, ...]], ...] = ()

    def get(self, name: str, default: float | None = None) -> float | None:
        """A scalar parameter of the kind, or ``default`` where absent."""
        value = dict(self.parameters).get(name, default)
        return None if value is None else float(value)  # type: ignore[arg-type]

    def need(self, name: str) -> float:
        """A scalar parameter without which the kind means nothing."""
        value = self.get(name)
        if value is None:
            raise ConfigError(f"--rope-scaling of type {self.kind!r} needs {name!r}")
        return value

    def factors(self, name: str) -> tuple[float, ...]:
        """A list parameter, one factor per pair of rotated dimensions."""
        value = dict(self.parameters).get(name)
        if not isinstance(value, tuple) or len(value) != self.rotary_dim // 2:
            raise ConfigError(
                f"--rope-scaling of type {self.kind!r} needs {name!r} "
                f"with {self.rotary_dim // 2} factors"
            )
        return value


@dataclass(frozen=True)
class ModelShape:
    """What a model class needs to build itself. Counts are totals over all ranks."""

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    max_model_len: int  # positions never reach it; rotary tables are this long
    norm_eps: float
    activation: str
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    attention_scale: float
    attention_soft_cap: float | None
    final_soft_cap: float | None
    ropes: tuple[RopeShape, ...]  # per layer
    sliding_windows: tuple[int | None, ...]  # per layer; None: the whole past
    hf_config: Mapping[str, Any]  # the (text) config itself, for what only one family knows

    @classmethod
    def from_hf(
        cls,
        hf_config: Mapping[str, Any],
        *,
        max_model_len: int | None = None,
        disable_sliding_window: bool = False,
    ) -> "ModelShape":
        """Read config.json; a nested ``text_config`` is the model's, its outer keys the defaults.

        Raises:
            ConfigError: a key without which no model can be built is absent or impossible.
        """
        try:
            return cls._from_hf(hf_config, max_model_len, disable_sliding_window)
        except ConfigError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as err:
            raise ConfigError(f"config.json describes no model: {err}") from err

    @classmethod
    def _from_hf(
        cls, hf_config: Mapping[str, Any], max_model_len: int | None, disable_sliding_window: bool
    ) -> "ModelShape":
        config = text_config_of(hf_config)
        model_type = str(config["model_type"])
        num_heads = _int(config, "num_heads")
        hidden_size = _int(config, "hidden_size")
        num_layers = _int(config, "num_layers")
        head_dim = config.get("head_dim") or hidden_size // num_heads
        max_positions = int(_find(config, "max_position_embeddings") or 2048)
        scalar = config.get("query_pre_attn_scalar")
        windows = (None,) * num_layers if disable_sliding_window else _windows(config, num_layers)
        return cls(
            architecture=str((hf_config.get("architectures") or [""])[0]),
            model_type=model_type,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(head_dim),
            intermediate_size=int(_find(config, "intermediate_size") or 4 * hidden_size),
            vocab_size=_int(config, "vocab_size"),
            max_position_embeddings=max_positions,
            max_model_len=max_model_len or max_positions,
            norm_eps=float(_find(config, "norm_eps") or (1e-5 if model_type == "opt" else 1e-6)),
            activation=str(_find(config, "activation") or "silu"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias") or config.get("bias") or False),
            mlp_bias=bool(config.get("mlp_bias", False)),
            attention_scale=float(scalar or head_dim) ** -0.5,
            attention_soft_cap=config.get("attn_logit_softcapping"),
            final_soft_cap=config.get("final_logit_softcapping"),
            ropes=_ropes(config, int(head_dim), num_layers, max_positions),
            sliding_windows=windows,
            hf_config=config,
        )


def text_config_of(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's config with its family's defaults filled in."""
    nested = hf_config.get("text_config")
    config = dict(hf_config)
    if isinstance(nested, Mapping):
        outer = ("tie_word_embeddings", "rope_scaling", "torch_dtype", "dtype")
        config = {k: hf_config[k] for k in outer if hf_config.get(k) is not None} | dict(nested)
    model_type = str(config.setdefault("model_type", ""))
    defaults = _FAMILY_DEFAULTS.get(model_type, {})
    return {k: v for k, v in defaults.items() if k not in config} | config


def _find(config: Mapping[str, Any], name: str) -> Any:
    for key in _ALIASES.get(name, (name,)):
        if config.get(key) is not None:
            return config[key]
    return None


def _int(config: Mapping[str, Any], name: str) -> int:
    value = _find(config, name)
    if value is None:
        raise ConfigError(f"config.json names no {' or '.join(_ALIASES.get(name, (name,)))}")
    if not 1 <= int(value) <= _MAX_COUNT:
        raise ConfigError(f"config.json: {name} must be between 1 and {_MAX_COUNT}, got {value}")
    return int(value)


def _layer_types(config: Mapping[str, Any], num_layers: int) -> list[str] | None:
    """Each layer's kind of attention, where the config distinguishes kinds."""
    layer_types = config.get("layer_types")
    if layer_types:
        if len(layer_types) < num_layers:
            raise ConfigError(
                f"config.json has {len(layer_types)} layer_types for {num_layers} layers"
            )
        return [str(kind) for kind in layer_types[:num_layers]]
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    if pattern:
        names = ("full_attention", "sliding_attention")
        return [names[(layer + 1) % int(pattern) != 0] for layer in range(num_layers)]
    return None


def _windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window; None where a layer sees the whole past."""
    window = config.get("sliding_window")
    model_type = config["model_type"]
    uses = config.get("use_sliding_window", not str(model_type).startswith("qwen"))
    if not window or not uses or model_type in _NO_WINDOW_FAMILIES:
        return (None,) * num_layers
    kinds = _layer_types(config, num_layers)
    if kinds is not None:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
    first = int(config.get("max_window_layers") or 0)  # Qwen: the layers below see everything
    return tuple(int(window) if layer >= first else None for layer in range(num_layers))


def _ropes(
    config: Mapping[str, Any], head_dim: int, num_layers: int, max_positions: int
) -> tuple[RopeShape, ...]:
    """One rotary shape per layer, from either spelling.

    Older configs have ``rope_theta`` and ``rope_scaling``; newer ones ``rope_parameters``, which
    may be keyed by layer type. An explicit ``rope_scaling`` wins, since it may come from a flag.
    """
    kinds = _layer_types(config, num_layers)
    parameters = config.get("rope_parameters") or {}
    scaling = dict(config.get("rope_scaling") or {})
    if kinds is not None and set(parameters) & {"full_attention", "sliding_attention"}:
        by_kind = {kind: dict(parameters.get(kind) or {}) for kind in set(kinds)}
        if scaling and "full_attention" in by_kind:
            by_kind["full_attention"] |= scaling
    elif kinds is not None and "rope_local_base_freq" in config:
        local = {"rope_theta": config["rope_local_base_freq"]}
        by_kind = {"sliding_attention": local, "full_attention": dict(parameters) | scaling}
    else:
        if scaling and "rope_theta" in parameters:
            scaling.setdefault("rope_theta", parameters["rope_theta"])
        shape = _rope(config, scaling or dict(parameters), head_dim, max_positions)
        return (shape,) * num_layers
    shapes = {kind: _rope(config, p, head_dim, max_positions) for kind, p in by_kind.items()}
    return tuple(shapes[kind] for kind in kinds)


_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def _rope(
    config: Mapping[str, Any], parameters: dict[str, Any], head_dim: int, max_positions: int
) -> RopeShape:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kind = {"su": "longrope", "none": "default", "mrope": "default"}.get(kind, kind)
    if kind not in _ROPE_KINDS:
        raise ConfigError(
            f"--rope-scaling type {kind!r} is not known; use one of {', '.join(_ROPE_KINDS)}"
        )
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    original = (
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or max_positions
    )
    numbers = {
        key: tuple(float(x) for x in value) if isinstance(value, list | tuple) else float(value)
        for key, value in sorted(parameters.items())
        if isinstance(value, int | float | list | tuple) and key != "rope_theta"
    }
    return RopeShape(
        kind=kind,
        theta=float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rotary_dim=int(head_dim * float(partial)),
        max_position_embeddings=max_positions,
        original_max_position_embeddings=int(original),
        parameters=tuple(numbers.items()),
    )
