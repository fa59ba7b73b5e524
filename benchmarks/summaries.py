"""What the raw times of fine-tuning steps come to: rates, ratios, bounds, and the share of the limit."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from contenders import BASELINE, CAREFUL
from measuring import middle, spread

OURS, PEER = "bnsurgery, attack alone", "torchattacks, attack alone"


def summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Rates, ratios to torchattacks with the plain loop, set-up, memory, and the share of the limit."""
    batch = measured["batch"]
    steps = {name: [own[1:] for own in rounds] for name, rounds in measured["step_seconds"].items()}
    usual = {name: statistics.median(itertools.chain(*rounds)) for name, rounds in steps.items()}
    candidates = [name for name in CAREFUL if name in usual]
    best = min(candidates, key=usual.__getitem__) if candidates else None
    peaks = {name: statistics.median(own) for name, own in measured.get("peak_mebibytes", {}).items()}
    tensors = measured.get("peak_mebibytes_of_tensors", {})
    rows = {}
    for name, seconds in usual.items():
        first = [own[0] for own in measured["step_seconds"][name]]
        rows["careful" if name == best else name] = {
            "images_per_second": batch / seconds,
            "ratio": ratios(steps, name, BASELINE),
            "set_up_seconds": statistics.median(first) - seconds,
            "set_up_seconds_cold": measured["first_step_of_all_seconds"][name] - seconds,
            "peak_mebibytes": peaks.get(name),
            "memory_ratio": peaks[name] / peaks[BASELINE] if {name, BASELINE} <= set(peaks) else None,
            "peak_mebibytes_of_tensors": tensors.get(name),
        }
    medians = {name: statistics.median(own) for name, own in measured["attack_alone_seconds"].items()}
    limits = {name: statistics.median(own) for name, own in measured["convolution_flop_per_second"].items()}
    limit = max(max(own) for own in measured["convolution_flop_per_second"].values())
    attack_steps = measured["case"]["attack_steps"]

    def least(kind: str) -> tuple[float, float] | None:
        """Seconds of a step's passes, and of those of the attack, of parts of the network alone."""
        own = {pass_: statistics.median(seconds) for pass_, seconds in measured.get(kind, {}).items()}
        if not own:
            return None
        attack = attack_steps * own["pass of the attack"]
        return attack + own["pass of the update"], attack

    bounds = {kind: least(f"{kind}_of_network_seconds") for kind in ("convolutions", "operations")}
    operations = bounds["operations"]
    achieved = measured["attack_flop_per_image"] * batch / medians[OURS]
    return {
        "contenders": rows,
        "careful": best,
        "bounds": {kind: usual[BASELINE] / own[0] for kind, own in bounds.items() if own and BASELINE in usual},
        "ratio_to_careful": None if best is None else ratios(steps, "bnsurgery", best),
        "attack_alone_images_per_second": {name: batch / seconds for name, seconds in medians.items()},
        "convolution_median_flop_per_second": limits,
        "limit_flop_per_second": limit,
        "attack_flop_per_second": achieved,
        "share_of_limit": achieved / limit,
        "share_of_limit_by_operations": None
        if operations is None
        else measured["attack_flop_per_image"] * batch / operations[1] / limit,
    }


def ratios(steps: Mapping[str, Sequence[Sequence[float]]], name: str, to: str) -> dict[str, float] | None:
    """How many times as fast as another contender, round by round."""
    if name not in steps or to not in steps:
        return None
    paired = [
        statistics.median(other) / statistics.median(own) for own, other in zip(steps[name], steps[to], strict=True)
    ]
    return middle(paired)


def show(measured: Mapping[str, Any]) -> None:
    """The table of one model."""
    found = measured["summary"]
    heads = ("", "images/s", f"x {BASELINE}", "set-up s", "cold", "peak MiB", "memory x", "tensors MiB")
    print(
        f"  {heads[0]:22}{heads[1]:>10}{heads[2]:>26}{heads[3]:>10}{heads[4]:>9}{heads[5]:>10}{heads[6]:>10}"
        f"{heads[7]:>13}"
    )
    for name, row in found["contenders"].items():
        peak, times, alive = (row[key] for key in ("peak_mebibytes", "memory_ratio", "peak_mebibytes_of_tensors"))
        print(
            f"  {name:22}{row['images_per_second']:10.2f}{spread(row['ratio']):>26}{row['set_up_seconds']:10.2f}"
            f"{row['set_up_seconds_cold']:9.2f}{'-' if peak is None else f'{peak:.0f}':>10}"
            f"{'-' if times is None else f'{times:.2f}':>10}{'-' if alive is None else f'{alive:.0f}':>13}"
        )
    if found["careful"] is not None:
        print(f"  careful is {found['careful']!r}; bnsurgery is {spread(found['ratio_to_careful'])} times as fast")
    for kind, bound in found["bounds"].items():
        print(f"  the network's {kind} alone would be {bound:.2f} times as fast as {BASELINE}")
    for name, rate in found["attack_alone_images_per_second"].items():
        print(f"  {name}: {rate:.2f} images/s")
    for name, rate in found["convolution_median_flop_per_second"].items():
        print(f"  {measured['precision']} convolution, {name}: {rate / 1e9:.1f} GFLOP/s")
    alone = found["share_of_limit_by_operations"]
    print(
        f"  share of the limit: {found['attack_flop_per_second'] / 1e9:.1f} of "
        f"{found['limit_flop_per_second'] / 1e9:.1f} GFLOP/s, {100 * found['share_of_limit']:.0f}%"
        f"{'' if alone is None else f' ({100 * alone:.0f}% with the operations of the network alone)'}",
        flush=True,
    )
