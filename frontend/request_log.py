"""The log line of a request. Prompts are private: they appear at DEBUG only, cut to a length."""

import logging

from frontend.request_state import RequestState

logger = logging.getLogger(__name__)


def log_request(state: RequestState, max_log_len: int | None) -> None:
    """Say that a request was admitted.

    Args:
        max_log_len: at most so many characters of its prompt, and so many of its ids.
    """
    params, prompt_ids = state.params, state.entry.request.prompt_token_ids
    logger.info(
        "request %s: %d prompt tokens, max_tokens %s, n %d, temperature %g, priority %d",
        state.request_id,
        len(prompt_ids),
        params.max_tokens,
        params.n,
        params.temperature,
        state.entry.request.priority,
    )
    if logger.isEnabledFor(logging.DEBUG):
        text = state.prompt if state.prompt is None else state.prompt[:max_log_len]
        logger.debug(
            "request %s: prompt %r, prompt ids %s, %s",
            state.request_id,
            text,
            prompt_ids[:max_log_len],
            params,
        )
