"""An engine inside an event loop as a program written for vLLM has it: streams side by side."""

import asyncio
import sys

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.sampling_params import SamplingParams
from vllm.utils import random_uuid

PROMPTS = ["def add(a, b):", "import os\n"]


async def complete(engine: AsyncLLMEngine, prompt: str) -> str:
    """Follow one stream to its end; its text only ever grows."""
    text = ""
    params = SamplingParams(temperature=0.0, max_tokens=8)
    async for output in engine.generate(prompt, params, random_uuid()):
        assert output.outputs[0].text.startswith(text)
        text = output.outputs[0].text
    return text


async def main() -> None:
    """Run all prompts at once and print one line for each."""
    args = AsyncEngineArgs(model=sys.argv[1], dtype="float32", disable_log_requests=True)
    engine = AsyncLLMEngine.from_engine_args(args)
    texts = await asyncio.gather(*(complete(engine, prompt) for prompt in PROMPTS))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        print(f"{prompt!r} -> {text!r}")  # noqa: T201 - a program prints
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
