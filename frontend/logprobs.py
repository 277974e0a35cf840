"""Log-probabilities of the wire into the records that callers know."""

from frontend.outputs import Logprob, PositionLogprobs
from frontend.tokenizer import Tokenizer
from ipc.messages import TokenLogprobs

_SENTENCEPIECE_SPACE = "\u2581"


class LogprobDecoder:
    """Names tokens by their text. Texts are remembered: at most one entry per vocabulary id."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._text_of_id: dict[int, str | None] = {}

    def decode(self, position: TokenLogprobs) -> PositionLogprobs:
        """One position: the chosen token first, then the most likely ones in order."""
        ids, logprobs = position.token_ids, position.logprobs
        found = {ids[0]: Logprob(logprobs[0], position.rank, self._text(ids[0]))}
        for rank in range(1, len(ids)):
            token_id = ids[rank]
            if token_id != ids[0]:
                found[token_id] = Logprob(logprobs[rank], rank, self._text(token_id))
        return found

    def _text(self, token_id: int) -> str | None:
        try:
            return self._text_of_id[token_id]
        except KeyError:
            text = self._text_of_id[token_id] = self._decode(token_id)
            return text

    def _decode(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if text.startswith(" "):
            return text
        # Decoded alone, a sentencepiece word loses the space that it carries inside a text.
        piece = self._tokenizer.convert_ids_to_tokens([token_id])[0]
        return f" {text}" if piece.startswith(_SENTENCEPIECE_SPACE) else text
