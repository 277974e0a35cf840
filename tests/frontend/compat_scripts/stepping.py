"""An engine stepped by hand as a program written for vLLM has it: arguments, requests, steps."""

import argparse

from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams

REQUESTS = [
    ("def add(a, b):", SamplingParams(temperature=0.0, max_tokens=6)),
    ("import os\n", SamplingParams(n=2, best_of=3, temperature=0.8, seed=1, max_tokens=6)),
    ("class Point:", SamplingParams(temperature=0.0, max_tokens=6, logprobs=1)),
]


def run(engine: LLMEngine) -> list[RequestOutput]:
    """Add a request before each of the first steps; return what finished."""
    waiting = list(enumerate(REQUESTS))
    finished = []
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, (prompt, params) = waiting.pop(0)
            engine.add_request(str(number), prompt, params)
        finished += [output for output in engine.step() if output.finished]
    return finished


def main() -> None:
    """Build the engine from the command line, run the requests, print one line for each."""
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args()))
    for output in sorted(run(engine), key=lambda each: each.request_id):
        texts = [branch.text for branch in output.outputs]
        print(f"{output.request_id}: {len(texts)} {texts[0]!r}")  # noqa: T201 - a program prints


if __name__ == "__main__":
    main()
