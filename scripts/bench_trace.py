"""A profiler's trace, summed up: what the device did in a step, by kind of work, and when it idled.

Reads the Chrome traces that ``torch.profiler`` writes. On a GPU it looks at kernels and copies; a
trace without any is taken for a CPU's, where the outermost operators stand for them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
# The first pattern that a kernel's name matches names its group.
GROUPS = {
    "copies": r"memcpy|memset|copy",
    "sampling": r"draw|pick|sampl|argmax|gumbel|noise|top_?[kp]|sort|logprob|has_nan|bitmask"
    r"|penalt|token_bias|_(scan|rank|collect|settle|search)_kernel",
    "attention": r"attention|flash|fmha|sdpa|_(decode|plan|prefill|merge|gather)_kernel",
    "rope and store": r"rotary|rope|store_kernel|store_kv|qkv",
    "norm": r"norm",
    "matmul": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|_(vector|dot)_kernel|linear|mm\b",
    "activation": r"gated|silu|swiglu|act_and_mul",
    "inputs": r"prepare|index|gather|scatter|arange|cumsum|embedding",
    "elementwise": r"elementwise|vectorized|reduce|cat|fill|::",
}
_PATTERNS = {group: re.compile(pattern, re.IGNORECASE) for group, pattern in GROUPS.items()}
_OWN_FUNCTIONS = "heliograph::"
_STEP_SLACK = 3  # steps that may have been in flight when recording began or ended
_EDGE_STEPS = 3  # at either end of a recording, where control operations hold up the core


class _Event(msgspec.Struct):
    name: str = ""
    cat: str = ""
    ts: float = 0.0  # microseconds
    dur: float = 0.0
    tid: int | str = 0


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on the device, in microseconds."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of work takes of a step."""

    name: str
    count: float  # per step
    us: float  # per step; what runs side by side counts for each


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """A step of the trace, on average."""

    num_steps: int
    step_us: float  # from step to step while recording, which itself takes time
    busy_us: float  # at least one kernel ran
    idle_share: float  # of the recorded steps
    gaps: list[Share]  # idle time by the length of the gap
    groups: list[Share]  # largest first
    kernels: list[Share]  # largest first


def read_spans(path: Path) -> list[Span]:
    """The device's work in order of its start."""
    events = msgspec.json.decode(path.read_bytes(), type=_Trace).traceEvents
    work = [event for event in events if event.cat in DEVICE_WORK]
    if not work:
        work = _outermost(event for event in events if _is_cpu_work(event))
    spans = [Span(event.name, event.ts, event.ts + event.dur) for event in work]
    return sorted(spans, key=lambda span: span.start_us)


def _is_cpu_work(event: _Event) -> bool:
    """An operator of torch, or a compiled function of ours."""
    return event.cat == "cpu_op" or event.name.startswith(_OWN_FUNCTIONS)


def _outermost(events: Iterable[_Event]) -> list[_Event]:
    """Operators that no other operator of their thread called."""
    outermost = []
    ends: dict[int | str, float] = {}
    for event in sorted(events, key=lambda event: (event.ts, -event.dur)):
        if event.ts >= ends.get(event.tid, 0.0):
            ends[event.tid] = event.ts + event.dur
            outermost.append(event)
    return outermost


def break_down(spans: Sequence[Span], expected_steps: int) -> Breakdown:
    """Sum up a trace of equal steps, leaving out those that starting and stopping disturbed.

    Args:
        spans: not empty, in order of their start.
        expected_steps: how many there were, give or take those in flight at the ends.
    """
    marks = _step_marks(spans, expected_steps)
    edge = min(_EDGE_STEPS, (len(marks) - 2) // 2)
    start_us, stop_us = marks[edge], marks[-1 - edge]
    num_steps = expected_steps if len(marks) == 2 else len(marks) - 1 - 2 * edge
    inside = [span for span in spans if start_us <= span.start_us < stop_us]
    gaps = _gaps(inside, stop_us)
    idle_us = sum(us for _, us in gaps)
    kinds = dict.fromkeys(sorted(kind for kind, _ in gaps))
    by_kind = {kind: [us for each, us in gaps if each == kind] for kind in kinds}
    return Breakdown(
        num_steps=num_steps,
        step_us=(stop_us - start_us) / num_steps,
        busy_us=(stop_us - start_us - idle_us) / num_steps,
        idle_share=idle_us / (stop_us - start_us),
        gaps=[Share(k, len(v) / num_steps, sum(v) / num_steps) for k, v in by_kind.items()],
        groups=_shares(((group_of(span.name), span) for span in inside), num_steps),
        kernels=_shares(((span.name, span) for span in inside), num_steps),
    )


def _gaps(spans: Sequence[Span], stop_us: float) -> list[tuple[str, float]]:
    """Kind and length of every stretch without work, to ``stop_us``."""
    gaps = []
    end_us = spans[0].start_us
    for start_us, next_end_us in [*((s.start_us, s.end_us) for s in spans), (stop_us, stop_us)]:
        if start_us > end_us:
            gaps.append((_gap_kind(start_us - end_us), start_us - end_us))
        end_us = max(end_us, next_end_us)
    return gaps


def group_of(kernel: str) -> str:
    """The kind of work that a kernel does, by its name; "other" when no pattern knows it."""
    return next((g for g, pattern in _PATTERNS.items() if pattern.search(kernel)), "other")


def _step_marks(spans: Sequence[Span], expected: int) -> list[float]:
    """When each step began, by a kernel that runs once a step; else the trace's two ends.

    Kernels that ran about as often as there were steps tell how often that was.
    """
    counts = Counter(span.name for span in spans)
    near = Counter(n for n in counts.values() if abs(n - expected) <= _STEP_SLACK)
    if near:
        num_steps = max(near, key=lambda n: (near[n], -abs(n - expected)))
        name = next(span.name for span in spans if counts[span.name] == num_steps)
        marks = [span.start_us for span in spans if span.name == name]
        if len(marks) > 2:
            return marks
    return [spans[0].start_us, max(span.end_us for span in spans)]


def _gap_kind(us: float) -> str:
    bounds = ((2.0, "a: up to 2 us"), (10.0, "b: 2 to 10 us"), (100.0, "c: 10 to 100 us"))
    return next((kind for bound, kind in bounds if us <= bound), "d: over 100 us")


def _shares(named: Iterable[tuple[str, Span]], num_steps: int) -> list[Share]:
    counts: Counter[str] = Counter()
    times: dict[str, float] = {}
    for name, span in named:
        counts[name] += 1
        times[name] = times.get(name, 0.0) + span.end_us - span.start_us
    names = sorted(times, key=lambda name: -times[name])
    return [Share(name, counts[name] / num_steps, times[name] / num_steps) for name in names]
