"""Checkpoints that bring code of their own: without the flag none of it runs, in no file.

Every file gets a canary of its own: a module that leaves a mark when it is imported. A process of
its own tries to use the checkpoint in every way that reads it, with ``-O`` as well, as a check
that is an ``assert`` is gone there. That process also notes whether it wants to talk to anybody.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import ROOT, TINY
from tests.frontend.make_checkpoints import write_checkpoint

# What a library may look for in a file, and where in it.
PLACES = {
    "config": ("config.json", ("AutoConfig", "AutoModelForCausalLM"), ()),
    "sub-config": ("config.json", ("AutoConfig", "AutoModelForCausalLM"), ("text_config",)),
    "vision": ("config.json", ("AutoConfig", "AutoModel"), ("vision_config", "inner")),
    "generation": ("generation_config.json", ("AutoConfig",), ()),
    "tokenizer": ("tokenizer_config.json", ("AutoTokenizer",), ()),
    "processor": ("processor_config.json", ("AutoProcessor",), ()),
    "nested-processor": ("processor_config.json", ("AutoImageProcessor",), ("image_processor",)),
    "image-processor": ("preprocessor_config.json", ("AutoImageProcessor",), ()),
    "video-processor": ("video_preprocessor_config.json", ("AutoVideoProcessor",), ()),
    "audio": ("feature_extractor_config.json", ("AutoFeatureExtractor",), ()),
    "adapter": ("adapter_config.json", ("AutoModel",), ("auto_mapping_of_base", "x")),
}

PROBE = """
import json, socket, sys
calls = []

def refuse(self, address):
    calls.append(repr(address))
    raise OSError("no network here")

socket.socket.connect = refuse
from frontend import EngineArgs
from frontend.vllm_names import get_tokenizer
from ipc.errors import ConfigError

outcomes = {}
for directory in sys.argv[2:]:
    def config():
        EngineArgs(model=directory, trust_remote_code=trust, device="cpu").create_engine_config()
    def tokenizer():
        get_tokenizer(directory, trust_remote_code=trust)
    trust = sys.argv[1] == "trust"
    for way in (config, tokenizer):
        try:
            way()
            said = "accepted"
        except ConfigError as err:
            said = str(err)
        except Exception as err:
            said = f"{type(err).__name__}: {err}"
        outcomes[f"{directory} {way.__name__}"] = said
print(json.dumps({"outcomes": outcomes, "network": calls, "optimized": not __debug__}))
"""


def write_canary(directory: Path, name: str) -> Path:
    """A checkpoint in which one file asks for code; returns the mark that the code would leave."""
    file, classes, path = PLACES[name]
    write_checkpoint(directory)
    mark = directory / "canary-ran"
    module = f"canary_{name.replace('-', '_')}"
    touch = f"open({str(mark)!r}, 'w').close()\nraise ImportError('the canary ran')\n"
    (directory / f"{module}.py").write_text(touch)
    target = directory / file
    content: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    inner = content
    for key in path:
        inner = inner.setdefault(key, {})
    inner["auto_map"] = dict.fromkeys(classes, f"{module}.Canary")
    target.write_text(json.dumps(content))
    return mark


def probe(trust: str, directories: list[Path], *, optimized: bool) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(directories[0] / "hf")}
    environment |= {"PYTHONOPTIMIZE": "1"} if optimized else {}
    command = [sys.executable, "-c", PROBE, trust, *map(str, directories)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["optimized"] is optimized
    return found


@pytest.mark.parametrize("optimized", [False, True], ids=["as usual", "with -O"])
def test_code_in_whichever_file_is_refused_and_does_not_run(
    tmp_path: Path, optimized: bool
) -> None:
    marks = {name: write_canary(tmp_path / name, name) for name in PLACES}

    found = probe("distrust", [tmp_path / name for name in PLACES], optimized=optimized)

    for where, said in found["outcomes"].items():
        assert "--trust-remote-code" in said, f"{where}: {said}"
    assert [name for name, mark in marks.items() if mark.exists()] == []
    assert found["network"] == []


def test_the_canary_sings_where_code_is_trusted(tmp_path: Path) -> None:
    mark = write_canary(tmp_path / "m", "tokenizer")
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["canary_tokenizer.Canary", None]}})
    )
    probe("trust", [tmp_path / "m"], optimized=False)
    assert mark.exists()


def test_the_bundled_checkpoint_passes() -> None:
    found = probe("distrust", [TINY], optimized=True)
    assert set(found["outcomes"].values()) == {"accepted"}
