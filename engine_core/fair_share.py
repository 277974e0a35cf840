"""Whose turn it is among several tenants: each gets tokens in proportion to its weight.

A tenant is a number that a frontend gives to the requests of one key. Requests are placed on a
scale of virtual time, on which a tenant moves on by (tokens / weight) with each of its requests;
the smallest place goes first. So one that asks for much queues behind itself, not in front of
others, and one that was idle is not paid for it. Without tenants every place is 0: first come,
first served.

Source: start-time fair queueing (Goyal, Vin, Cheng 1996), with output lengths that are learned.
"""

MAX_TENANT = 0xFFFF
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0

_SCALE = 1000  # places are whole numbers; a token of weight 1 takes so much
_FIRST_GUESS = 128.0  # output tokens of a request, before any has ended
_LEARNING_RATE = 0.05


class FairShare:
    """Owns the next place of each tenant."""

    def __init__(self) -> None:
        self._next_places: dict[int, int] = {}
        self._num_output_tokens = _FIRST_GUESS

    def place(
        self,
        tenant: int,
        weight: float,
        *,
        num_prompt_tokens: int,
        max_output_tokens: int,
        newest_place: int,
    ) -> int:
        """The place of a request that arrives now.

        Args:
            max_output_tokens: of all branches together; what is likely counts if it is less.
            newest_place: the largest one that has begun.
        """
        if not tenant and not self._next_places:
            return 0
        start = max(newest_place, self._next_places.get(tenant, 0))
        if len(self._next_places) > MAX_TENANT:
            return start  # only names that nobody has fill this up
        cost = num_prompt_tokens + min(float(max_output_tokens), self._num_output_tokens)
        self._next_places[tenant] = start + max(1, round(cost * _SCALE / weight))
        return start

    def note_output(self, num_tokens: int) -> None:
        """Learn how long outputs are."""
        self._num_output_tokens += _LEARNING_RATE * (num_tokens - self._num_output_tokens)
