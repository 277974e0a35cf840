"""One completion on the terminal, printed as it comes."""

import sys
from contextlib import aclosing

from frontend.async_llm import AsyncLLM
from frontend.engine_args import AsyncEngineArgs
from frontend.outputs import RequestOutput
from ipc.errors import EngineGenerateError
from ipc.sampling_params import SamplingParams


async def print_completion(
    engine_args: AsyncEngineArgs, prompt: str, params: SamplingParams, *, echo: bool
) -> None:
    """Start an engine, print one completion as it comes, and end the engine."""
    engine = AsyncLLM.from_engine_args(engine_args)
    try:
        await engine.wait_until_ready()
        if echo:
            show(prompt)
        async with aclosing(engine.generate(prompt, params, "complete")) as outputs:
            async for output in outputs:
                show(text_of(output))
        show("\n")
    finally:
        engine.shutdown()


def text_of(output: RequestOutput) -> str:
    """The text of an output.

    Raises:
        EngineGenerateError: the request failed.
    """
    if output.error is not None:
        raise EngineGenerateError(output.error)
    return "".join(sequence.text for sequence in output.outputs)


def show(text: str) -> None:
    """Print a piece of a text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
