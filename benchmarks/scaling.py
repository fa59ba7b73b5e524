"""How time and memory of a fine-tuning step grow with batch size, width, depth and steps of the attack.

    python benchmarks/scaling.py --plot

One factor is varied at a time from ResNet-20 of width 16 with batch 128 and PGD-10. ``bnsurgery.adv_finetune`` with
default settings and torchattacks with the plain loop take turns, round by round, from the same weights on the same
batches of random images; a round to warm up is not counted. Peak memory is what two steps add, in a process for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from contenders import BASELINE, Case, contender, existing, memory_in_subprocess, peak_memory, step_seconds
from environment import environment

ROOT = Path(__file__).parents[1]
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
SEED = 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of each contender in a round")
    parser.add_argument("--out", type=Path, help="default: results/scaling.json here")
    parser.add_argument("--plot", action="store_true", help="write a PNG next to the JSON")
    parser.add_argument("--only-plot", action="store_true", help="measure nothing: draw what --out holds")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, and no more")
    parser.add_argument("--memory-of", choices=PAIR, help="print the peak memory of this contender, and end")
    parser.add_argument("--case", type=json.loads, default={}, help="for --memory-of: what differs from the base")
    args = parser.parse_args()
    if min(args.repeats, args.steps) < 1:
        parser.error("--repeats and --steps must be at least 1")
    if args.out is None:
        args.out = ROOT / "benchmarks" / "results" / f"scaling{'-quick' if args.quick else ''}.json"
    device = torch.device(args.device)
    if args.memory_of is not None:
        print(json.dumps(peak_memory(args.memory_of, replace(BASE, **args.case), device, SEED)))
        return 0
    if args.only_plot:
        plot(json.loads(args.out.read_text(encoding="utf-8")), args.out.with_suffix(".png"))
        return 0
    found = environment(__file__)
    try:
        record = existing(args.out, found, args.device)
    except ValueError as error:
        parser.error(str(error))
    base, factors = (QUICK, QUICK_FACTORS) if args.quick else (BASE, FACTORS)
    record = record or {"device": args.device, "factors": {}}
    record |= {"environment": found, "base": asdict(base), "seed": SEED}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[Case, dict[str, Any]] = {}  # the base is a point of each factor
    for factor in args.factors:
        print(f"\n{LABELS[factor]:12}{'ms a step':>27}{'x faster':>22}{'peak MiB':>22}")
        print(f"{'':12}{'bnsurgery':>12}{'peer':>15}{'':22}{'bnsurgery':>13}{'peer':>9}")
        points = {}
        for value in factors[factor]:
            case = replace(base, **{factor: value})
            if case not in measured:
                measured[case] = measure(case, device, args)
            points[str(value)] = measured[case]
            show(value, measured[case])
        record["factors"][factor] = points
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(record, args.out.with_suffix(".png"))
    return 0


def measure(case: Case, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Times and peak memory of both."""
    model, batches = case.model(device, SEED), case.batches(args.steps + 1, device, SEED)
    runs = {name: contender(name, case) for name in PAIR}
    times: dict[str, list[list[float]]] = {name: [] for name in PAIR}
    for round_ in range(args.repeats + 1):
        for name, run in runs.items():
            took = step_seconds(run, copy.deepcopy(model), batches if round_ else batches[:1], device)
            if round_:
                times[name].append(took)
    options = ["--case", json.dumps(asdict(case)), "--device", args.device]
    usual = {name: [statistics.median(own[1:]) for own in rounds] for name, rounds in times.items()}
    paired = [peer / own for own, peer in zip(usual["bnsurgery"], usual[BASELINE], strict=True)]
    return {
        "repeats": args.repeats,
        "steps": args.steps,
        "step_seconds": times,
        "seconds": {name: statistics.median(own) for name, own in usual.items()},
        "ratio": {"median": statistics.median(paired), "min": min(paired), "max": max(paired)},
        "peak_mebibytes": {name: memory_in_subprocess(__file__, name, *options) for name in PAIR},
    }


def show(value: int, point: Mapping[str, Any]) -> None:
    """A line of the table."""
    ours, peer = (1000 * point["seconds"][name] for name in PAIR)
    ratio = f"{point['ratio']['median']:.2f} ({point['ratio']['min']:.2f} to {point['ratio']['max']:.2f})"
    peaks = ["-" if peak is None else f"{peak:.0f}" for peak in (point["peak_mebibytes"][name] for name in PAIR)]
    print(f"{value:<12}{ours:12.1f}{peer:15.1f}{ratio:>22}{peaks[0]:>13}{peaks[1]:>9}", flush=True)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Time above, memory below, a column for each factor."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullFormatter, NullLocator

    styles: dict[str, dict[str, Any]] = {
        "bnsurgery": {"color": "#0072B2", "marker": "o"},
        BASELINE: {"color": "#D55E00", "marker": "s", "ls": "--"},
    }
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 4, sharex="col", sharey="row")
    for column, factor in enumerate(FACTORS):
        points = {int(value): point for value, point in record["factors"].get(factor, {}).items()}
        time_ax, memory_ax = axes[:, column]
        for name, style in styles.items():
            rounds = [[statistics.median(own[1:]) for own in p["step_seconds"][name]] for p in points.values()]
            middle = [statistics.median(own) for own in rounds]
            ends = [
                [m - min(own) for m, own in zip(middle, rounds, strict=True)],
                [max(own) - m for m, own in zip(middle, rounds, strict=True)],
            ]
            time_ax.errorbar(list(points), middle, yerr=ends, ms=4, capsize=2, label=name, **style)
            known = {value: point["peak_mebibytes"][name] for value, point in points.items()}
            known = {value: peak for value, peak in known.items() if peak is not None}
            memory_ax.plot(list(known), list(known.values()), ms=4, **style)
        for ax in (time_ax, memory_ax):
            ax.set(xscale="log", yscale="log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(LogFormatter())
            ax.grid(alpha=0.3)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xticks(list(points), [str(value) for value in points])
        memory_ax.set_xlabel(LABELS[factor])
    axes[0, 0].set_ylabel("time of a step (s)")
    axes[1, 0].set_ylabel("peak memory of a step (MiB)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=200)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    sys.exit(main())
