"""How time and memory of a fine-tuning step grow with batch size, width, depth and steps of the attack.

    python benchmarks/scaling.py --plot

One factor is varied at a time from ResNet-20 of width 16 with batch 128 and PGD-10. ``bnsurgery.adv_finetune`` with
default settings and torchattacks with the plain loop take turns, round by round, from the same weights on the same
batches of random images, each time in a process of its own: memory that the one has got from the system makes the other
faster in the same process. A first step to warm up is not counted. Peak memory is what these steps add.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from contenders import BASELINE, Case
from figures import curves
from measuring import (
    SEED,
    middle,
    now,
    opened,
    parsed,
    parser_of_steps,
    spread,
)
from memory import in_subprocess, peak_memory

BASE = Case(width=16, depth=20, batch=128, attack_steps=10)
FACTORS = {
    "batch": (16, 32, 64, 128, 256),
    "width": (8, 16, 32, 64),
    "depth": (20, 56, 110),
    "attack_steps": (1, 2, 5, 10, 20),
}
QUICK = Case(width=8, depth=8, batch=8, attack_steps=2)
QUICK_FACTORS = {"batch": (4, 8), "width": (4, 8), "depth": (8, 14), "attack_steps": (1, 2)}
LABELS = {"batch": "batch size", "width": "width", "depth": "depth", "attack_steps": "PGD steps"}
PAIR = ("bnsurgery", BASELINE)


def main() -> int:
    """The command."""
    parser = parser_of_steps(__doc__, repeats=3, steps=2)
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--alone", choices=PAIR, help="print times and peak memory of this contender, and end")
    parser.add_argument("--case", type=json.loads, default={}, help="for --alone: what differs from the base")
    args = parsed(parser, "scaling")
    device = torch.device(args.device)
    if args.alone is not None:
        print(json.dumps(alone(args.alone, replace(BASE, **args.case), device, args.steps)))
        return 0
    if args.only_plot:
        curves(json.loads(args.out.read_text(encoding="utf-8")), LABELS, args.out.with_suffix(".png"))
        return 0
    record, write = opened(args, __file__, {"factors": {}})
    if args.quick:
        args.repeats = args.steps = 1
    base, factors = (QUICK, QUICK_FACTORS) if args.quick else (BASE, FACTORS)
    record |= {"base": asdict(base), "seed": SEED}
    commands = record.setdefault("commands", {})
    measured: dict[Case, dict[str, Any]] = {}  # the base is a point of each factor
    for factor in args.factors:
        print(f"\n{LABELS[factor]:12}{'ms a step':>27}{'x faster':>22}{'peak MiB':>22}")
        print(f"{'':12}{'bnsurgery':>12}{'peer':>15}{'':22}{'bnsurgery':>13}{'peer':>9}")
        points = {}
        for value in factors[factor]:
            case = replace(base, **{factor: value})
            if case not in measured:
                measured[case] = measure(case, args)
            points[str(value)] = measured[case]
            show(value, measured[case])
        record["factors"][factor] = points
        commands[factor] = record["environment"]["command"]
        for other, held in record["factors"].items():  # the base is the same point in all of them
            held[str(getattr(base, other))] = measured[base]
        write()
    if args.plot:
        curves(record, LABELS, args.out.with_suffix(".png"))
    return 0


def alone(name: str, case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds of each step after the first, and the peak memory, of one contender in this process."""
    stamps: list[float] = []
    peak = peak_memory(name, case, device, SEED, steps=steps + 1, done=lambda: stamps.append(now(device)))
    return {
        "step_seconds": [after - before for before, after in itertools.pairwise(stamps)],
        "peak_mebibytes": peak,
    }


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Times and peak memory of both, each round in processes of their own."""
    options = ["--case", json.dumps(asdict(case)), "--device", args.device, "--steps", str(args.steps)]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in PAIR}
    for _ in range(args.repeats):
        for name, own in rounds.items():
            found = in_subprocess(__file__, "--alone", name, *options)
            if found is None:
                sys.exit(f"{name} failed at {case}")
            own.append(found)
    times = {name: [found["step_seconds"] for found in own] for name, own in rounds.items()}
    peaks = {name: [found["peak_mebibytes"] for found in own] for name, own in rounds.items()}
    usual = {name: [statistics.median(seconds) for seconds in own] for name, own in times.items()}
    paired = [peer / own for own, peer in zip(usual["bnsurgery"], usual[BASELINE], strict=True)]
    return {
        "repeats": args.repeats,
        "steps": args.steps,
        "step_seconds": times,
        "seconds": {name: statistics.median(own) for name, own in usual.items()},
        "ratio": middle(paired),
        "peak_mebibytes": {name: None if None in own else statistics.median(own) for name, own in peaks.items()},
        "peak_mebibytes_of_rounds": peaks,
    }


def show(value: int, point: Mapping[str, Any]) -> None:
    """A line of the table."""
    ours, peer = (1000 * point["seconds"][name] for name in PAIR)
    peaks = ["-" if peak is None else f"{peak:.0f}" for peak in (point["peak_mebibytes"][name] for name in PAIR)]
    print(f"{value:<12}{ours:12.1f}{peer:15.1f}{spread(point['ratio']):>22}{peaks[0]:>13}{peaks[1]:>9}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
