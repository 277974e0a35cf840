"""POST /tokenize and /detokenize: what a prompt is for the model."""

import asyncio
from typing import Any

from starlette.requests import Request

from frontend.openai.chat import chat_prompt
from frontend.openai.generation import read_body
from frontend.openai.protocol import DetokenizeRequest, TokenizeRequest, check_tools
from frontend.openai.state import ServerState
from ipc.errors import RequestError


async def tokenize(state: ServerState, request: Request) -> dict[str, Any]:
    """Token ids of a prompt, or of the prompt that the chat template makes of messages."""
    body = await read_body(request, TokenizeRequest, state)
    state.check_model(body.model)
    tokenizer = state.need_tokenizer()
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    check_tools(body.tools)
    text = body.prompt if body.prompt is not None else await chat_prompt(state, body)
    adds_special = body.add_special_tokens
    if adds_special is None:
        adds_special = body.messages is None
    # In a thread: a long text would hold up every stream.
    token_ids = await asyncio.to_thread(tokenizer.encode, text, adds_special)
    answer: dict[str, Any] = {
        "tokens": token_ids,
        "count": len(token_ids),
        "max_model_len": state.model_config.max_model_len,
    }
    if body.return_token_strs:
        answer["token_strs"] = list(tokenizer.convert_ids_to_tokens(token_ids))
    return answer


async def detokenize(state: ServerState, request: Request) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    body = await read_body(request, DetokenizeRequest, state)
    state.check_model(body.model)
    tokenizer = state.need_tokenizer()
    size = tokenizer.vocab_size
    if (largest := max(body.tokens, default=0)) >= size:
        raise RequestError(f"tokens holds {largest}; token ids are below {size}", param="tokens")
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}
