"""SamplingParams as the workers want them: resolved, per branch, nothing that they ignore."""

from engine_core.request import branch_seed
from ipc.messages import AddRequest, RowParams


def make_row_params(request: AddRequest, index: int, vocab_size: int) -> RowParams:
    """The digest of a request's parameters for one branch.

    Stop tokens and bad words outside the vocabulary are left out: they can never be sampled, and
    the worker indexes with what it gets. Prompt log-probabilities are branch 0's alone.
    """
    params = request.params
    stop_ids = set(params.stop_token_ids or ())
    if not params.ignore_eos:
        stop_ids.update(request.eos_token_ids)
    assert params.seed is not None, "checked at admission"
    return RowParams(
        seed=branch_seed(params.seed, index),
        temperature=0.0 if params.is_greedy else params.temperature,
        top_p=params.top_p,
        top_k=params.top_k if 0 < params.top_k < vocab_size else 0,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        min_tokens=params.min_tokens,
        stop_token_ids=sorted(i for i in stop_ids if 0 <= i < vocab_size),
        num_logprobs=_at_most(vocab_size, params.logprobs),
        num_prompt_logprobs=_at_most(vocab_size, params.prompt_logprobs) if index == 0 else None,
        logit_bias=list((params.logit_bias or {}).items()),
        allowed_token_ids=params.allowed_token_ids,
        bad_words_token_ids=[
            word
            for word in request.bad_words_token_ids
            if word and all(0 <= i < vocab_size for i in word)
        ],
        has_logits_processors=request.has_logits_processors,
    )


def _at_most(limit: int, count: int | None) -> int | None:
    return None if count is None else min(limit, count)
