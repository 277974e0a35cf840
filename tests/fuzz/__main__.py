"""The command behind ``scripts/fuzz``: one fuzzer at any size, with the seed printed."""

import argparse
import sys
import time

from tests.fuzz import (
    fuzz_config_json,
    fuzz_engine_args,
    fuzz_frames,
    fuzz_http,
    fuzz_metrics,
    fuzz_safetensors,
    fuzz_sampling_params,
)
from tests.fuzz.servers import running_server


def fuzz_server(num_inputs: int, seed: int) -> dict[str, int]:
    """HTTP bodies against a server of its own."""
    with running_server() as url:
        return fuzz_http.fuzz(url, num_inputs, seed)


FUZZERS = {
    "http": fuzz_server,
    "sampling-params": fuzz_sampling_params.fuzz,
    "engine-args": fuzz_engine_args.fuzz,
    "frames": fuzz_frames.fuzz,
    "config-json": fuzz_config_json.fuzz,
    "safetensors": fuzz_safetensors.fuzz,
    "metrics": fuzz_metrics.fuzz,
}


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("fuzzer", choices=sorted(FUZZERS))
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    result = FUZZERS[args.fuzzer](args.inputs, args.seed)
    seconds = time.perf_counter() - started
    sys.stdout.write(f"{args.fuzzer} seed {args.seed}: {result} in {seconds:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
