"""How fast is adversarial BN fine-tuning, against attack packages with a plain loop and against careful PyTorch?

    python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --compile --out benchmarks/results/throughput-cuda.json

A step is PGD-10 (L-infinity, eps 8/255) and an SGD step on gamma and beta. In each round every contender in turn
starts from the same weights and takes ``--steps`` steps after a first one, on the same batches of random images; a
round to warm up is not counted, and ratios are of the same round. Set-up is what the first step takes beyond a usual
one. Rounds also hold the attack alone and convolutions alone, the best of which is the limit that the attack's share
is of. Peak memory is what two steps add, in a process for each contender. AutoAttack runs on a ResNet-20 whose BN
layers were fine-tuned on the sample in ``examples/data``, once as ``evaluate`` does it and once by hand.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import torch
import torch.nn.functional as F
from cifar10 import Batches, floats, sample
from contenders import (
    BASELINE,
    CAREFUL,
    COMPILED,
    CONTENDERS,
    EPS,
    LR,
    MOMENTUM,
    STEP,
    WEIGHT_DECAY,
    Batch,
    Case,
    Run,
    contender,
    existing,
    memory_in_subprocess,
    now,
    peak_memory,
    step_seconds,
    torchattacks_pgd,
)
from environment import environment
from resnet import ResNet, resnet20
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bnsurgery import PGD, Engine, adv_finetune, evaluate
from bnsurgery._allocator import keeping_memory
from bnsurgery._replicas import Replicas, craft_on_copy
from bnsurgery.engine import dtype_for

CASES = {
    "resnet20-w16": Case(width=16),
    "resnet20-w64": Case(width=64),
    "resnet18": Case("resnet18", batch=16, size=224, classes=1000),
    "mobilenet_v2": Case("mobilenet_v2", batch=16, size=224, classes=1000),
    "densenet121": Case("densenet121", batch=16, size=224, classes=1000),
}
CONVOLUTIONS = ((64, 32), (128, 16), (256, 8), (256, 14), (512, 7))
"""Channels, and height and width, of the 3x3 convolutions whose best rate is the limit."""
OURS, PEER = "bnsurgery, attack alone", "torchattacks, attack alone"
SHOWN = {"bnsurgery": "bnsurgery", "bnsurgery float32": "bnsurgery, float32", COMPILED: "bnsurgery, compiled"}
SHOWN |= {"careful": "careful PyTorch", "foolbox": "foolbox + loop", "ART": "ART + loop"}
SEED = 0


def main() -> int:
    """The command."""
    args = arguments()
    device = torch.device(args.device)
    if args.memory_of is not None:
        print(json.dumps(peak_memory(args.memory_of, case_of(args.model, args.quick), device, SEED)))
        return 0
    if args.only_plot:
        plot(json.loads(args.out.read_text(encoding="utf-8")), args.out.with_suffix(".png"))
        return 0
    found = environment(__file__)
    try:
        record = existing(args.out, found, args.device)
    except ValueError as error:
        sys.exit(str(error))
    record = record or {"device": args.device, "models": {}, "autoattack": {}}
    record |= {"environment": found, "settings": settings()}
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    for name in args.models:
        case = case_of(name, args.quick)
        print(f"\n{name}, batch {case.batch}, {case.size} x {case.size}, {args.device}", flush=True)
        measured = measure(case, device, args)
        if args.memory:
            measured["peak_mebibytes"] = memory(name, measured["step_seconds"], args)
        measured["summary"] = summary(measured)
        record["models"][name] = {"command": found["command"], "case": asdict(case), "seed": SEED} | measured
        write()
        show(measured)
    for name in args.models:
        if args.autoattack and name.startswith("resnet20") and (args.autoattack_64 or name != "resnet20-w64"):
            result = autoattack(CASES[name].width, device, args)
            if result is not None:
                record["autoattack"][name] = {"command": found["command"]} | result
                write()
    if args.plot:
        plot(record, args.out.with_suffix(".png"))
    return 0


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender in a round")
    parser.add_argument("--compile", action="store_true", help="measure compile=True too")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--no-autoattack", dest="autoattack", action="store_false")
    parser.add_argument("--no-autoattack-64", dest="autoattack_64", action="store_false")
    parser.add_argument("--autoattack-examples", type=int, default=64)
    parser.add_argument(
        "--autoattack-examples-64", type=int, default=16, help="width 64: minutes a robust one on a CPU"
    )
    parser.add_argument("--finetune-steps", type=int, default=150, help="of width 16, before AutoAttack")
    parser.add_argument("--finetune-steps-64", type=int, default=20, help="of width 64, before AutoAttack")
    parser.add_argument("--train-steps-64", type=int, default=60, help="clean training of width 64 before that")
    parser.add_argument("--out", type=Path, help="default: results/throughput.json here")
    parser.add_argument("--plot", action="store_true", help="write a PNG next to the JSON")
    parser.add_argument("--only-plot", action="store_true", help="measure nothing: draw what --out holds")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, and no more")
    parser.add_argument("--memory-of", choices=CONTENDERS, help="print the peak memory of this contender, and end")
    parser.add_argument("--model", choices=CASES, default="resnet20-w16", help="for --memory-of")
    args = parser.parse_args()
    if min(args.repeats, args.steps) < 1:
        parser.error("--repeats and --steps must be at least 1")
    if args.quick:
        args.repeats, args.steps, args.autoattack_examples = min(args.repeats, 2), 1, 4
        args.autoattack_64 = False
        args.finetune_steps = 2
    if args.out is None:
        args.out = ROOT / "benchmarks" / "results" / f"throughput{'-quick' if args.quick else ''}.json"
    return args


def case_of(name: str, quick: bool) -> Case:
    """What is measured under a name."""
    case = CASES[name]
    return replace(case, batch=8, size=min(case.size, 64), attack_steps=2) if quick else case


def settings() -> dict[str, Any]:
    """What all contenders share."""
    return {
        "attack": f"PGD, linf, eps {EPS:.6f}, step {STEP:.6f}, random start, evaluation mode",
        "optimizer": f"SGD on gamma and beta, lr {LR}, momentum {MOMENTUM}, nesterov, weight decay {WEIGHT_DECAY}",
        "data": "uniform random images in [0, 1], random labels, the same batches for all",
        "careful": "channels_last, requires_grad off in the attack; of float32 and bfloat16 autocast the faster one",
    }


def measure(case: Case, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Raw times of rounds of all contenders, of the attack alone and of convolutions alone."""
    model = case.model(device, SEED)
    batches = case.batches(args.steps + 1, device, SEED)
    dtype = dtype_for(model, "auto", lower=True) or torch.float32
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}

    def leave_out(name: str, error: Exception) -> None:
        left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"  {name} left out: {left_out[name]}", flush=True)

    for name in CONTENDERS:
        if name == COMPILED and not args.compile:
            continue
        try:
            runs[name] = contender(name, case)
        except ImportError as error:
            leave_out(name, error)
    attacks = attacks_alone(model, case, batches[0], with_peer=BASELINE in runs)
    # Few examples leave wide accelerators idle; there the limit is that of a larger batch too.
    sizes = (8,) if args.quick else (32, 64) if device.type == "cpu" else (32, 64, 256)
    rates = [Convolution(*shape, size, dtype, device) for shape in CONVOLUTIONS for size in sizes]

    found: dict[str, Any] = {
        "repeats": args.repeats,
        "steps": args.steps,
        "precision": str(dtype).removeprefix("torch."),
        "left_out": left_out,
        "first_step_of_all_seconds": {},
    }
    times: dict[str, list[list[float]]] = {}
    alone: dict[str, list[float]] = {name: [] for name in attacks}
    limit: dict[str, list[float]] = {convolution.name: [] for convolution in rates}
    for name, run in runs.items():
        try:
            (first,) = step_seconds(run, copy.deepcopy(model), batches[:1], device)
        except Exception as error:  # noqa: PERF203 - once for each contender
            if name == "bnsurgery":
                raise
            leave_out(name, error)
        else:
            found["first_step_of_all_seconds"][name], times[name] = first, []
    for attack in attacks.values():
        attack()
    for convolution in rates:
        convolution.warm_up(0.005 if args.quick else 0.1)
    for round_ in range(args.repeats):
        for name in times:
            times[name].append(step_seconds(runs[name], copy.deepcopy(model), batches, device))
        for name, attack in attacks.items():
            gc.collect()
            began = now(device)
            attack()
            alone[name].append(now(device) - began)
        for convolution in rates:
            limit[convolution.name].append(convolution.rate())
        print(f"  round {round_ + 1} of {args.repeats}", file=sys.stderr, flush=True)
    return found | {
        "step_seconds": times,
        "attack_alone_seconds": alone,
        "attack_flop_per_image": attack_flop(model, case, batches[0][0][:1]),
        "convolution_flop_per_second": limit,
        "batch": case.batch,
    }


