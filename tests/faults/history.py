"""What one client was sent, event by event: the evidence that the oracles judge.

A history is filled by whoever reads an answer (``http_client``, ``engine_client``) and knows no
sockets itself. Nothing is corrected while recording: what looks impossible is kept as it came.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Branch:
    """One choice of an answer."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    num_prompts_told: int = 0  # times that the prompt's ids were sent
    num_roles: int = 0  # times that a chat's role was sent
    num_after_finish: int = 0  # tokens and text that came after the end


@dataclass(slots=True)
class History:
    """One request as its client saw it."""

    name: str  # unique in a run; a rerun of the same request has the same name
    path: str
    body: Mapping[str, Any]
    status: int = 0  # 0: the connection broke before an answer
    headers: dict[str, str] = field(default_factory=dict)
    branches: dict[int, Branch] = field(default_factory=dict)
    usages: list[Mapping[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)  # of what was said before
    answer_ids: set[str] = field(default_factory=set)
    created: set[int] = field(default_factory=set)
    num_done: int = 0
    num_after_done: int = 0
    is_cut: bool = False  # the client left on purpose
    is_broken: bool = False  # the server did
    started_s: float = 0.0
    head_s: float | None = None
    event_times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0

    @property
    def is_stream(self) -> bool:
        """Whether the answer was asked for as events."""
        return bool(self.body.get("stream"))

    @property
    def num_branches(self) -> int:
        """Choices that the answer must have."""
        return int(self.body.get("n") or 1)

    @property
    def max_tokens(self) -> int:
        """The most tokens of one choice."""
        return int(self.body["max_tokens"])

    @property
    def num_tokens(self) -> int:
        """Tokens received, over all choices."""
        return sum(len(branch.token_ids) for branch in self.branches.values())

    def branch(self, index: int) -> Branch:
        """The choice with this index."""
        return self.branches.setdefault(index, Branch())

    def take_event(self, data: str, now_s: float) -> None:
        """Take in one server-sent event's data."""
        self.event_times_s.append(now_s)
        if self.num_done:
            self.num_after_done += 1
        if data == "[DONE]":
            self.num_done += 1
            return
        try:
            self.take_object(json.loads(data))
        except (ValueError, KeyError, TypeError) as err:
            self.contradictions.append(f"unreadable event {data[:200]!r}: {err!r}")

    def take_object(self, value: Mapping[str, Any]) -> None:
        """Take in one chunk, one whole answer, or one error."""
        if value.get("error"):
            error = value["error"]
            self.errors.append(str(error.get("message") if isinstance(error, dict) else error))
            return
        self.answer_ids.add(str(value["id"]))
        self.created.add(int(value["created"]))
        if value.get("usage"):
            self.usages.append(value["usage"])
        for choice in value["choices"]:
            self._take_choice(choice)
            if "prompt_token_ids" in value and "index" in choice:
                self.branch(choice["index"]).num_prompts_told += 1

    def _take_choice(self, choice: Mapping[str, Any]) -> None:
        branch = self.branch(choice["index"])
        part = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text") or part.get("content") or ""
        token_ids = choice.get("token_ids") or []
        if branch.finish_reasons and (text or token_ids):
            branch.num_after_finish += 1
        branch.num_roles += "role" in part
        branch.num_prompts_told += "prompt_token_ids" in choice
        branch.text += text
        branch.token_ids += token_ids
        if choice.get("finish_reason") is not None:
            branch.finish_reasons.append(choice["finish_reason"])


class EventReader:
    """Bytes of an event stream in, the events' data out; comments are counted."""

    def __init__(self) -> None:
        self.num_comments = 0
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The events that are complete now."""
        self._rest += data
        *blocks, self._rest = self._rest.split(b"\n\n")
        events = []
        for block in blocks:
            lines = [line for line in block.split(b"\n") if line]
            self.num_comments += sum(line.startswith(b":") for line in lines)
            found = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            if found:
                events.append(b"\n".join(found).decode("utf-8", "strict"))
        return events
