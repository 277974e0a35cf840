"""What steps take on the device, learned from their answers, and how many prompt tokens one bears.

While prompts enter, every running stream waits for the step that computes them. So a step with
streams in it takes only so many prompt tokens that it lasts ``max_slowdown`` times a step without
any. Where more prompts wait than a few such steps would finish, their time to first token weighs
more than the gap: chunks grow with the backlog, up to the whole budget for a batch job.

A device reads its weights for the few tokens of a decode step or computes the products of many,
whichever takes longer. So the first prompt tokens of a step are free, and then its time grows with
their number: the model has the time of a step that only decodes, and that of a prompt token where
these take longer. Where the truth is another, chunks as long as allowed are what it is fitted to:
the time per token that they are found to take leads to those that take the allowed time. Both
terms follow the measured times, so the model, the batch and the device may be any.
"""

_DRAIN_STEPS = 8  # a backlog is to be done in so many steps
_MIN_CHUNK = 64  # tokens; fewer would cost a step's fixed time again and again
_LEARNING_RATE = 0.1
_MIN_LEARNT_TOKENS = 32  # fewer prompt tokens tell nothing about the time of one
_LONGER = 1.25  # times a decode: from here on a step's time is that of its tokens


class StepCost:
    """Owns the two estimates. Without both of them nothing is limited."""

    def __init__(self, max_slowdown: float) -> None:
        """Limit steps to ``max_slowdown`` times the time of a decode step; 0: never."""
        self._max_slowdown = max_slowdown
        self._decode_s: float | None = None  # a step that only decodes
        self._token_s: float | None = None  # of a prompt, where they fill the step

    def note(self, num_prompt_tokens: int, device_time_s: float) -> None:
        """Learn from an answered step.

        Args:
            device_time_s: as the worker measured it; 0 says nothing.
        """
        if device_time_s <= 0:
            return
        if num_prompt_tokens == 0:
            self._decode_s = _follow(self._decode_s, device_time_s)
        elif num_prompt_tokens >= _MIN_LEARNT_TOKENS:
            token_s = device_time_s / num_prompt_tokens
            is_filled = device_time_s > _LONGER * (self._decode_s or 0.0)
            if is_filled or token_s < (self._token_s or 0.0):
                self._token_s = _follow(self._token_s, token_s)

    def decodes_within(self, limit_s: float) -> bool:
        """Whether a step that only decodes is known to take less time."""
        return self._decode_s is not None and self._decode_s < limit_s

    def expected_s(self, num_prompt_tokens: int) -> float | None:
        """What a step with streams in it lasts; None: not known."""
        if self._decode_s is None:
            return None
        return max(self._decode_s, num_prompt_tokens * (self._token_s or 0.0))

    def max_prompt_tokens(self, num_waiting_tokens: int) -> int | None:
        """How many prompt tokens a step with streams in it takes; None: as many as there are.

        Args:
            num_waiting_tokens: prompt tokens that wait to be computed.
        """
        if not self._max_slowdown or self._decode_s is None or self._token_s is None:
            return None
        flat = int(self._max_slowdown * self._decode_s / self._token_s)
        return max(flat, num_waiting_tokens // _DRAIN_STEPS, _MIN_CHUNK)


def _follow(estimate: float | None, measured: float) -> float:
    """Move an estimate towards what was measured; an outlier moves it by little."""
    if estimate is None:
        return measured
    return estimate + _LEARNING_RATE * (min(measured, 3 * estimate) - estimate)
