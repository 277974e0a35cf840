"""Results of the suite beside another engine's figures, the machine's limits and our aims.

The limit of a row is arithmetic on rates measured in the same run. Aims of rows that are bound by
arithmetic (marked †) are scaled by the matmul rate of the run against the one they were set for.
Several rounds of one measurement count as their median.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_floor import Cost, Floor, Machine
from bench_model import SCRIPTS, find_model
from bench_record import read_rows
from bench_workload import FULL

Result = dict[str, Any]
Key = tuple[str, str, str]  # model, measure, figure
RESULTS = SCRIPTS / "bench_results"
PEER = RESULTS / "vllm-0.26-h200.json"
TARGETS = RESULTS / "targets.json"
HIGHER_IS_BETTER = ("tok_s", "steady_tok_s", "prompt_tok_s", "total_tok_s")
MAX_BAR = 8.0  # times as fast as the peer; longer bars are cut
LESSER_FIGURES = ("step_ms_mean", "ttft_ms", "tok_s", "seconds", "ttft_ms_p50", "ttft_ms_p99",
                  "itl_ms_p50", "itl_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "api_us_per_token",
                  "core_worker_cores", "first_token_s", "first_answer_s")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. None: not known, or there is none."""

    work: str
    is_higher_better: bool
    is_scaled: bool
    peer: float | None
    limit: float | None
    must: float
    wished: float
    ours: float | None

    @property
    def verdict(self) -> str:
        """Which aim was reached."""
        if self.ours is None:
            return "not measured"
        if self._reaches(self.wished):
            return "wished"
        return "must" if self._reaches(self.must) else "missed"

    def speed(self, value: float | None) -> float | None:
        """How many times as fast as the peer a figure is."""
        if value is None or self.peer is None:
            return None
        return value / self.peer if self.is_higher_better else self.peer / value

    def _reaches(self, aim: float) -> bool:
        assert self.ours is not None
        return self.ours >= aim if self.is_higher_better else self.ours <= aim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a report."""
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines of the suite")
    parser.add_argument("--to", type=Path, default=RESULTS, help="directory of table and plot")


def run(args: argparse.Namespace) -> int:
    """Write ``NAME.md`` and ``NAME.svg`` after the first results file; print the table."""
    lines = [line for path in args.results for line in read_rows(path)]
    limits = find_limits(lines)
    rows = make_rows(lines, limits)
    name = args.results[0].stem
    text = describe(lines, limits) + table(rows) + "\n" + lesser_table(lines)
    args.to.mkdir(parents=True, exist_ok=True)
    (args.to / f"{name}.md").write_text(text)
    plot(rows, args.to / f"{name}.svg")
    print(text)
    return 0


def medians(lines: Iterable[Result]) -> dict[Key, float]:
    """The median over rounds of every figure that is a number."""
    values: dict[Key, list[float]] = {}
    for line in lines:
        for figure, value in line.items():
            if isinstance(value, int | float) and line["model"] is not None:
                values.setdefault((line["model"], line["measure"], figure), []).append(value)
    return {key: statistics.median(each) for key, each in values.items()}


def find_limits(lines: Iterable[Result]) -> Result | None:
    """The machine's rates: medians of the lines that hold some; None without any."""
    measured = [line for line in lines if line["measure"] == "limits"]
    names = ("read_tb_s", "copy_tb_s", "matmul_tflop_s", "graph_node_us")
    known = {n: [line[n] for line in measured if line[n] is not None] for n in names}
    return {n: statistics.median(v) for n, v in known.items() if v} if measured else None


def make_rows(lines: list[Result], limits: Result | None) -> list[Row]:
    """One row per aim."""
    targets = json.loads(TARGETS.read_text())
    peer = json.loads(PEER.read_text())["figures"]
    ours = medians(lines)
    floors = _floors({row["model"] for row in targets["rows"]}, limits)
    reference = targets["reference_matmul_tflop_s"]
    slowness = reference / limits["matmul_tflop_s"] if limits else 1.0
    rows = []
    for target in targets["rows"]:
        model, measure, figure = target["model"], target["measure"], target["figure"]
        is_higher_better = figure in HIGHER_IS_BETTER
        scale = 1.0
        if target["is_bound_by_arithmetic"]:
            scale = 1 / slowness if is_higher_better else slowness
        rows.append(
            Row(
                work=target["work"] + (" †" if target["is_bound_by_arithmetic"] else ""),
                is_higher_better=is_higher_better,
                is_scaled=scale != 1.0,
                peer=peer.get(model, {}).get(measure, {}).get(figure),
                limit=floors.get((model, measure, figure)),
                must=target["must"] * scale,
                wished=target["wished"] * scale,
                ours=ours.get((model, measure, figure)),
            )
        )
    return rows


