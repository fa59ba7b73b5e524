"""Whether a long run grows: the resident size of a process over thousands of steps, or of calls that raise.

    python benchmarks/growth.py

Each case runs in a process of its own, on a small network: one run of ``adv_finetune`` with so many steps (with
checkpoints, and with batches of changing size); a quarter as many calls of it, of ``evaluate``, of ``recalibrate_bn``
and of what changes or copies a model; and as many calls as steps where each raises in the middle. The resident size is
read 40 times. What counts is the second half: by then libraries have allocated what they keep.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import torch
from measuring import opened, parsed, parser_of
from memory import in_subprocess
from resnet import resnet20
from torch import Tensor, nn

from bnsurgery import (
    PGD,
    adv_finetune,
    bn_state,
    evaluate,
    fold_bn,
    freeze_except_bn,
    fuse_bn,
    keep_branch,
    load_bn_state,
    recalibrate_bn,
    replace_bn,
    split_bn,
)

ATTACK = PGD(8 / 255, 2, 4 / 255)
READINGS = 40


class Broken(Exception):  # noqa: N818 - ends a call on purpose
    """Raised in the middle of calls."""


def resident() -> float:
    """MiB that this process holds."""
    gc.collect()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet20(4)


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 3, 32, 32), torch.arange(size) % 10


def read_in_turn(count: int, call: Callable[[], object]) -> list[float]:
    """The resident size 40 times over so many calls."""
    sizes = []
    for number in range(count):
        call()
        if (number + 1) % max(1, count // READINGS) == 0:
            sizes.append(resident())
    return sizes


def raising(call: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    """The same, where a layer raises in the middle of a pass."""

    def broken(model: nn.Module) -> None:
        passes = [0]

        def hook(*_: object) -> None:
            passes[0] += 1
            if passes[0] == 3:
                raise Broken

        handle = model[-1].register_forward_hook(hook) if isinstance(model, nn.Sequential) else None
        handle = handle or next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(hook)
        with suppress(Broken):
            call(model)
        handle.remove()

    return broken


def tuned(model: nn.Module, steps: int = 3) -> object:
    return adv_finetune(model, [batch()] * steps, epochs=1, attack=ATTACK, progress=False)


def surgery(model: nn.Module) -> None:
    """What copies, changes and puts back."""
    x, _ = batch(4)
    with freeze_except_bn(model):
        fold_bn(model)
    fuse_bn(model.eval(), x)
    load_bn_state(model, bn_state(model))
    keep_branch(split_bn(model), "adv")
    replace_bn(model, "layer")


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "adv_finetune": tuned,
    "evaluate": lambda model: evaluate(model, batch(), attacks=["pgd-2"], progress=False),
    "recalibrate_bn": lambda model: recalibrate_bn(model, [batch()] * 3, attack=ATTACK),
    "freeze, fold, fuse, patch, split, replace": surgery,
}


def one_run(count: int, *, sizes: bool = False, checkpoint: bool = False) -> list[float]:
    """One call of ``adv_finetune`` with so many steps."""
    found: list[float] = []

    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(count):
                yield batch(8 + number % 13 if sizes else 16)

    def look(record: Any, _: nn.Module) -> None:
        if (record.step + 1) % max(1, count // READINGS) == 0:
            found.append(resident())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint" if checkpoint else None
        options = {"attack": ATTACK, "train": "all", "lr": 1e-4, "progress": False}
        adv_finetune(network(), Loader(), epochs=1, on_step=look, checkpoint=path, checkpoint_every=0.0, **options)
    return found


def cases(count: int) -> dict[str, Callable[[], list[float]]]:
    """What is measured, by name."""
    model = network()
    found: dict[str, Callable[[], list[float]]] = {
        "one run": lambda: one_run(count),
        "one run, batches of 13 sizes": lambda: one_run(count, sizes=True),
        "one run, a checkpoint after each step": lambda: one_run(count, checkpoint=True),
    }
    for name, call in CALLS.items():
        found[f"calls: {name}"] = lambda call=call: read_in_turn(count // 4, lambda: call(model))
        if name in ("adv_finetune", "evaluate", "recalibrate_bn"):
            broken = raising(call)
            found[f"calls that raise: {name}"] = lambda broken=broken: read_in_turn(count, lambda: broken(model))
    return found


def growth(sizes: list[float]) -> dict[str, float]:
    """Of the readings: where the second half begins and ends (medians of five), and the largest of it."""
    half = sizes[len(sizes) // 2 :]
    begin, end = statistics.median(half[:5]), statistics.median(half[-5:])
    return {"begin": round(begin, 1), "end": round(end, 1), "largest": round(max(half), 1)}


def main() -> int:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--case", help="measure this one here, and print the readings as JSON")
    args = parsed(parser, "growth")
    if args.quick:
        args.steps = 80
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    every = cases(args.steps)
    if args.case:
        import json

        print(json.dumps(every[args.case]()))
        return 0
    record, write = opened(args, __file__, {"growth": {}})
    record["steps"] = args.steps
    for name in every:
        sizes = in_subprocess(__file__, "--case", name, "--steps", str(args.steps))
        record["growth"][name] = {**growth(sizes), "readings": [round(size, 1) for size in sizes]}
        print(
            f"{name:60} {record['growth'][name]['begin']:8.1f} to {record['growth'][name]['end']:8.1f} MiB", flush=True
        )
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
