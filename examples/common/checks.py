"""A paper's findings, as checks over result files, each with its margin in standard errors; and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from examples.common.files import Pending


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, both in the same unit."""

    value: float
    error: float

    def beyond(self, bound: float) -> float:
        """How far above a bound, in standard errors; 0 at the bound itself."""
        distance = self.value - bound
        return distance / self.error if self.error else math.copysign(math.inf, distance) if distance else 0.0

    def minus(self, other: Estimate) -> Estimate:
        """The difference from an independent one."""
        return Estimate(self.value - other.value, math.hypot(self.error, other.error))


@dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        finding: of the paper.
        found: what was measured.
        margin: by how many standard errors it holds; where it does not, it is 0 or less.
    """

    finding: str
    found: str
    margin: float

    @property
    def holds(self) -> bool:
        """Whether the result files bear it out."""
        return self.margin > 0

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        chance = ", which may be chance" if 0 < self.margin < 2 else ""
        return f"{verdict}  {self.finding}: {self.found} (margin {self.margin:+.1f} standard errors{chance})"


def made(findings: Iterable[tuple[str, Callable[[str], Check]]]) -> tuple[list[Check], list[str]]:
    """All that can be checked, and a line for each of the others that says what is missing.

    Raises:
        Problem: a file is damaged.
    """
    done: list[Check] = []
    pending: list[str] = []
    for finding, check in findings:
        try:
            done.append(check(finding))
        except Pending as missing:  # noqa: PERF203 - of a dozen or so
            pending.append(f"waits  {finding}: {missing}")
    return done, pending


def share(wrong: int, count: int) -> Estimate:
    """A share in percent, and its standard error, which is not 0 where none or all are wrong."""
    smoothed = (wrong + 1) / (count + 2)
    return Estimate(100 * wrong / count, 100 * math.sqrt(smoothed * (1 - smoothed) / count))


def paired(one: str, other: str) -> Estimate:
    """By how many points more of the same examples ``one`` holds than ``other``: a string of 1 and 0 each.

    The standard error is that of pairs: of examples that one of the two holds and the other does not.
    """
    pairs = list(zip(one, other, strict=True))
    won, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    # One more each way: with no pair that differs, as for two rows that are broken wholly, it would be 0.
    spread = (won + 1) + (lost + 1) - (won - lost) ** 2 / len(pairs)
    return Estimate(100 * (won - lost) / len(pairs), 100 * math.sqrt(spread) / len(pairs))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
