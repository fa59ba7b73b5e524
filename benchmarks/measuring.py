"""Time and memory of fine-tuning steps, and what the scripts that measure them have in common."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import Batch, Run
from environment import environment
from torch import nn

RESULTS = Path(__file__).parent / "results"
ELSEWHERE = Path(__file__).parents[1] / "runs" / "benchmarks"
SEED = 0


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    where = "that in benchmarks/results, or, with other hardware or versions than its, in runs/benchmarks"
    parser.add_argument("--out", type=Path, help=f"the result file; default: {where}")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, and no more")
    return parser


def parser_of_steps(doc: str | None, repeats: int, steps: int, *, plot: bool = True) -> argparse.ArgumentParser:
    """The options of scripts that time contenders step by step, round by round, and may draw."""
    parser = parser_of(doc)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds")
    parser.add_argument("--steps", type=int, default=steps, help="steps of each contender in a round")
    if plot:
        parser.add_argument("--plot", action="store_true", help="write a PNG next to the JSON")
        parser.add_argument("--only-plot", action="store_true", help="measure nothing: draw what --out holds")
    return parser


def parsed(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The options given, with the result file that they stand for."""
    args = parser.parse_args()
    if min(vars(args).get("repeats", 1), vars(args).get("steps", 1)) < 1:
        parser.error("--repeats and --steps must be at least 1")
    if args.out is None:
        args.out = RESULTS / f"{name}{'-quick' if args.quick else ''}.json"
    return args


def opened(
    args: argparse.Namespace, script: str, empty: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The record to add to, from the result file or ``empty``, and what writes it there.

    Where the file in benchmarks/results was made with other versions, hardware or device, as everywhere but on the
    machine that made it, the results go to runs/benchmarks.
    """
    found = environment(script)
    record: dict[str, Any] = {"device": args.device, **empty}
    if not fits(args.out, found, args.device) and args.out.parent == RESULTS:
        args.out = ELSEWHERE / args.out.name
        print(f"benchmarks/results holds those of another machine: these go to {args.out}", flush=True)
    if not fits(args.out, found, args.device):
        sys.exit(f"{args.out} holds results of other versions or another device: name another --out")
    if args.out.exists():
        record = json.loads(args.out.read_text(encoding="utf-8"))
    record["environment"] = found
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    return record, write


def fits(path: Path, found: Mapping[str, Any], device: str) -> bool:
    """Whether results made here may go to a file: there is none, or it was made alike."""
    if not path.exists():
        return True
    record = json.loads(path.read_text(encoding="utf-8"))
    same = all(record["environment"][key] == found[key] for key in ("versions", "hardware"))
    return same and record.get("device", "cpu") == device


def middle(values: Iterable[float]) -> dict[str, float]:
    """Median, least and largest."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(ratio: Mapping[str, float] | None) -> str:
    """The same in words."""
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_seconds(run: Run, model: nn.Module, batches: Sequence[Batch], device: torch.device) -> list[float]:
    """Seconds of each step; those of the first hold all that comes before it."""
    gc.collect()
    stamps = [now(device)]
    run(model, batches, lambda: stamps.append(now(device)))
    return [after - before for before, after in itertools.pairwise(stamps)]