def attacks_alone(model: nn.Module, case: Case, batch: Batch, *, with_peer: bool) -> dict[str, Callable[[], Tensor]]:
    """The attack of a step by itself, with the refresh of the engine's copy."""
    x, y = batch
    model = copy.deepcopy(model)
    peer = copy.deepcopy(model)
    replicas = Replicas(model, Engine(), dtype=dtype_for(model, "auto", lower=True), compile=False)
    generator = torch.Generator().manual_seed(SEED)
    pgd = PGD(EPS, case.attack_steps, STEP)

    def ours() -> Tensor:
        with keeping_memory(x.device):  # as a fine-tuning run does
            replica = replicas.fresh(x)
            if replica is None:
                raise RuntimeError("the engine could not copy this model")
            return craft_on_copy(replica, pgd, x, y, generator=generator)

    attacks: dict[str, Callable[[], Tensor]] = {OURS: ours}
    if with_peer:
        theirs = torchattacks_pgd(case)(peer)
        attacks[PEER] = lambda: theirs(x, y)
    return attacks


def attack_flop(model: nn.Module, case: Case, example: Tensor) -> int:
    """FLOP of convolutions and linear layers for one image: forward, and as much again for the input's gradient."""
    counter = FlopCounterMode(display=False)
    model.eval()
    with torch.no_grad(), counter:
        model(example)
    return int(2 * counter.get_total_flops() * case.attack_steps)


