"""Mixed streams against a server, for as long as a run lasts, each checked when it ends."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from frontend.tokenizer import Tokenizer, load_tokenizer_directory
from tests.e2e.engines import TINY, load_expected
from tests.faults.histories import History, read_stream
from tests.faults.oracle import check_equality, check_integrity

COMPLETIONS = "/v1/completions"
_RETRY_S = 0.2
_REFUSALS = (429, 503)
_AT_ONCE = 8  # of an undisturbed run: what it says does not depend on that


@dataclass(frozen=True)
class Kind:
    """One thing to ask. Asked twice of a healthy engine, it is answered the same."""

    name: str
    body: dict[str, Any]

    @property
    def num_choices(self) -> int:
        """Choices of the answer."""
        return int(self.body.get("n", 1))


def make_kinds(*, temperature: float, max_tokens: int = 160, seed: int = 0) -> list[Kind]:
    """Different prompts, each with something else that has to survive."""
    twists: list[dict[str, Any]] = [
        {},
        {"n": 2, "temperature": 0.8},
        {"stop": ["\n\n", "return"], "ignore_eos": False},
        {"frequency_penalty": 0.7, "presence_penalty": 0.3},
        {"repetition_penalty": 1.2, "min_tokens": max_tokens // 4, "ignore_eos": False},
        {"logit_bias": {"300": 5.0}, "top_k": 40},
        {"max_tokens": 3},
        {"skip_special_tokens": False},
    ]
    kinds = []
    for i, case in enumerate(load_expected()):
        body = {
            "prompt": case.prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed + i,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        kinds.append(Kind(f"kind {i}", body | twists[i % len(twists)]))
    return kinds


@cache
def tokenizer() -> Tokenizer:
    """The bundled model's."""
    return load_tokenizer_directory(TINY)


def text_of(kind: Kind, token_ids: list[int]) -> str:
    """What a whole answer with these tokens would say."""
    skip = kind.body.get("skip_special_tokens", True)
    return tokenizer().decode(token_ids, skip_special_tokens=skip)


@dataclass
class Tally:
    """What came of all streams of a run."""

    num_ended: int = 0
    num_tokens: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # the longest of each stream

    def problem_text(self) -> str:
        """A few of the problems."""
        return json.dumps(self.problems[:5], indent=1)


class Traffic:
    """Owns the readers: ``num_streams`` at a time, each asking for one kind after another."""

    def __init__(self, url: str, kinds: list[Kind], num_streams: int) -> None:
        self._url = url
        self._kinds = kinds
        self._num_streams = num_streams
        self._references: dict[str, History] = {}
        self._open: set[History] = set()
        self._is_stopping = False
        self.tally = Tally()

    async def listen_undisturbed(self) -> None:
        """Ask for every kind once, by the same reader; what it hears is what must be heard."""

        async def listen(kind: Kind) -> None:
            async with places:
                history = await self._ask(kind)
            problems = self._check(kind, history)
            assert not problems, problems
            self._references[kind.name] = history

        places = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*map(listen, self._kinds))

    def at(self, url: str) -> "Traffic":
        """The same for another server of the same model."""
        other = Traffic(url, self._kinds, self._num_streams)
        other._references = self._references
        return other

    async def listen_once(self) -> None:
        """Ask for every kind once."""
        await asyncio.gather(*(self._hear(kind) for kind in self._kinds))

    async def run(self) -> None:
        """Read streams until ``stop``; the last ones are heard to their end."""
        async with asyncio.TaskGroup() as readers:
            for number in range(self._num_streams):
                readers.create_task(self._read(random.Random(number)))

    def stop(self) -> None:
        """Begin no more streams."""
        self._is_stopping = True

    @property
    def num_tokens(self) -> int:
        """Tokens heard so far, of all streams."""
        return self.tally.num_tokens + sum(history.num_tokens for history in self._open)

    async def wait_for_tokens(self, num_more: int = 1, limit_s: float = 120.0) -> None:
        """Return when so many more tokens were heard."""
        target = self.num_tokens + num_more
        async with asyncio.timeout(limit_s):
            while self.num_tokens < target:
                await asyncio.sleep(0.005)

    async def _read(self, order: random.Random) -> None:
        while not self._is_stopping:
            history = await self._hear(order.choice(self._kinds))
            if history.status in _REFUSALS:  # in order: come again
                await asyncio.sleep(_RETRY_S)

    async def _hear(self, kind: Kind) -> History:
        """One stream, checked, and what came of it noted."""
        history = await self._ask(kind)
        self.tally.statuses[history.status] += 1
        if history.status not in _REFUSALS:
            self.tally.num_ended += 1
            self.tally.problems += self._check(kind, history)
            times = history.event_times_s
            gaps = [after - before for before, after in pairwise(times)]
            self.tally.gaps_s.append(max(gaps, default=0.0))
        return history

    async def _ask(self, kind: Kind) -> History:
        history = History(kind.name)
        self._open.add(history)
        try:
            return await read_stream(self._url, COMPLETIONS, kind.body, history)
        finally:
            self._open.discard(history)
            self.tally.num_tokens += history.num_tokens

    def _check(self, kind: Kind, history: History) -> list[str]:
        has_stop = "stop" in kind.body  # then text ends before its tokens do
        found = check_integrity(
            history,
            lambda ids: "" if has_stop else text_of(kind, ids),
            num_choices=kind.num_choices,
        )
        if has_stop:
            found = [problem for problem in found if "text parts" not in problem]
        reference = self._references.get(kind.name)
        if reference is not None:
            found += check_equality(history, reference)
            same = all(
                history.choices.get(i) and history.choices[i].text == choice.text
                for i, choice in reference.choices.items()
            )
            if not same and not found:
                found.append(f"{kind.name}: other text than undisturbed")
        return found
