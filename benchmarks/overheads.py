"""What reading, re-estimating and following BN costs: fold_bn, the engine's refresh, recalibrate_bn.

    python benchmarks/overheads.py

For ResNet-20 (width 16 and 64) and torchvision's ResNet-152: the time of ``fold_bn`` and of a refresh of the engine's
copy (float32, and bfloat16 where the hardware has it fast), which runs once in each fine-tuning step; of a plain copy
of the same weights, as they lie and into the layout of the engine's copy, to compare it with; and what
``recalibrate_bn`` takes over the same forward passes in training mode without it. Rounds of these two are interleaved,
with memory once freed kept in the process, and so are rounds of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import torch
import torchvision
from measuring import middle, now, opened, parsed, parser_of
from resnet import resnet20
from torch import Tensor, nn

from bnsurgery import Engine, fold_bn, recalibrate_bn
from bnsurgery._allocator import keeping_memory
from bnsurgery._replicas import Replicas
from bnsurgery.engine import dtype_for

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "resnet20-w16": (lambda: resnet20(16), (128, 3, 32, 32), 16),
    "resnet20-w64": (lambda: resnet20(64), (128, 3, 32, 32), 4),
    "resnet152": (lambda: torchvision.models.resnet152(), (8, 3, 224, 224), 4),
}
"""What builds it, the shape of a batch, and over how many of them statistics are estimated."""


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    began = now(device)
    call()
    return 1000 * (now(device) - began)


def laid_out_copy(targets: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype | None) -> None:
    """In the faster order: the cast first, then the change of layout."""
    for target, weight in zip(targets, weights, strict=True):
        target.copy_(weight if dtype is None or target.is_contiguous() else weight.to(dtype))


def measure(name: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Median, least and largest time of each, in milliseconds."""
    build, shape, count = MODELS[name]
    torch.manual_seed(0)
    model = build().to(device)
    batches = [torch.rand(shape, device=device) for _ in range(count)]
    laid_out = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    weights = [parameter.detach() for parameter in model.parameters() if parameter.dim() > 1]
    copies: dict[str, Callable[[], object]] = {}
    for dtype in dict.fromkeys((None, dtype_for(model, "auto", lower=True))):
        own = Replicas(model, Engine(), dtype=dtype, compile=False)
        own.fresh(batches[0])
        held = [torch.empty_like(weight, dtype=dtype or weight.dtype) for weight in weights]
        title = str(dtype or torch.float32).removeprefix("torch.")
        laid = [h.to(memory_format=torch.channels_last) if h.dim() == 4 else h for h in held]
        copies[f"refresh, {title}"] = lambda own=own: own.fresh(batches[0])  # type: ignore[misc]
        copies[f"copy of the weights, {title}"] = lambda held=held: torch._foreach_copy_(held, weights)  # type: ignore[misc]
        copies[f"copy of the weights into its layout, {title}"] = lambda laid=laid, dtype=dtype: laid_out_copy(
            laid, weights, dtype
        )  # type: ignore[misc]

    def forward() -> None:
        model.train()
        with torch.no_grad():
            for batch in laid_out:
                model(batch)

    def rounds(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {which: [] for which in calls}
        for round_ in range(repeats + 1):
            for which, call in calls.items():
                took = timed(call, device)
                if round_:
                    times[which].append(took)
        return times

    times = rounds({"fold_bn": lambda: fold_bn(model)} | copies)
    with keeping_memory(device):  # page faults, which differ from call to call, would hide a few percent
        passes = rounds({"forward passes": forward, "recalibrate_bn": lambda: recalibrate_bn(model, laid_out)})
    ratios = [a / b for a, b in zip(passes["recalibrate_bn"], passes["forward passes"], strict=True)]
    found = {which: middle(own) for which, own in (times | passes).items()}
    return found | {"recalibrate_bn / forward passes": middle(ratios)}


def main() -> int:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parsed(parser, "overheads")
    if args.quick:
        args.models, args.repeats = ["resnet20-w16"], 1
    record, write = opened(args, __file__, {"milliseconds": {}})
    for name in args.models:
        record["milliseconds"][name] = measure(name, args.repeats, torch.device(args.device))
        print(name)
        for which, own in record["milliseconds"][name].items():
            print(f"  {which:46} {own['median']:9.3f}  ({own['min']:.3f} to {own['max']:.3f})", flush=True)
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
