"""The paper's findings, as checks over result files; bounds were set before there were results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from examples.benz.rows import EARLY, ROWS
from examples.benz.work import Benz, title_of
from examples.common.checks import Check, Estimate, paired, share
from examples.common.files import Pending

LITTLE = 5.0
"""Points of error that count."""
SIMILAR = 0.05
"""Of LIGS, what counts."""


def findings(lab: Any) -> Iterator[tuple[str, Callable[[str], Check]]]:
    """The findings, and how each is checked."""
    yield "BN lowers LIGS", lambda finding: _similar(finding, lab, "none", "bn")
    for test, name in (("l2", "L2 0.25"), ("linf", "L-infinity 1/255")):
        yield f"BN lowers robustness, {name}", lambda finding, test=test: _robust(finding, lab, "none", "bn", test)
    yield "BN lowers the clean error", lambda finding: _clean(finding, lab)
    yield "with BN, LIGS falls over training", lambda finding: _falls(finding, lab)
    yield "non-robust features are useful", lambda finding: _useful(finding, lab)
    yield "and not robust", lambda finding: _broken(finding, lab)
    yield "D_R makes networks more robust", lambda finding: _robust(finding, lab, "robust-bn", "bn", "l2")
    yield "D_R makes LIGS higher", lambda finding: _similar(finding, lab, "robust-bn", "bn")
    yield "D_rand makes LIGS lower", lambda finding: _similar(finding, lab, "bn", "random-bn")
    yield "with BN, robust features are learned first", lambda finding: _order(finding, lab, first=True)
    yield "with BN, non-robust features overtake them", lambda finding: _order(finding, lab, first=False)
    for target in ("gn", "in"):
        yield (
            "examples of networks without BN transfer better",
            lambda finding, target=target: _transfers(finding, lab, ("none", 0), ("bn", 0), target),
        )
        yield (
            "examples of networks early in training transfer better",
            lambda finding, target=target: _transfers(finding, lab, ("bn", EARLY[-1]), ("bn", 0), target),
        )


def _ligs(found: dict[str, Any]) -> Estimate:
    if found["mean"] is None:
        raise Pending("no example has a LIGS")
    return Estimate(found["mean"], found["standard_error"] or 0.0)


def _similar(finding: str, lab: Benz, higher: str, lower: str) -> Check:
    one, other = (_ligs(lab.tested(key)["tests"]["ligs"]) for key in (higher, lower))
    gap = one.minus(other)
    text = (
        f"{ROWS[higher].name} {one.value:.3f}, {ROWS[lower].name} {other.value:.3f}: {gap.value:+.3f}, above {SIMILAR}"
    )
    return Check(finding, text, gap.beyond(SIMILAR))


def _held(lab: Benz, key: str, test: str) -> str:
    return str(lab.tested(key)["tests"][test]["held"])


def _robust(finding: str, lab: Benz, key: str, than: str, test: str) -> Check:
    gain = paired(_held(lab, key, test), _held(lab, than, test))
    text = f"{ROWS[key].name} against {ROWS[than].name}: {gain.value:+.1f} ± {gain.error:.1f} points more robust"
    return Check(finding, f"{text}, above {LITTLE:g}", gain.beyond(LITTLE))


def _clean(finding: str, lab: Benz) -> Check:
    gain = paired(_held(lab, "bn", "clean"), _held(lab, "none", "clean"))
    return Check(finding, f"by {gain.value:+.1f} ± {gain.error:.1f} points, above 0", gain.beyond(0.0))


def _falls(finding: str, lab: Benz) -> Check:
    measures = lab.trained("bn")["measures"]
    begin, end = (_ligs(measures[epoch]["ligs"]) for epoch in (1, -1))
    fall = begin.minus(end)
    text = (
        f"{begin.value:.3f} after the first epoch, {end.value:.3f} at the end: {fall.value:+.3f}, above {2 * SIMILAR}"
    )
    return Check(finding, text, fall.beyond(2 * SIMILAR))


def _useful(finding: str, lab: Benz) -> Check:
    """A guess would be right on a tenth."""
    held = _held(lab, "random-bn", "clean")
    right = share(held.count("1"), len(held))
    text = f"{ROWS['random-bn'].name} is right on {right.value:.1f} ± {right.error:.1f}%, above 30"
    return Check(finding, text, right.beyond(30.0))


def _broken(finding: str, lab: Benz) -> Check:
    held = _held(lab, "random-bn", "l2")
    right = share(held.count("1"), len(held))
    text = f"{ROWS['random-bn'].name} withstands L2 0.25 on {right.value:.1f} ± {right.error:.1f}%, below {LITTLE:g}"
    return Check(finding, text, -right.beyond(LITTLE))


def _order(finding: str, lab: Benz, *, first: bool) -> Check:
    """By the shares of test images that are taken for t + 1 (robust features) and for t."""
    measures, count = lab.trained("conflicting-bn")["measures"], lab.scale.measured
    found = measures[1] if first else measures[-1]
    robust, other = found["next"] / 100, 1 - found["clean"] / 100
    # Of one sample, shares of exclusive outcomes.
    error = 100 * ((robust + other - (robust - other) ** 2 + 2 / count) / count) ** 0.5
    gap = Estimate(100 * (robust - other) * (1 if first else -1), error)
    when = "after the first epoch" if first else "at the end"
    text = f"t + 1 {100 * robust:.1f}%, t {100 * other:.1f}% {when}"
    return Check(finding, text, gap.beyond(0.0))


def _transfers(finding: str, lab: Benz, key: tuple[str, int], than: tuple[str, int], target: str) -> Check:
    found = lab.matrix()
    column = found.models.index(title_of(target, 0))
    right = found.examples - found.clean_wrong[column]
    if not right:
        raise Pending(f"{ROWS[target].name} gets nothing right that could be broken")
    rates = []
    for source in (key, than):
        broken = found.broken[found.models.index(title_of(*source))][column]
        rates.append(share(broken, right))
    gain = rates[0].minus(rates[1])
    text = (
        f"of what {ROWS[target].name} gets right, examples of {title_of(*key)!r} break {rates[0].value:.1f}%, "
        f"of {title_of(*than)!r} {rates[1].value:.1f}%"
    )
    return Check(finding, text, gain.beyond(0.0))
