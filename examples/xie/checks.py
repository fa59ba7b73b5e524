"""The paper's findings, as checks over result files; bounds were set before there were results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from examples.common.checks import Check, paired
from examples.xie.rows import DEPTHS, ROWS, held, key_of
from examples.xie.work import Xie

SOME = 2.0
"""Points of robust error that count; the paper's first finding is 18.3, on ImageNet."""


def findings(lab: Any) -> Iterator[tuple[str, Callable[[str], Check]]]:
    """The findings, and how each is checked."""
    for depth in DEPTHS:
        adv, mix, mbn = (key_of(kind, depth) for kind in ("adv", "mix", "mbn"))
        yield "without clean images, one BN is more robust", _more_robust(lab, adv, mix, SOME)
        yield "mixture BN on the mix is more robust than one BN", _more_robust(lab, mbn, mix, SOME)
        yield "mixture BN keeps the clean error low", _lower_clean(lab, mbn, adv)
    for depth in DEPTHS:
        for kind in ("adv", "mix", "mbn"):
            key = key_of(kind, depth, consistent=True)
            yield "consistent BN makes more robust", _more_robust(lab, key, key_of(kind, depth), 0.0)
    for kind in ("adv", "mbn"):
        for shallow, deep in itertools.pairwise(DEPTHS):
            yield "deeper is more robust", _more_robust(lab, key_of(kind, deep), key_of(kind, shallow), 0.0)


def _flags(lab: Xie, key: str, test: str, branch: str = "adv") -> str:
    return held(lab.tested(key), key, test, branch)


def _more_robust(lab: Xie, key: str, than: str, bound: float) -> Callable[[str], Check]:
    def check(finding: str) -> Check:
        gain = paired(_flags(lab, key, "pgd-20"), _flags(lab, than, "pgd-20"))
        text = f"{ROWS[key].name} against {ROWS[than].name}: {gain.value:+.1f} ± {gain.error:.1f} points under PGD-20"
        return Check(finding, f"{text}, above {bound:g}", gain.beyond(bound))

    return check


def _lower_clean(lab: Xie, key: str, than: str) -> Callable[[str], Check]:
    """Through its clean branch."""

    def check(finding: str) -> Check:
        gain = paired(_flags(lab, key, "clean", "clean"), _flags(lab, than, "clean"))
        text = f"{ROWS[key].name} through its clean BN against {ROWS[than].name}: "
        return Check(finding, f"{text}{gain.value:+.1f} ± {gain.error:.1f} points, above {SOME:g}", gain.beyond(SOME))

    return check
