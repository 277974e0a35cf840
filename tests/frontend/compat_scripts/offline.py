"""An offline batch as a program written for vLLM has it: prompts in, completions out."""

import sys

from vllm import LLM, SamplingParams

PROMPTS = ["def add(a, b):", "import os\n", "class Point:"]


def main() -> None:
    """Complete three prompts and print one line for each."""
    llm = LLM(model=sys.argv[1], dtype="float32", max_num_seqs=8, seed=7)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")  # noqa: T201 - a program prints


if __name__ == "__main__":
    main()
