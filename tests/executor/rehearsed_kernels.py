"""Rehearse a start for a GPU that is not there, compile a part of it, and launch that part again.

Run as a program, without TRITON_INTERPRET, with a cache directory of its own. Prints one JSON
object: what was found, and of the part compiled whether each launch found it in the cache.
"""

import json
import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from triton import knobs
from triton.runtime.jit import JITFunction

from executor import kernel_rehearsal
from executor.kernel_cache import Target
from executor.kernel_compiler import CompilerPool, Variant
from executor.kernel_rehearsal import find_variants
from ipc.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig

COMPILED = {"_rms_norm_kernel", "_store_samples_kernel"}
TARGET = Target(90, 132)
HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 5,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}


def make_config() -> EngineConfig:
    return EngineConfig(
        model_config=ModelConfig(
            model="m", hf_config=HF_CONFIG, dtype="bfloat16", max_model_len=1024
        ),
        cache_config=CacheConfig(),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=1024, max_num_seqs=16, max_model_len=1024
        ),
        device_config=DeviceConfig("cuda"),
    )


def forget(variants: list[Any]) -> None:
    for variant in variants:
        variant.function.device_caches.clear()


def find(config: EngineConfig) -> list[Variant]:
    found: list[Variant] = []
    find_variants(config, TARGET, found.append)
    forget(found)
    return found


def main() -> None:
    config = make_config()
    variants = find(config)
    eager_config = replace(config, model_config=replace(config.model_config, enforce_eager=True))
    eager = find(eager_config)
    chosen = [v for v in variants if v.function.__name__ in COMPILED]
    told: list[tuple[int, int]] = []
    with CompilerPool(TARGET, 2) as pool:
        for variant in chosen:
            pool.add(variant)
        entries = pool.finish(lambda *now: told.append(now))
    hits: list[tuple[str, bool]] = []
    knobs.compilation.listener = lambda **said: hits.append((said["src"].name, said["cache_hit"]))
    compile_really = JITFunction._do_compile
    note = kernel_rehearsal.note_variant

    def compile_some(self: Any, *args: Any) -> object:
        if self.__name__ in COMPILED:
            return compile_really(self, *args)
        return note(lambda _: None, self, *args)

    with patch.object(kernel_rehearsal, "note_variant", lambda _, *args: compile_some(*args)):
        find_variants(config, TARGET, lambda _: None)
    report = {
        "found": [variant.function.__name__ for variant in variants],
        "eager": [variant.function.__name__ for variant in eager],
        "num_entries": len(set(entries)),
        "chosen": [variant.function.__name__ for variant in chosen],
        "told": told,
        "hits": hits,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
