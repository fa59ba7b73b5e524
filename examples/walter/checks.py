"""The paper's findings, as checks over result files, each with its margin in standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnsurgery.analysis import weight_shift
from examples.walter.results import Estimate, Results
from examples.walter.rows import ROWS, table

NOTHING = 2.0
"""Points of robust error below which a row has gained nothing over NORMAL."""
LITTLE = 5.0
"""Likewise, next to nothing, or little."""
LOT = 10.0
"""Points of robust error above which a row has gained a lot."""
RANDOM = ("normal-bn-only", "normal-bn-only-log-conv1", "adv-bn-only", "adv-bn-only-log-conv1")


@dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        finding: of the paper.
        found: what was measured.
        margin: by how many standard errors it holds; negative: it does not.
    """

    finding: str
    found: str
    margin: float

    @property
    def holds(self) -> bool:
        """Whether the result files bear it out."""
        return self.margin >= 0

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        return f"{verdict}  {self.finding}: {self.found} (margin {self.margin:+.1f} standard errors)"


def checks(results: Results) -> list[Check]:
    """All of them.

    Raises:
        Problem: a row is missing or damaged.
    """
    found = []
    for key in ("bn-stats", "bn-stats-reset"):
        gain = results.more_robust(key, "normal")
        found.append(_below("statistics alone give nothing", f"{ROWS[key].name} against NORMAL", gain, NOTHING))
    both = results.more_robust("bn-params", "normal")
    found.append(_above("parameters and statistics together give a lot", "BN PARAMS against NORMAL", both, LOT))
    found.append(
        _above(
            "parameters alone give less",
            "BN PARAMS against BN ONLY PARAMS",
            results.more_robust("bn-params", "bn-only-params"),
            0.0,
        )
    )
    worse = _minus(results.clean("bn-only-params"), results.clean("bn-params"))
    text = f"clean error {worse.value:+.1f} ± {worse.error:.1f} points against BN PARAMS, above {LOT:g}"
    found.append(Check("parameters alone, at a ruinous clean error", text, worse.beyond(LOT)))
    for key in RANDOM:
        gain = results.more_robust(key, "normal")
        found.append(_below("random features give next to nothing", f"{ROWS[key].name} against NORMAL", gain, LITTLE))
    others = {key: results.more_robust("adv", key) for key in table() if key != "adv"}
    key = min(others, key=lambda other: others[other].value)
    found.append(_above("ADV is the most robust", f"ADV against {ROWS[key].name}, the next", others[key], 0.0))
    gain = results.more_robust("bn-params-log-conv1", "bn-params")
    found.append(_below("+log+conv1 helps little", "BN PARAMS +log+conv1 against BN PARAMS", gain, LITTLE))
    shift = weight_shift(results.folded("normal"), results.folded("bn-params"))
    layers = list(shift.layers.values())
    spread = math.sqrt(sum((layer - shift.mean) ** 2 for layer in layers) / (len(layers) - 1) / len(layers))
    falls = Estimate(-shift.mean, spread)
    text = f"BN PARAMS - NORMAL {shift.mean:+.3f} ± {spread:.3f} over {len(layers)} layers"
    found.append(Check("the mean normalized weight falls", text, falls.beyond(0.0)))
    return found


def settled(results: Results) -> Check:
    """Whether training twice as long changes the robust error of BN PARAMS by less than two points.

    Raises:
        Problem: a row is missing or damaged.
    """
    gain = results.more_robust("bn-params-longer", "bn-params")
    text = f"robust error changes by {-gain.value:+.1f} ± {gain.error:.1f} points, below {NOTHING:g} either way"
    return Check("BN PARAMS has settled", text, (NOTHING - abs(gain.value)) / gain.error)


def _below(finding: str, what: str, gain: Estimate, bound: float) -> Check:
    text = f"{what}: {gain.value:.1f} ± {gain.error:.1f} points more robust, below {bound:g}"
    return Check(finding, text, -gain.beyond(bound))


def _above(finding: str, what: str, gain: Estimate, bound: float) -> Check:
    text = f"{what}: {gain.value:.1f} ± {gain.error:.1f} points more robust, above {bound:g}"
    return Check(finding, text, gain.beyond(bound))


def _minus(first: Estimate, second: Estimate) -> Estimate:
    return Estimate(first.value - second.value, math.hypot(first.error, second.error))
