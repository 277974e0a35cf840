"""What a run measured against which threshold, as a table that a person can read at a glance."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold of one run."""

    what: str
    threshold: str
    measured: str
    is_met: bool


@dataclass(slots=True)
class Outcome:
    """One row of the scoreboard: how much was asked, and what came of it."""

    row: str
    load: str
    checks: list[Check] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def at_most(self, what: str, measured: float, limit: float, unit: str = "") -> None:
        """Note a value that must not be above its limit."""
        self.checks.append(
            Check(what, f"<= {limit:g} {unit}", f"{measured:.3g} {unit}", measured <= limit)
        )

    def at_least(self, what: str, measured: float, limit: float, unit: str = "") -> None:
        """Note a value that must not be below its limit."""
        self.checks.append(
            Check(what, f">= {limit:g} {unit}", f"{measured:.3g} {unit}", measured >= limit)
        )

    def note(self, what: str, measured: float, unit: str = "") -> None:
        """Tell a value that has no threshold."""
        self.checks.append(Check(what, "", f"{measured:.3g} {unit}", is_met=True))

    def none_of(self, what: str, found: Sequence[str]) -> None:
        """Note what an oracle found: nothing, if all is well."""
        self.checks.append(Check(what, "none", str(len(found)), not found))
        self.problems += found

    @property
    def is_passed(self) -> bool:
        """Whether every threshold was met, and there was one."""
        return any(check.threshold for check in self.checks) and all(
            check.is_met for check in self.checks
        )

    def table(self) -> str:
        """One line per threshold, and the first problems in full."""
        lines = [f"{self.row}: {'PASS' if self.is_passed else 'FAIL'}  ({self.load})"]
        for check in self.checks:
            verdict = ("ok" if check.is_met else "FAIL") if check.threshold else ""
            lines.append(
                f"  {check.what:<44} {check.threshold:>18} {check.measured:>16}  {verdict}"
            )
        lines += [f"    {problem[:300]}" for problem in self.problems[:8]]
        if len(self.problems) > 8:
            lines.append(f"    ... and {len(self.problems) - 8} more")
        return "\n".join(lines)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of all lies; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
