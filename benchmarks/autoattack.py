"""How fast is standard AutoAttack through ``evaluate``, against calling it by hand on the same network?

    python benchmarks/autoattack.py

On ResNet-20 of width 16 and 64 whose BN layers were fine-tuned adversarially on the sample in ``examples/data`` (width
16 from the shipped weights, width 64 after a short clean training). Both ways run once, one after the other, and the
passes through the network are counted by their number of examples; the time of such passes, and of the network's
convolutions alone, is measured after that. This gives two bounds: how fast AutoAttack would be if in the network
nothing but its convolutions took any time, with as many passes as by hand, and with as many as ``evaluate`` makes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import numpy as np
import torch
from cifar10 import Batches, floats, sample
from contenders import EPS
from limits import Timed, convolutions_alone
from measuring import SEED, now, opened, parsed, parser_of
from resnet import ResNet, resnet20
from safetensors.torch import load_file
from torch import Tensor, nn

from bnsurgery import Engine, adv_finetune, evaluate
from bnsurgery._replica import _Net
from bnsurgery._replicas import Replicas

BATCH_SIZE = 128
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Examples in a pass whose time is measured; between two of them it is interpolated."""


class Counting(nn.Module):
    """A network that counts its passes, by the number of examples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward_passes: Counter[int] = Counter()
        self.backward_passes: Counter[int] = Counter()
        self.weight_passes: Counter[int] = Counter()
        """Those of the backward passes that take the gradients of the weights along, as FAB's do."""
        self._last = 0
        asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._handle = asking[0].register_hook(self._reached) if asking else None

    def forward(self, x: Tensor) -> Tensor:
        return self.count(self.model(x))

    def count(self, logits: Tensor) -> Tensor:
        """The logits (N, K) of a pass, which is counted, and its way back where it has one."""
        self.forward_passes[len(logits)] += 1
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def end(self) -> None:
        """Leaves the network's parameters alone."""
        if self._handle is not None:
            self._handle.remove()

    def _back(self, gradient: Tensor) -> None:
        self._last = len(gradient)
        self.backward_passes[self._last] += 1

    def _reached(self, _gradient: Tensor) -> None:
        self.weight_passes[self._last] += 1


@contextmanager
def passes_of_copies() -> Iterator[Counting]:
    """For the block, all passes through the engine's copies are counted."""
    counting, original = Counting(nn.Identity()), _Net.forward
    _Net.forward = lambda self, x: counting.count(original(self, x))  # type: ignore[method-assign]
    try:
        yield counting
    finally:
        _Net.forward = original  # type: ignore[method-assign]


