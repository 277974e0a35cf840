"""SamplingParams with random fields: a sound object, or an error that has words."""

import random

from ipc.sampling_params import SamplingParams
from tests.fuzz.values import any_value

FIELDS = SamplingParams.__struct_fields__
PLAUSIBLE = {
    "n": [1, 2, 5], "best_of": [None, 1, 5], "temperature": [0.0, 0.3, 1.0, 2], "seed": [-1, 7],
    "top_p": [1.0, 0.1], "top_k": [-1, 0, 5], "min_p": [0.0, 1.0], "stop": [None, "a", ["a", "b"]],
    "max_tokens": [None, 1, 100], "min_tokens": [0, 1], "logprobs": [None, -1, 0, 5],
    "logit_bias": [None, {5: 200.0}, {"7": -3}], "allowed_token_ids": [None, [1, 2]],
    "bad_words": [None, ["no"]], "stop_token_ids": [None, [3]], "repetition_penalty": [1.0, 1.5],
}  # fmt: skip


def fuzz(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Count what came of each input; anything but a refusal or a sound object raises."""
    rng = random.Random(seed)
    counts = {"accepted": 0, "refused": 0}
    for _ in range(num_inputs):
        names = rng.sample(FIELDS, k=rng.randrange(1, 5))
        fields = {name: field_value(rng, name) for name in names}
        refusal = None
        try:
            check_invariants(SamplingParams(**fields))
        except (ValueError, TypeError) as err:
            refusal = str(err)
        assert refusal is None or refusal, f"no words for {fields}"
        counts["accepted" if refusal is None else "refused"] += 1
    return counts


def field_value(rng: random.Random, name: str) -> object:
    """A plausible value half of the time, so that deep checks are reached."""
    if name in PLAUSIBLE and rng.random() < 0.5:
        return rng.choice(PLAUSIBLE[name])
    return any_value(rng)


def check_invariants(params: SamplingParams) -> None:
    """What the rest of the engine relies on."""
    assert isinstance(params.stop, list)
    assert isinstance(params.stop_token_ids, list)
    assert isinstance(params.n, int)
    assert 1 <= params.n <= params.num_branches
    assert 0.0 <= params.temperature < float("inf")
    assert 0.0 < params.top_p <= 1.0
    assert params.max_tokens is None or params.max_tokens >= max(1, params.min_tokens)
    assert params.clone() == params