def _floors(models: set[str], limits: Result | None) -> dict[Key, float]:
    if limits is None:
        return {}
    machine = Machine(
        bytes_per_s=limits["read_tb_s"] * 1e12, flop_per_s=limits["matmul_tflop_s"] * 1e12
    )
    found: dict[Key, float] = {}
    for name in models:
        floors = Floor(Cost.of(find_model(name).path), machine).all(FULL)
        for measure, figures in floors.items():
            found |= {(name, measure, figure): value for figure, value in figures.items()}
    return found


def describe(lines: list[Result], limits: Result | None) -> str:
    """Where and when, with which versions, and what the machine can do."""
    names = ("device", "torch", "triton", "python", "commit")
    seen = {n: list(dict.fromkeys(str(line[n]) for line in lines)) for n in names}
    dates = sorted(line["date"] for line in lines)
    peer = json.loads(PEER.read_text())
    parts = [f"{n} {', '.join(values)}" for n, values in seen.items()]
    text = f"Ours: {dates[0]} to {dates[-1]}; " + "; ".join(parts) + ".\n"
    text += f"Peer: {peer['engine']}, {peer['date']}, {peer['device']}.\n"
    if limits:
        rates = ", ".join(f"{name} {value:g}" for name, value in limits.items())
        theirs = ", ".join(f"{name} {value:g}" for name, value in peer["limits"].items())
        text += f"Limits measured in this run: {rates}; beside the peer: {theirs}.\n"
    return text + "\n"


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| work | vLLM 0.26 | limit | must | wished | ours | times as fast as vLLM | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sign = "≥" if row.is_higher_better else "≤"
        speed = row.speed(row.ours)
        cells = [
            row.work, _text(row.peer), _text(row.limit), f"{sign} {_text(row.must)}",
            f"{sign} {_text(row.wished)}", _text(row.ours),
            "–" if speed is None else f"{speed:.2f}", row.verdict,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    note = "† bound by arithmetic"
    note += ": aims scaled by this run's matmul rate." if any(r.is_scaled for r in rows) else "."
    return "\n".join(lines) + f"\n\n{note}\n"


def lesser_table(lines: list[Result]) -> str:
    """Everything else that was measured and is worth a look."""
    peer = json.loads(PEER.read_text())["figures"]
    text = "| measurement | figure | ours | vLLM 0.26 |\n|---|---|---|---|\n"
    for (model, measure, figure), value in medians(lines).items():
        if figure in LESSER_FIGURES:
            theirs = peer.get(model, {}).get(measure, {}).get(figure)
            text += f"| {model} {measure} | {figure} | {_text(value)} | {_text(theirs)} |\n"
    return text


def _text(value: float | None) -> str:
    """Three digits, more for large numbers."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def plot(rows: list[Row], path: Path) -> None:
    """Bars: how many times as fast as the peer we are, with marks for the limit and the aim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.speed(row.ours) is not None][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(shown)))
    places = range(len(shown))
    axes.barh(places, [_cut(r.speed(r.ours)) for r in shown], color="#4c78a8", label="ours")
    for name, marker, values in (
        ("must", "|", [row.speed(row.must) for row in shown]),
        ("limit of the machine", "D", [row.speed(row.limit) for row in shown]),
    ):
        known = [(_cut(v), y) for y, v in zip(places, values, strict=True) if v is not None]
        style = {"marker": marker, "color": "black", "linestyle": "none", "markersize": 7}
        axes.plot([x for x, _ in known], [y for _, y in known], label=name, **style)
    axes.axvline(1.0, color="#e45756", linewidth=1, label="vLLM 0.26")
    axes.set_yticks(list(places), [row.work for row in shown], fontsize=7)
    axes.set_xlabel("times as fast as vLLM 0.26 on the same kind of GPU")
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _cut(speed: float | None) -> float:
    return min(speed or 0.0, MAX_BAR)