def measure(width: int, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways, what they found, and the bound."""
    from pyautoattack import AutoAttack

    model = robust_model(width, device, args).eval()
    images, labels = sample(train=False)
    count = args.examples if width == 16 else args.examples_64
    x, y = floats(images[:count]).to(device), labels[:count].to(device)

    began = now(device)
    with passes_of_copies() as own:
        result = evaluate(model, (x, y), batch_size=BATCH_SIZE, progress=False, seed=SEED, compile=args.compile)
    ours = now(device) - began

    counting = Counting(model)
    attack = AutoAttack(counting, norm="Linf", eps=EPS, version="standard", seed=SEED, device=device)
    attack.verbose = False
    began = now(device)
    made = attack.run_standard_evaluation(x, y, batch_size=BATCH_SIZE)
    by_hand = now(device) - began
    counting.end()
    with torch.no_grad():
        robust = int((model(made[0] if isinstance(made, tuple) else made).argmax(1) == y).sum())
        correct = int((model(x).argmax(1) == y).sum())
    found = {
        "examples": len(y),
        "batch_size": BATCH_SIZE,
        "seed": SEED,
        "compile": args.compile,
        "finetune_steps": args.finetune_steps if width == 16 else args.finetune_steps_64,
        "train_steps": 0 if width == 16 else args.train_steps_64,
        "correct": correct,
        "robust": {"bnsurgery": int(result.robust.sum()), "by hand": robust},
        "rows": result.record()["rows"],
        "seconds": {"bnsurgery": ours, "by hand": by_hand},
        "ratio": by_hand / ours,
    }
    return found | bounds(model, {"by hand": counting, "bnsurgery": own}, by_hand, device, args)


def bounds(
    model: nn.Module,
    counted: Mapping[str, Counting],
    by_hand: float,
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The best ratios that there can be where AutoAttack's own code and the network's convolutions stay."""
    sizes = (1, 2) if args.quick else SIZES
    calls: dict[str, dict[int, Timed]] = {}
    for size in sizes:
        x = torch.rand(size, 3, 32, 32, device=device)
        forward, backward = convolutions_alone(model, x)
        copies = Replicas(copy.deepcopy(model), Engine(), dtype=None, compile=False)
        replica = copies.fresh(x)
        if replica is None:
            raise RuntimeError("the engine could not copy this model")
        ways = {"convolutions": (forward, lambda f=forward, b=backward: (f(), b()))}  # type: ignore[misc]
        ways |= {"by hand": passes(model, x), "bnsurgery": passes(replica.net, x)}
        for name, (one, both) in ways.items():
            calls.setdefault(f"{name}, forward", {})[size] = Timed(one, device)
            calls.setdefault(f"{name}, forward and backward", {})[size] = Timed(both, device)
        calls.setdefault("by hand, forward and backward with weights", {})[size] = Timed(
            lambda x=x: model(x.detach().requires_grad_()).logsumexp(1).sum().backward(),  # type: ignore[misc]
            device,
        )
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in calls}
    for own in calls.values():
        for call in own.values():
            call.warm_up(0.005 if args.quick else 0.05)
    for _ in range(args.repeats):
        for name, own in calls.items():
            for size, call in own.items():
                seconds[name][size].append(call.seconds())
    usual = {name: {size: float(np.median(took)) for size, took in own.items()} for name, own in seconds.items()}

    def total(name: str, passes: Counting) -> float:
        def of(kind: str, count: Mapping[int, int]) -> float:
            own = usual[f"{name}, {kind}"]
            return sum(times * float(np.interp(n, list(own), list(own.values()))) for n, times in count.items())

        seconds = of("forward", passes.forward_passes - passes.backward_passes)
        if f"{name}, forward and backward with weights" not in usual:
            return seconds + of("forward and backward", passes.backward_passes)
        seconds += of("forward and backward", passes.backward_passes - passes.weight_passes)
        return seconds + of("forward and backward with weights", passes.weight_passes)

    passing = total("by hand", counted["by hand"])
    least = {name: total("convolutions", passes) for name, passes in counted.items()}
    return {
        "forward_passes": {name: dict(sorted(passes.forward_passes.items())) for name, passes in counted.items()},
        "backward_passes": {name: dict(sorted(passes.backward_passes.items())) for name, passes in counted.items()},
        "weight_passes": {name: dict(sorted(passes.weight_passes.items())) for name, passes in counted.items()},
        "pass_seconds": usual,
        "passes_seconds": {name: total(name, passes) for name, passes in counted.items()},
        "convolutions_seconds": least,
        "bounds": {name: by_hand / max(by_hand - passing + took, took) for name, took in least.items()},
    }


def passes(model: nn.Module, x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward pass, and a forward pass with a backward pass to the input."""

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(x)
        return logits

    def both() -> Tensor:
        given = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(given).logsumexp(1).sum(), given)
        return gradient

    return forward, both


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
    print(f"resnet20-w{width} made ready in {time.perf_counter() - began:.0f} s", flush=True)
    return model


def show(name: str, found: Mapping[str, Any]) -> None:
    """What one network's measurement says."""
    seconds, robust, inside = found["seconds"], found["robust"], found["passes_seconds"]
    least, bound = found["convolutions_seconds"], found["bounds"]
    print(
        f"{name}, {found['examples']} examples, {found['correct']} right: evaluate {seconds['bnsurgery']:.1f} s "
        f"({robust['bnsurgery']} robust), by hand {seconds['by hand']:.1f} s ({robust['by hand']} robust): "
        f"{found['ratio']:.2f} times as fast\n"
        f"  passes through the network: by hand {inside['by hand']:.1f} s, with convolutions alone "
        f"{least['by hand']:.1f} s; those of the copy {inside['bnsurgery']:.1f} s, with convolutions alone "
        f"{least['bnsurgery']:.1f} s; bounds of the ratio {bound['by hand']:.2f} and {bound['bnsurgery']:.2f}",
        flush=True,
    )


def main() -> int:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the passes by themselves")
    parser.add_argument("--compile", action="store_true", help="evaluate with compile=True")
    parser.add_argument("--examples", type=int, default=256, help="width 16")
    parser.add_argument("--examples-64", type=int, default=16, help="width 64: minutes a robust one on a CPU")
    parser.add_argument("--finetune-steps", type=int, default=150, help="width 16")
    parser.add_argument("--finetune-steps-64", type=int, default=20, help="width 64")
    parser.add_argument("--train-steps-64", type=int, default=60, help="clean training of width 64 before that")
    args = parsed(parser, "autoattack")
    if args.quick:
        args.widths, args.examples, args.finetune_steps, args.repeats = [16], 4, 2, 1
    record, write = opened(args, __file__, {"networks": {}})
    for width in args.widths:
        name = f"resnet20-w{width}"
        record["networks"][name] = measure(width, torch.device(args.device), args)
        write()
        show(name, record["networks"][name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
