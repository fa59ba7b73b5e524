"""What records of networks hold: plain values, and whether they are whole."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from examples.common.files import Problem


class Diverged(Problem):
    """The outputs of a network are not finite."""


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values with None for what is not finite, which JSON has no word for."""
    return {
        name: finite(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def held(right: Tensor) -> dict[str, Any]:
    """What is kept of whether each example is right (N,): the error in percent, its standard error, flags."""
    share = float((~right).double().mean())
    return {
        "error": 100 * share,
        "standard_error": 100 * (share * (1 - share) / len(right)) ** 0.5,
        "examples": len(right),
        "held": "".join(str(int(flag)) for flag in right),
    }


def look_at_training(record: dict[str, Any]) -> None:
    """Goes over what a record of training is to hold."""
    _ = record["sha256"], dict(record["needs"]), dict(record["snapshots"]), record["configuration"]["width"]
    _ = [float(epoch["seconds"]) for epoch in record["history"]], float(record["seconds"])
    look_at_measures(record)


def look_at_measures(record: dict[str, Any]) -> None:
    """Goes over what is kept of each epoch."""
    _ = [int(found["epoch"]) for found in record["measures"]]


def look_at_tests(record: dict[str, Any]) -> None:
    """Goes over what a record of an evaluation is to hold."""
    _ = record["sha256"], record["configuration"]["width"], float(record["seconds"]), list(record["calls"])
    for found in record["tests"].values():
        if "held" in found and (len(found["held"]) != found["examples"] or set(found["held"]) - {"0", "1"}):
            raise ValueError("held does not say of each example whether it is right")


def require_finite(key: str, logits: Tensor) -> None:
    """Raises :class:`Diverged` where outputs of a row are not finite."""
    if not bool(logits.isfinite().all()):
        raise Diverged(
            f"{key} has diverged, its outputs are not finite: change its settings in rows.py, and remove "
            "what is kept of it"
        )
