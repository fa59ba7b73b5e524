"""How fast is training through mixture BN (Xie and Yuille), against what is written by hand, in one pass or two?

    python benchmarks/mixture.py
    python benchmarks/mixture.py --device cuda

A step takes a batch of images twice: one half stays clean and goes through the clean BN, the other is attacked by
PGD-10 (L-infinity, eps 8/255, evaluation mode) through the adversarial BN and goes through it; then SGD on all
parameters. By hand that is a module with two BN layers and a switch, torchattacks' PGD, and a pass for each half;
*careful* does without what only makes it slow (images with channels innermost, no gradient of parameters in the
attack, autocast to bfloat16 in the attack alone or throughout). In each round every contender in turn starts from the
same weights and takes ``--steps`` steps after a first one, on the same batches of random images; a round to warm up is
not counted, and ratios are of the same round.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from contenders import LR, MOMENTUM, WEIGHT_DECAY, Attack, Batch, Case, Run, careful_pgd, torchattacks_pgd
from contenders import bnsurgery as fine_tuning
from measuring import SEED, middle, opened, parsed, parser_of_steps, spread, step_seconds
from torch import Tensor, nn

from bnsurgery import split_bn

CASES = {"resnet20-w16": Case(width=16), "resnet20-w64": Case(width=64)}
BASELINE = "torchattacks + two passes"
OPTIONS: dict[str, Any] = {
    "train": "all",
    "clean_fraction": 0.5,
    "lr": LR,
    "momentum": MOMENTUM,
    "weight_decay": WEIGHT_DECAY,
}
"""Of ``adv_finetune``, as of the loop by hand."""


class TwoBN(nn.Module):
    """The layer that users write: two BN layers and a switch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.clean, self.adv, self.through = layer, copy.deepcopy(layer), "clean"

    def forward(self, x: Tensor) -> Tensor:
        """Through the one that is switched on, or half through each."""
        if self.through == "both":
            clean, adversarial = x.chunk(2)
            return torch.cat([self.clean(clean), self.adv(adversarial)])
        return (self.adv if self.through == "adv" else self.clean)(x)  # type: ignore[no-any-return]


def split_by_hand(model: nn.Module) -> nn.Module:
    """The model with two BN layers in the place of each, itself."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, TwoBN(child))
    return model


def switch(model: nn.Module, through: str) -> None:
    """Of all layers."""
    for module in model.modules():
        if isinstance(module, TwoBN):
            module.through = through


class Doubled(Sequence[Batch]):
    """Each batch twice, made when it is asked for, as a loader would."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        x, y = self.batches[index]
        return torch.cat([x, x]), torch.cat([y, y])


def ours(case: Case, **options: Any) -> Run:
    """``adv_finetune`` of a model that ``split_bn`` has split, in one pass."""
    inner = fine_tuning(case, **OPTIONS, **options)

    def run(model: nn.Module, batches: Sequence[Batch], done: Callable[[], None]) -> None:
        inner(split_bn(model, ("clean", "adv")), Doubled(batches), done)

    return run


def by_hand(make: Callable[[nn.Module], Attack], *, bfloat16: bool = False, one_pass: bool = False) -> Run:
    """The loop that users write; ``bfloat16``: its passes under autocast too."""

    def run(model: nn.Module, batches: Sequence[Batch], done: Callable[[], None]) -> None:
        model = split_by_hand(model)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        attack = make(model)
        for x, y in batches:
            switch(model, "adv")
            adversarial = attack(x, y)
            model.train()
            optimizer.zero_grad(set_to_none=True)
            parts = [("clean", x, y), ("adv", adversarial, y)]
            if one_pass:
                parts = [("both", torch.cat([x, adversarial]), torch.cat([y, y]))]
            total = torch.zeros((), device=x.device)
            for through, images, labels in parts:
                switch(model, through)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels) / len(parts)
                loss.backward()
                total += loss.detach()
            optimizer.step()
            if not total.isfinite():  # what any loop that says how it goes reads, once a step
                raise RuntimeError("the loss is not finite")
            done()

    return run


CONTENDERS: dict[str, Callable[[Case], Run]] = {
    "bnsurgery": ours,
    "bnsurgery, float32": lambda case: ours(case, precision="float32"),
    "bnsurgery, bfloat16 throughout": lambda case: ours(case, step_precision="auto"),
    BASELINE: lambda case: by_hand(torchattacks_pgd(case)),
    "careful, float32": lambda case: by_hand(careful_pgd(case, bfloat16=False)),
    "careful, bfloat16": lambda case: by_hand(careful_pgd(case, bfloat16=True)),
    "careful, bfloat16 throughout": lambda case: by_hand(careful_pgd(case, bfloat16=True), bfloat16=True),
    "careful, float32, one pass": lambda case: by_hand(careful_pgd(case, bfloat16=False), one_pass=True),
    "careful, bfloat16, one pass": lambda case: by_hand(careful_pgd(case, bfloat16=True), one_pass=True),
    "careful, bfloat16 throughout, one pass": lambda case: by_hand(
        careful_pgd(case, bfloat16=True), bfloat16=True, one_pass=True
    ),
}


def measure(case: Case, device: torch.device, *, repeats: int, steps: int) -> dict[str, Any]:
    """Raw times, and what they come to."""
    model = case.model(device, SEED)
    batches = case.batches(steps + 1, device, SEED)
    runs = {name: make(case) for name, make in CONTENDERS.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            took = step_seconds(run, copy.deepcopy(model), batches, device)
            if round_:
                times[name].append(took)
    usual = {name: [statistics.median(own[1:]) for own in rounds] for name, rounds in times.items()}
    rows = {
        name: {
            "images_per_second": case.batch / statistics.median(itertools.chain(*(own[1:] for own in times[name]))),
            "ratio": middle(peer / mine for peer, mine in zip(usual[BASELINE], own, strict=True)),
            "set_up_seconds": middle(took[0] - statistics.median(took[1:]) for took in times[name]),
        }
        for name, own in usual.items()
    }
    return {"step_seconds": times, "contenders": rows, "repeats": repeats, "steps": steps}


def main() -> int:
    """The command."""
    parser = parser_of_steps(__doc__, repeats=5, steps=2, plot=False)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    args = parsed(parser, "mixture")
    if args.quick:
        args.repeats = args.steps = 1
    record, write = opened(args, __file__, {"models": {}})
    for name in args.models:
        case = replace(CASES[name], batch=8, width=8, attack_steps=2) if args.quick else CASES[name]
        print(f"\n{name}, {case.batch} images clean and as many adversarial, {args.device}", flush=True)
        measured = measure(case, torch.device(args.device), repeats=args.repeats, steps=args.steps)
        own = {"command": record["environment"]["command"], "seed": SEED, "case": asdict(case)}
        record["models"][name] = own | measured
        for which, row in measured["contenders"].items():
            speed = f"{row['images_per_second']:10.2f} images/s{spread(row['ratio']):>28} x {BASELINE}"
            print(f"  {which:40}{speed}, set-up {spread(row['set_up_seconds'])} s")
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
