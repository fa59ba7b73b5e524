"""How fast is adversarial BN fine-tuning, against attack packages with a plain loop and against careful PyTorch?

    python benchmarks/throughput.py --plot
    python benchmarks/throughput.py --device cuda --compile --out benchmarks/results/throughput-cuda.json

A step is PGD-10 (L-infinity, eps 8/255) and an SGD step on gamma and beta. In each round every contender in turn
starts from the same weights and takes ``--steps`` steps after a first one, on the same batches of random images; a
round to warm up is not counted, and ratios are of the same round. Set-up is what the first step takes beyond a usual
one. Rounds also hold the attack alone and convolutions alone, the best of which is the limit that the attack's share
is of. Peak memory is what two steps add, in a process for each contender, as the median of some measurements.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from contenders import (
    BASELINE,
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
    torchattacks_pgd,
)
from figures import bars
from limits import (
    CONVOLUTIONS,
    Convolution,
    Operations,
    Timed,
    convolutions_alone,
    flop_of_pass,
    pass_of_attack,
    pass_of_update,
)
from measuring import (
    SEED,
    now,
    opened,
    parsed,
    parser_of_steps,
    step_seconds,
)
from memory import in_subprocess, peak_memory, peak_of_tensors
from summaries import OURS, PEER, show, summary
from torch import Tensor, nn

from bnsurgery import PGD, Engine
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
OF_MEMORY = ("memory_command", "peak_mebibytes", "peak_mebibytes_of_tensors")


def main() -> int:
    """The command."""
    args = arguments()
    device = torch.device(args.device)
    if args.memory_of is not None:
        measure_of = peak_of_tensors if args.tensors else peak_memory
        print(json.dumps(measure_of(args.memory_of, case_of(args.model, args.quick), device, SEED)))
        return 0
    if args.only_plot:
        bars(json.loads(args.out.read_text(encoding="utf-8")), list(CASES), args.out.with_suffix(".png"))
        return 0
    record, write = opened(args, __file__, {"models": {}})
    record["settings"] = settings()
    for name in args.models:
        case = case_of(name, args.quick)
        print(f"\n{name}, batch {case.batch}, {case.size} x {case.size}, {args.device}", flush=True)
        command = record["environment"]["command"]
        if not args.only_memory:
            known = record["models"].get(name, {})
            kept = {} if args.memory_repeats else {key: known[key] for key in OF_MEMORY if key in known}
            record["models"][name] = {"command": command, "seed": SEED, "case": asdict(case)}
            record["models"][name] |= measure(case, device, args) | kept
        measured = record["models"][name]
        measured["summary"] = summary(measured)
        write()  # what took minutes is safe
        if args.memory_repeats:
            measured |= memory(name, measured["step_seconds"], args)
            measured |= {"memory_command": command, "summary": summary(measured)}
            write()
        show(measured)
    if args.plot:
        bars(record, list(CASES), args.out.with_suffix(".png"))
    return 0


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = parser_of_steps(__doc__, repeats=5, steps=2)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--compile", action="store_true", help="measure compile=True too")
    kept = "measurements of peak memory; 0: keep what --out holds"
    parser.add_argument("--memory-repeats", type=int, default=3, help=kept)
    parser.add_argument("--only-memory", action="store_true", help="add to what --out holds: peak memory alone")
    parser.add_argument("--memory-of", choices=CONTENDERS, help="print the peak memory of this contender, and end")
    parser.add_argument("--tensors", action="store_true", help="for --memory-of: of its tensors alone")
    parser.add_argument("--model", choices=CASES, default="resnet20-w16", help="for --memory-of")
    args = parsed(parser, "throughput")
    if args.quick:
        args.repeats, args.steps, args.memory_repeats = min(args.repeats, 2), 1, min(args.memory_repeats, 1)
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

    bare = {}
    for kind, digits in (("pass of the attack", dtype), ("pass of the update", torch.float32)):
        forward, backward = convolutions_alone(model.eval(), batches[0][0], digits)
        bare[kind] = Timed(lambda forward=forward, backward=backward: (forward(), backward()), device)  # type: ignore[misc]
    x, y = batches[0]
    operations = {}
    if device.type == "cpu":
        operations["pass of the attack"] = Operations(pass_of_attack(model, x, y, dtype), device)
        operations["pass of the update"] = Operations(pass_of_update(model, x, y), device)

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
    for all_ in operations.values():
        all_.warm_up(0.001 if args.quick else 0.01)
    alone_of_network: dict[str, list[float]] = {kind: [] for kind in bare}
    each_alone: dict[str, list[float]] = {kind: [] for kind in operations}
    for round_ in range(args.repeats):
        for name in times:
            times[name].append(step_seconds(runs[name], copy.deepcopy(model), batches, device))
        for name, attack in attacks.items():
            gc.collect()
            with keeping_memory(device, wanted=name == OURS):  # as a fine-tuning run does, from its second step on
                attack()
                began = now(device)
                attack()
                alone[name].append(now(device) - began)
        for convolution in rates:
            limit[convolution.name].append(convolution.rate())
        for kind, pass_ in bare.items():
            with keeping_memory(device):
                pass_.seconds()
                alone_of_network[kind].append(pass_.seconds())
        for kind, all_ in operations.items():
            with keeping_memory(device):
                all_.seconds()
                each_alone[kind].append(all_.seconds())
        print(f"  round {round_ + 1} of {args.repeats}", file=sys.stderr, flush=True)
    return found | {
        "step_seconds": times,
        "attack_alone_seconds": alone,
        "attack_flop_per_image": case.attack_steps * flop_of_pass(model, batches[0][0][:1]),
        "convolution_flop_per_second": limit,
        "convolutions_of_network_seconds": alone_of_network,
        "operations_of_network_seconds": each_alone,
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
        replica = replicas.fresh(x)
        if replica is None:
            raise RuntimeError("the engine could not copy this model")
        return craft_on_copy(replica, pgd, x, y, generator=generator)

    attacks: dict[str, Callable[[], Tensor]] = {OURS: ours}
    if with_peer:
        theirs = torchattacks_pgd(case)(peer)
        attacks[PEER] = lambda: theirs(x, y)
    return attacks


def memory(name: str, contenders: Mapping[str, Any], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Peak memory of each contender, in MiB, so many times; on a CPU once that of its tensors alone."""
    options = ["--model", name, "--device", args.device, *(["--quick"] if args.quick else [])]
    found: dict[str, list[float | None]] = {which: [] for which in contenders}
    for _ in range(args.memory_repeats):
        for which, own in found.items():
            own.append(in_subprocess(__file__, "--memory-of", which, *options))
    peaks = {which: [peak for peak in own if peak is not None] for which, own in found.items()}
    measured: dict[str, dict[str, Any]] = {"peak_mebibytes": {which: own for which, own in peaks.items() if own}}
    if args.device == "cpu":
        tensors = {which: in_subprocess(__file__, "--memory-of", which, "--tensors", *options) for which in contenders}
        measured["peak_mebibytes_of_tensors"] = {which: own for which, own in tensors.items() if own is not None}
    return measured


if __name__ == "__main__":
    sys.exit(main())
