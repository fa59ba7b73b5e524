"""The paper's findings, as checks over result files, each with its margin in standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

from bnsurgery.analysis import weight_shift
from examples.common.checks import Check, Estimate, made
from examples.walter.results import Results
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


def checks(results: Results) -> tuple[list[Check], list[str]]:
    """All that can be checked, and a line for each of the others that says what is missing.

    Raises:
        Problem: a file is damaged.
    """
    return made(_all(results))


def _all(results: Results) -> Iterator[tuple[str, Callable[[str], Check]]]:
    """The findings, and how each is checked."""

    def against(key: str, than: str, bound: float, *, sign: int) -> Callable[[str], Check]:
        return lambda finding: _judged(finding, results, key, than, bound, sign=sign)

    for key in ("bn-stats", "bn-stats-reset"):
        yield "statistics alone give nothing", against(key, "normal", NOTHING, sign=-1)
    yield "parameters and statistics together give a lot", against("bn-params", "normal", LOT, sign=1)
    yield "parameters alone give little", against("bn-only-params", "normal", HALF, sign=-1)
    yield "parameters alone give less than both", against("bn-params", "bn-only-params", 0.0, sign=1)
    yield "parameters alone, at a ruinous clean error", lambda finding: _ruinous(finding, results)
    for key in RANDOM:
        yield "random features give next to nothing", against(key, "normal", LITTLE, sign=-1)
    yield "ADV is the most robust", lambda finding: _most(finding, results)
    yield "+log+conv1 helps little", against("bn-params-log-conv1", "bn-params", LITTLE, sign=-1)
    yield "the mean normalized weight falls", lambda finding: _falls(finding, results)
    yield "BN PARAMS has settled", lambda finding: _settled(finding, results)


def _judged(finding: str, results: Results, key: str, than: str, bound: float, *, sign: int) -> Check:
    gain = results.more_robust(key, than)
    rows = f"{ROWS[key].name} against {ROWS[than].name}"
    side = "above" if sign > 0 else "below"
    text = f"{rows}: {gain.value:.1f} ± {gain.error:.1f} points more robust, {side} {bound:g}"
    return Check(finding, text, sign * gain.beyond(bound))


def _ruinous(finding: str, results: Results) -> Check:
    alone, both = results.clean("bn-only-params"), results.clean("bn-params")
    worse = Estimate(alone.value - both.value, math.hypot(alone.error, both.error))
    text = f"clean error {worse.value:+.1f} ± {worse.error:.1f} points against BN PARAMS, above {LOT:g}"
    return Check(finding, text, worse.beyond(LOT))


def _most(finding: str, results: Results) -> Check:
    gains = {key: results.more_robust("adv", key).value for key in table() if key != "adv"}
    return _judged(finding, results, "adv", min(gains, key=lambda key: gains[key]), 0.0, sign=1)


def _falls(finding: str, results: Results) -> Check:
    """The standard error is that of the mean over the layers, which are no sample: it says how alike they are."""
    normal = results.folded("normal")
    shift = weight_shift(normal, results.folded("bn-params"))
    layers = list(shift.layers.values())
    spread = math.sqrt(sum((layer - shift.mean) ** 2 for layer in layers) / (len(layers) - 1) / len(layers))
    text = (
        f"BN PARAMS - NORMAL {shift.mean:+.3f} ± {spread:.3f} over {len(layers)} layers, "
        f"median {statistics.median(layers):+.3f}"
    )
    if results.training("bn-params-no-decay") is not None:
        without = weight_shift(normal, results.folded("bn-params-no-decay"))
        text += f"; without weight decay {without.mean:+.3f}, median {statistics.median(without.layers.values()):+.3f}"
    return Check(finding, text, Estimate(-shift.mean, spread).beyond(0.0))


def _settled(finding: str, results: Results) -> Check:
    gain = results.more_robust("bn-params-longer", "bn-params")
    text = f"twice the epochs change robust error by {-gain.value:+.1f} ± {gain.error:.1f} points, below {NOTHING:g}"
    return Check(finding, text, (NOTHING - abs(gain.value)) / gain.error)
