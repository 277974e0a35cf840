"""How much one request may ask for: every cap once, read by the frontend and by the core alike.

Whoever is above a cap is refused with a sentence that names the field and the cap. The frontend
checks first, as it knows the caller's words for things; the core checks again, as it trusts none.
"""

# ---------------------------------------------------------------- one HTTP request

MAX_HEAD_BYTES = 32 << 10  # request line and headers
MAX_BODY_BYTES = 32 << 20
MAX_PROMPTS = 2048
MAX_BRANCHES_PER_BODY = 4096  # prompts times best_of
MAX_MESSAGES = 4096
MAX_DOCUMENTS = 1024
MAX_TOOLS = 128
MAX_TOOLS_BYTES = 1 << 20
MAX_LOGPROBS = 20  # logprobs, top_logprobs, prompt_logprobs; --max-logprobs may be lower
MAX_PLAIN_TOKEN_IDS = 1 << 20  # allowed_token_ids, tokens of /detokenize

# ---------------------------------------------------------------- one generation

MAX_BRANCHES = 128  # n, best_of
MAX_ID_CHARS = 256  # user, cache_salt, request ids; printable ones
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LIST_ENTRIES = 1024  # stop_token_ids, logit_bias, bad_words, end-of-text ids
MAX_WORD_CHARS = 256  # of one bad word
MAX_PROMPT_LOGPROBS = 1 << 22  # log-probabilities in one answer: prompt_logprobs times its length

MAX_LINGER_S = 600.0
MAX_PRESENTATION_BYTES = 32 << 10  # what a frontend leaves with the core to present a stream again

# ---------------------------------------------------------------- what frontends make of them

# To the lists of clients frontends add: the checkpoint's further end-of-text ids to the stop
# tokens, and to each bad word its spelling after a space.
MAX_CORE_STOP_TOKENS = MAX_CORE_BAD_WORDS = 2 * MAX_LIST_ENTRIES
MAX_WORD_TOKENS = 4 * (MAX_WORD_CHARS + 1)  # a token per byte of UTF-8, and of the space


def num_prompt_logprobs(per_token: int | None, num_prompt_tokens: int, vocab_size: int) -> int:
    """How many log-probabilities a prompt's answer holds: the chosen one of each token as well.

    Args:
        per_token: ``prompt_logprobs``; -1 stands for the vocabulary.
    """
    if per_token is None:
        return 0
    return ((vocab_size if per_token < 0 else min(per_token, vocab_size)) + 1) * num_prompt_tokens
