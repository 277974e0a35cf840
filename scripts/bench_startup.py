"""Start-up: from a process's start to its first token, with caches empty and full.

Files have been read and byte code compiled before, so the figures are the engine's own. Each start
is a new Python process with an offline engine; run this file by itself to be that process.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
# Where compilers keep what they made, each below a directory of ours.
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "XDG_CACHE_HOME": "xdg",
}
PROMPT = [1000] * 16


def measure_startup(engine_args: dict[str, Any]) -> dict[str, Result]:
    """One start with empty caches, then one with what that left behind."""
    _read_files()
    with tempfile.TemporaryDirectory(prefix="bench-caches-") as directory:
        return {name: _start_once(engine_args, Path(directory)) for name in ("cold", "warm")}


def _read_files() -> None:
    """Have the imports of all processes in memory and compiled to byte code."""
    code = "import executor.worker, engine_core.core_process, frontend.llm"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=_environment(None))


def _start_once(engine_args: dict[str, Any], caches: Path) -> Result:
    command = [sys.executable, __file__, json.dumps(engine_args)]
    started = time.monotonic()
    output = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=_environment(caches)
    ).stdout
    answer = json.loads(output.splitlines()[-1])
    result: Result = {name: round(at_s - started, 2) for name, at_s in answer["times"].items()}
    return result | {"phases_s": answer["phases_s"]}


def _environment(caches: Path | None) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if caches is not None:
        environment |= {name: str(caches / folder) for name, folder in CACHES.items()}
    return environment


class PhaseLog(logging.Handler):
    """Keeps what the launcher logs of the worker's phases."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        source = logging.getLogger("frontend.launcher")
        source.setLevel(logging.INFO)
        source.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Take in one line."""
        if record.msg.startswith("start-up phase") and isinstance(record.args, tuple):
            name, seconds = record.args
            self.seconds[str(name)] = round(float(str(seconds)), 2)


def main() -> None:
    """Be the process that starts: print when it was where, by the clock that all share."""
    engine_args = json.loads(sys.argv[1])
    phases = PhaseLog()
    from frontend import EngineArgs, LLMEngine, SamplingParams

    times = {"imported_s": time.monotonic()}
    engine = LLMEngine.from_engine_args(EngineArgs(**engine_args), enable_multiprocessing=True)
    times["ready_s"] = time.monotonic()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    engine.add_request("first", {"prompt_token_ids": PROMPT}, params)
    while engine.has_unfinished_requests():
        engine.step()
    times["first_token_s"] = time.monotonic()
    engine.shutdown()
    print(json.dumps({"times": times, "phases_s": phases.seconds}))


if __name__ == "__main__":
    main()