class Convolution:
    """A 3x3 convolution and the gradient of its input, channels last: what most of an attack is made of."""

    def __init__(self, channels: int, size: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name = f"{channels} channels, {size} x {size}, batch {batch}"
        self._device = device
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        x = torch.randn(batch, channels, size, size, **options)
        weight = torch.randn(channels, channels, 3, 3, **options) / (3 * channels**0.5)
        self._x, self._weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
        self._gradient = torch.randn_like(self._x)
        self._x.requires_grad_()
        self._flop = 2 * 2 * batch * size**2 * channels**2 * 9
        self._calls = 1

    def warm_up(self, seconds: float) -> None:
        """Finds how many calls take so long."""
        self._seconds()
        self._calls = max(1, math.ceil(seconds / self._seconds()))

    def rate(self) -> float:
        """FLOP/s over these calls."""
        return self._calls * self._flop / self._seconds()

    def _seconds(self) -> float:
        began = now(self._device)
        for _ in range(self._calls):
            torch.autograd.grad(F.conv2d(self._x, self._weight, padding=1), self._x, self._gradient)
        return now(self._device) - began


def memory(name: str, contenders: Mapping[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each contender, in MiB."""
    options = ["--model", name, "--device", args.device, *(["--quick"] if args.quick else [])]
    found = {which: memory_in_subprocess(__file__, which, *options) for which in contenders}
    return {which: peak for which, peak in found.items() if peak is not None}


def summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Rates, ratios to torchattacks with the plain loop, set-up, memory, and the share of the limit."""
    batch = measured["batch"]
    steps = {name: [own[1:] for own in rounds] for name, rounds in measured["step_seconds"].items()}
    usual = {name: statistics.median(itertools.chain(*rounds)) for name, rounds in steps.items()}
    candidates = [name for name in CAREFUL if name in usual]
    best = min(candidates, key=usual.__getitem__) if candidates else None
    peaks = measured.get("peak_mebibytes", {})
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
        }
    medians = {name: statistics.median(own) for name, own in measured["attack_alone_seconds"].items()}
    limits = {name: statistics.median(own) for name, own in measured["convolution_flop_per_second"].items()}
    limit = max(max(own) for own in measured["convolution_flop_per_second"].values())
    achieved = measured["attack_flop_per_image"] * batch / medians[OURS]
    return {
        "contenders": rows,
        "careful": best,
        "ratio_to_careful": None if best is None else ratios(steps, "bnsurgery", best),
        "attack_alone_images_per_second": {name: batch / seconds for name, seconds in medians.items()},
        "convolution_median_flop_per_second": limits,
        "limit_flop_per_second": limit,
        "attack_flop_per_second": achieved,
        "share_of_limit": achieved / limit,
    }


def ratios(steps: Mapping[str, Sequence[Sequence[float]]], name: str, to: str) -> dict[str, float] | None:
    """How many times as fast as another contender, round by round."""
    if name not in steps or to not in steps:
        return None
    paired = [
        statistics.median(other) / statistics.median(own) for own, other in zip(steps[name], steps[to], strict=True)
    ]
    return {"median": statistics.median(paired), "min": min(paired), "max": max(paired)}


def spread(ratio: Mapping[str, float] | None) -> str:
    """A ratio in a table."""
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def show(measured: Mapping[str, Any]) -> None:
    """The table of one model."""
    found = measured["summary"]
    heads = ("", "images/s", f"x {BASELINE}", "set-up s", "cold", "peak MiB", "memory x")
    print(f"  {heads[0]:22}{heads[1]:>10}{heads[2]:>26}{heads[3]:>10}{heads[4]:>9}{heads[5]:>10}{heads[6]:>10}")
    for name, row in found["contenders"].items():
        peak, times = row["peak_mebibytes"], row["memory_ratio"]
        print(
            f"  {name:22}{row['images_per_second']:10.2f}{spread(row['ratio']):>26}{row['set_up_seconds']:10.2f}"
            f"{row['set_up_seconds_cold']:9.2f}{'-' if peak is None else f'{peak:.0f}':>10}"
            f"{'-' if times is None else f'{times:.2f}':>10}"
        )
    if found["careful"] is not None:
        print(f"  careful is {found['careful']!r}; bnsurgery is {spread(found['ratio_to_careful'])} times as fast")
    for name, rate in found["attack_alone_images_per_second"].items():
        print(f"  {name}: {rate:.2f} images/s")
    for name, rate in found["convolution_median_flop_per_second"].items():
        print(f"  {measured['precision']} convolution, {name}: {rate / 1e9:.1f} GFLOP/s")
    print(
        f"  share of the limit: {found['attack_flop_per_second'] / 1e9:.1f} of "
        f"{found['limit_flop_per_second'] / 1e9:.1f} GFLOP/s, {100 * found['share_of_limit']:.0f}%",
        flush=True,
    )


def autoattack(width: int, device: torch.device, args: argparse.Namespace) -> dict[str, Any] | None:
    """Standard AutoAttack through ``evaluate``, and by hand on the same model; None where it is not installed."""
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        print(f"\nAutoAttack left out: {error}", flush=True)
        return None
    model = robust_model(width, device, args).eval()
    images, labels = sample(train=False)
    count = args.autoattack_examples if width == 16 else args.autoattack_examples_64
    x, y = floats(images[:count]).to(device), labels[:count].to(device)

    began = now(device)
    result = evaluate(model, (x, y), attacks="autoattack", batch_size=128, progress=False, seed=SEED)
    ours = now(device) - began

    attack = AutoAttack(model, norm="Linf", eps=EPS, version="standard", seed=SEED, device=device)
    attack.verbose = False
    began = now(device)
    made = attack.run_standard_evaluation(x, y, batch_size=128)
    by_hand = now(device) - began
    with torch.no_grad():
        robust = int((model(made[0] if isinstance(made, tuple) else made).argmax(1) == y).sum())
        correct = int((model(x).argmax(1) == y).sum())

    found = {
        "examples": len(y),
        "batch_size": 128,
        "seed": SEED,
        "finetune_steps": args.finetune_steps if width == 16 else args.finetune_steps_64,
        "train_steps": 0 if width == 16 else args.train_steps_64,
        "correct": correct,
        "robust": {"bnsurgery": int(result.robust.sum()), "by hand": robust},
        "seconds": {"bnsurgery": ours, "by hand": by_hand},
        "ratio": by_hand / ours,
    }
    print(
        f"\nAutoAttack, resnet20-w{width}, {len(y)} examples, {correct} right: evaluate {ours:.1f} s "
        f"({found['robust']['bnsurgery']} robust), by hand {by_hand:.1f} s ({robust} robust): "
        f"{found['ratio']:.2f} times as fast",
        flush=True,
    )
    return found


def robust_model(width: int, device: torch.device, args: argparse.Namespace) -> ResNet:
    """A ResNet-20 with fine-tuned BN layers; width 16 from the shipped weights, others from a short clean training."""
    torch.manual_seed(SEED)
    model = resnet20(width).to(device)
    batch_size = 128 if width == 16 else 64
    batches = Batches(*sample(train=True), batch_size=batch_size, augment=True, drop_last=True, device=device)
    options: dict[str, Any] = {"schedule": "cosine", "seed": SEED, "progress": sys.stderr.isatty()}
    steps = args.finetune_steps
    began = time.perf_counter()
    if width == 16:
        model.load_state_dict(load_file(ROOT / "examples" / "data" / "resnet20-w16.safetensors"))
    else:
        steps = args.finetune_steps_64
        epochs = math.ceil(args.train_steps_64 / len(batches))
        adv_finetune(
            model, batches, epochs=epochs, max_steps=args.train_steps_64, train="all", attack=None, lr=0.05, **options
        )
    epochs = math.ceil(steps / len(batches))
    adv_finetune(model, batches, epochs=epochs, max_steps=steps, lr=0.1, weight_decay=0, **options)
    print(f"\nresnet20-w{width} made ready for AutoAttack in {time.perf_counter() - began:.0f} s", flush=True)
    return model


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Bars of the ratio to torchattacks with the plain loop, and how far the rounds are apart."""
    from matplotlib.figure import Figure

    models = {name: record["models"][name]["summary"]["contenders"] for name in CASES if name in record["models"]}
    models = {name: rows for name, rows in models.items() if any(row["ratio"] for row in rows.values())}
    if not models:
        print(f"nothing to draw: no ratio to {BASELINE}")
        return
    contenders = [name for name in SHOWN if any(name in rows for rows in models.values())]
    colors = dict(zip(SHOWN, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999"), strict=True))
    hatches = dict(zip(SHOWN, ("", "//", "xx", "", "..", "\\\\"), strict=True))
    height = 0.8 / len(contenders)
    figure = Figure(figsize=(7, 1 + 0.19 * (len(contenders) + 1.2) * len(models)), layout="constrained")
    ax = figure.subplots()
    for place, name in enumerate(contenders):
        rows = [(line, own[name]["ratio"]) for line, own in enumerate(models.values()) if name in own]
        medians = [ratio["median"] for _, ratio in rows]
        ends = [[r["median"] - r["min"] for _, r in rows], [r["max"] - r["median"] for _, r in rows]]
        where = [line + (place - (len(contenders) - 1) / 2) * height for line, _ in rows]
        ax.barh(
            where,
            medians,
            0.92 * height,
            xerr=ends,
            color=colors[name],
            hatch=hatches[name],
            edgecolor="black",
            linewidth=0.4,
            error_kw={"elinewidth": 1, "capsize": 2},
            label=SHOWN[name],
        )
        for y, (_, ratio) in zip(where, rows, strict=True):
            ax.annotate(
                f"{ratio['median']:.2f}",
                (ratio["max"], y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    ax.axvline(1, color="black", lw=1, ls="--", label=BASELINE)
    ax.set_yticks(range(len(models)), list(models))
    ax.invert_yaxis()
    ax.margins(x=0.08)
    ax.set(
        xlabel=f"adversarial BN fine-tuning, speed relative to {BASELINE}\n(median and range of the rounds)",
        ylabel="model",
        xlim=(0, None),
    )
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=200)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    sys.exit(main())
