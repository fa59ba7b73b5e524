"""The paper's findings, as checks over result files, each with its margin in standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bnsurgery.analysis import weight_shift
from examples.walter.files import Pending
from examples.walter.results import Estimate, Results
from examples.walter.rows import ROWS, table

NOTHING = 2.0
"""Points of robust error: less than that is nothing."""
LITTLE = 5.0
"""Next to nothing, and what +log+conv1 may add."""
LOT = 10.0
"""More than that is a lot, and, of clean error, ruinous."""
HALF = 20.0
"""What parameters alone may give, 14.5 in the paper; together with statistics they give 29.3 there."""
RANDOM = ("normal-bn-only", "normal-bn-only-log-conv1", "adv-bn-only", "adv-bn-only-log-conv1")


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


def checks(results: Results) -> tuple[list[Check], list[str]]:
    """All that can be checked, and for the others what is missing.

    Raises:
        Problem: a file is damaged.
    """
    made: list[Check] = []
    pending: list[str] = []
    for check in _all(results):
        try:
            made.append(check())
        except Pending as missing:  # noqa: PERF203 - of a dozen or so
            pending.append(str(missing))
    return made, pending


def _all(results: Results) -> list[Callable[[], Check]]:
    def below(finding: str, key: str, than: str, bound: float) -> Callable[[], Check]:
        return lambda: _judged(finding, results, key, than, bound, sign=-1)

    def above(finding: str, key: str, than: str, bound: float) -> Callable[[], Check]:
        return lambda: _judged(finding, results, key, than, bound, sign=1)

    return [
        *(below("statistics alone give nothing", key, "normal", NOTHING) for key in ("bn-stats", "bn-stats-reset")),
        above("parameters and statistics together give a lot", "bn-params", "normal", LOT),
        below("parameters alone give little", "bn-only-params", "normal", HALF),
        above("parameters alone give less than both", "bn-params", "bn-only-params", 0.0),
        lambda: _ruinous(results),
        *(below("random features give next to nothing", key, "normal", LITTLE) for key in RANDOM),
        lambda: _most(results),
        below("+log+conv1 helps little", "bn-params-log-conv1", "bn-params", LITTLE),
        lambda: _falls(results),
        lambda: _settled(results),
    ]


def _judged(finding: str, results: Results, key: str, than: str, bound: float, *, sign: int) -> Check:
    gain = results.more_robust(key, than)
    rows = f"{ROWS[key].name} against {ROWS[than].name}"
    side = "above" if sign > 0 else "below"
    text = f"{rows}: {gain.value:.1f} ± {gain.error:.1f} points more robust, {side} {bound:g}"
    return Check(finding, text, sign * gain.beyond(bound))


def _ruinous(results: Results) -> Check:
    alone, both = results.clean("bn-only-params"), results.clean("bn-params")
    worse = Estimate(alone.value - both.value, math.hypot(alone.error, both.error))
    text = f"clean error {worse.value:+.1f} ± {worse.error:.1f} points against BN PARAMS, above {LOT:g}"
    return Check("parameters alone, at a ruinous clean error", text, worse.beyond(LOT))


def _most(results: Results) -> Check:
    gains = {key: results.more_robust("adv", key).value for key in table() if key != "adv"}
    return _judged("ADV is the most robust", results, "adv", min(gains, key=lambda key: gains[key]), 0.0, sign=1)


def _falls(results: Results) -> Check:
    """The standard error is that of the mean over the layers, which are no sample: it says how alike they are."""
    shift = weight_shift(results.folded("normal"), results.folded("bn-params"))
    layers = list(shift.layers.values())
    spread = math.sqrt(sum((layer - shift.mean) ** 2 for layer in layers) / (len(layers) - 1) / len(layers))
    text = (
        f"BN PARAMS - NORMAL {shift.mean:+.3f} ± {spread:.3f} over {len(layers)} layers, "
        f"median {statistics.median(layers):+.3f}"
    )
    return Check("the mean normalized weight falls", text, Estimate(-shift.mean, spread).beyond(0.0))


def _settled(results: Results) -> Check:
    gain = results.more_robust("bn-params-longer", "bn-params")
    text = f"twice the epochs change robust error by {-gain.value:+.1f} ± {gain.error:.1f} points, below {NOTHING:g}"
    return Check("BN PARAMS has settled", text, (NOTHING - abs(gain.value)) / gain.error)
