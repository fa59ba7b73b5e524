"""Fine-tunes the batch normalization of a trained ResNet-20 adversarially, and measures the effect.

    python examples/quickstart.py

Loads the shipped network (width 16, trained clean on all of CIFAR-10) and the shipped sample of it, measures clean
and robust error (PGD-20 and AutoAttack, L-infinity, eps 8/255) on the first test images, trains gamma, beta and the
statistics of its BN layers on adversarial examples, and measures again. Writes the BN patch, a JSON record and two
figures. All that differs between the two networks is in the patch.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import bnsurgery
from bnsurgery import PGD, adv_finetune, evaluate, fold_bn, freeze_except_bn, save_bn_patch
from bnsurgery.plots import plot_errors, plot_normalized_weights
from cifar10 import Batches, floats, full, sample
from machine import device, hardware
from resnet import ResNet, resnet20
from several import command, first, joined

EPS = 8 / 255
WRITTEN = ("errors.png", "normalized_weights.png", "patch.safetensors", "record.json")
DATA = Path(__file__).parent / "data"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the full CIFAR-10, downloaded there if missing")
    parser.add_argument("--network", type=Path, help="a network of train_resnet20.py (default: the shipped one)")
    parser.add_argument("--width", type=positive, default=16, help="base width of the network (default: 16)")
    parser.add_argument("--epochs", type=positive, help="default: 5 on the sample, 2 on the full set")
    parser.add_argument("--examples", type=positive, default=128, help="test images to measure on (default: 128)")
    parser.add_argument(
        "--validate", action="store_true", help="measure on the last training images, left out of training: to choose"
    )
    parser.add_argument("--lr", type=rate, default=0.2, help="learning rate (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where to write (runs/quickstart)")
    parser.add_argument("--quick", action="store_true", help="a few steps and images only, to see that it runs")
    return parser.parse_args(argv)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def network(path: Path | None, width: int) -> ResNet:
    """The trained network; :class:`SystemExit` says what to do where there is none."""
    path = path or DATA / f"resnet20-w{width}.safetensors"
    model = resnet20(width)
    if not path.is_file():
        fail(
            f"no network of width {width} at {path}: train it with "
            f"python examples/train_resnet20.py --data DIR --width {width} --out {path}"
        )
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        fail(f"{path} is not a ResNet-20 of width {width}: {str(error).splitlines()[0]}")
    return model


def images(folder: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images with their labels."""
    if folder is None:
        return sample(train=True), sample(train=False)
    existed = folder.exists()
    try:
        return full(folder, train=True), full(folder, train=False)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        fail(f"no CIFAR-10 in {folder}, and it could not be downloaded there: {reason}")


def fail(message: str) -> NoReturn:
    print(f"quickstart.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    with joined(args.device) as args.device:
        return work(args, argv)


def work(args: argparse.Namespace, argv: list[str] | None) -> int:
    began, terminal = time.perf_counter(), sys.stderr.isatty()
    model = network(args.network, args.width).to(args.device, memory_format=torch.channels_last)
    (train_x, train_y), (test_x, test_y) = images(args.data)
    count = 16 if args.quick else args.examples
    if count > len(test_y):
        fail(f"--examples {count}: there are only {len(test_y)} test images; --data DIR has 10,000")
    test = floats(test_x[:count]), test_y[:count]
    if args.validate:
        test = floats(train_x[-count:]), train_y[-count:]
        train_x, train_y = train_x[:-count], train_y[:-count]
    epochs = args.epochs or (2 if args.quick or args.data else 5)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out} cannot be a folder: {error.strerror}")

    def measure(*attacks: str) -> bnsurgery.Evaluation:
        return evaluate(model, test, attacks=attacks, eps=EPS, seed=args.seed, progress=terminal)

    def show(title: str, pgd: bnsurgery.Evaluation, autoattack: bnsurgery.Evaluation) -> None:
        print(
            f"{title:24} clean {pgd.clean_error:5.1f}%   PGD-20 {pgd.robust_error:5.1f}%   "
            f"AutoAttack {autoattack.robust_error:5.1f}%",
            flush=True,
        )

    with freeze_except_bn(model) as frozen:
        print(f"ResNet-20, width {args.width}: {frozen.summary()}")
    measured = f"the last {count} training images" if args.validate else f"the first {count} test images"
    print(f"errors on {measured} of CIFAR-10, L-infinity, eps 8/255:")
    before = measure("pgd-20"), measure("autoattack")
    show("before", *before)

    folded_before = fold_bn(model)
    curve = [before[0]]
    batches = Batches(train_x, train_y, batch_size=64, augment=True, drop_last=True, device=args.device)
    settings = {"epochs": epochs, "train": "bn", "lr": args.lr, "weight_decay": 0, "schedule": "cosine"}
    attack = PGD(EPS, steps=3, step_size=3 / 255)
    run = adv_finetune(
        model,
        batches,
        **settings,
        attack=attack,
        callbacks=[lambda _record, _model: curve.append(measure("pgd-20"))],
        max_steps=8 if args.quick else None,
        seed=args.seed,
        progress=terminal,
    )
    after = curve[-1], measure("autoattack")
    show(f"BN fine-tuned, {epochs} epochs", *after)
    gain = before[1].robust_error - after[1].robust_error
    if not first():
        return 0
    patch = args.out / "patch.safetensors"
    save_bn_patch(model, patch)
    print(f"accuracy under AutoAttack: {gain:+.1f} points, from a patch of {patch.stat().st_size:,} bytes")

    axes = plot_normalized_weights({"before": folded_before, "BN fine-tuned": fold_bn(model)})
    axes.figure.savefig(args.out / "normalized_weights.png", dpi=150)
    errors = {
        "clean": [result.clean_error for result in curve],
        "robust (PGD-20)": [result.robust_error for result in curve],
    }
    plot_errors(range(len(curve)), errors).figure.savefig(args.out / "errors.png", dpi=150)
    record = {
        "command": command("examples/quickstart.py", sys.argv[1:] if argv is None else argv),
        "seed": args.seed,
        "training_images": len(train_y),
        "settings": settings | {"attack": repr(attack), "batch_size": batches.batch_size, "measured_on": measured},
        "before": {"pgd": before[0].record(), "autoattack": before[1].record()},
        "after": {"pgd": after[0].record(), "autoattack": after[1].record()},
        "curve": errors,
        "finetuning": run.record(),
        "patch_bytes": patch.stat().st_size,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {
            "bnsurgery": bnsurgery.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "hardware": hardware(args.device),
    }
    (args.out / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{record['seconds']:.0f} s on {record['hardware']}; wrote {', '.join(WRITTEN)} to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
