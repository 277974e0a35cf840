"""Log-probabilities in the two forms of the OpenAI API."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from frontend.outputs import Logprob

FLOOR = -9999.0  # JSON has no -Infinity

Position = Mapping[int, Logprob] | None  # None: the first prompt token, which nothing predicts


class CompletionLogprobs:
    """Builds the completions form for one choice, piece by piece: offsets run on."""

    def __init__(
        self, num_top: int, *, as_ids: bool, text_of: Callable[[int], str] | None = None
    ) -> None:
        """``text_of`` names the token that has no log-probability: a prompt's first."""
        self._num_top = num_top
        self._as_ids = as_ids
        self._text_of = text_of
        self._offset = 0

    def take(self, token_ids: Sequence[int], positions: Sequence[Position]) -> dict[str, Any]:
        """The object for these tokens; ``text_offset`` counts from the choice's first one."""
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, position in zip(token_ids, positions, strict=True):
            entry = None if position is None else position.get(token_id)
            token = token_name(token_id, entry, self._as_ids)
            if entry is None and self._text_of is not None and not self._as_ids:
                token = self._text_of(token_id)
            tokens.append(token)
            offsets.append(self._offset)
            self._offset += len(token)
            chosen.append(None if entry is None else max(entry.logprob, FLOOR))
            top.append(None if position is None else self._top(position, token_id))
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, position: Mapping[int, Logprob], chosen_id: int) -> dict[str, float]:
        """The most likely tokens, and the chosen one where it is not among them."""
        top: dict[str, float] = {}
        for token_id, entry in position.items():
            if token_id == chosen_id or _is_top(entry, self._num_top):
                # Two ids may have one text; the likelier one comes first and stays.
                name = token_name(token_id, entry, self._as_ids)
                top.setdefault(name, max(entry.logprob, FLOOR))
        return top


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[Position], num_top: int, *, as_ids: bool
) -> dict[str, Any]:
    """The chat form: a list of tokens, each with its bytes and its likeliest rivals."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        entries = position or {}
        rivals = [item for item in entries.items() if _is_top(item[1], num_top)]
        rivals.sort(key=lambda item: -item[1].logprob)
        content.append(
            _chat_token(token_id, entries.get(token_id), as_ids)
            | {"top_logprobs": [_chat_token(i, e, as_ids) for i, e in rivals[:num_top]]}
        )
    return {"content": content}


def prompt_logprobs_body(positions: Sequence[Position]) -> list[dict[str, Any] | None]:
    """Prompt log-probabilities by token id, as the extension field ``prompt_logprobs`` has them."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": max(entry.logprob, FLOOR),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def token_name(token_id: int, entry: Logprob | None, as_ids: bool) -> str:
    """How a token is called: its text, or its id where the client asked so."""
    if as_ids or entry is None or entry.decoded_token is None:
        return f"token_id:{token_id}"
    return entry.decoded_token


def _is_top(entry: Logprob, num_top: int) -> bool:
    return entry.rank is None or entry.rank <= num_top


def _chat_token(token_id: int, entry: Logprob | None, as_ids: bool) -> dict[str, Any]:
    name = token_name(token_id, entry, as_ids)
    return {
        "token": name,
        "logprob": FLOOR if entry is None else max(entry.logprob, FLOOR),
        "bytes": list(name.encode("utf-8", "replace")),
    }
