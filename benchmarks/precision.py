"""Does the engine's low precision change what BN fine-tuning ends with? Seeds of both, side by side.

    python benchmarks/precision.py --data DIR

Fine-tunes the BN layers of the shipped ResNet-20 (width 16) on all of CIFAR-10's training images, once for each seed
and each precision, and measures clean error on the 10,000 test images and robust error under PGD-20 on the first
2,000. Resumable: what is finished is in the result file, what is under way in ``--checkpoints``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from cifar10 import Batches, floats, full
from measuring import RESULTS, opened
from resnet import resnet20
from safetensors.torch import load_file

from bnsurgery import PGD, adv_finetune, evaluate

PRECISIONS = ("auto", "float32")


def run(precision: str, seed: int, args: argparse.Namespace, train: Any, test: Any) -> dict[str, Any]:
    """One fine-tuning and what it ends with."""
    model = resnet20(16)
    model.load_state_dict(load_file(ROOT / "examples" / "data" / "resnet20-w16.safetensors"))
    result = adv_finetune(
        model,
        Batches(*train, batch_size=128, augment=True, drop_last=True),
        epochs=args.epochs,
        attack=PGD(8 / 255, steps=args.steps, step_size=2 / 255),
        lr=0.1,
        weight_decay=0,
        schedule="cosine",
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
        checkpoint=args.checkpoints / f"{precision}-{seed}.checkpoint",
        progress=sys.stderr.isatty(),
    )
    clean = evaluate(model, test, attacks=[], progress=False)
    robust = evaluate(model, test, attacks=["pgd-20"], max_examples=args.examples, progress=False)
    return {
        "precision": precision,
        "seed": seed,
        "clean_error": clean.clean_error,
        "robust_error": robust.robust_error,
        "training_loss": result.history[-1].loss,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard errors of the mean over the seeds, and how far apart they are."""
    found: dict[str, Any] = {}
    for figure in ("clean_error", "robust_error"):
        values = {p: [run[figure] for run in runs if run["precision"] == p] for p in PRECISIONS}
        if any(len(own) < 2 for own in values.values()):
            return {}
        means = {p: statistics.mean(own) for p, own in values.items()}
        errors = {p: statistics.stdev(own) / math.sqrt(len(own)) for p, own in values.items()}
        found[figure] = {"mean": means, "standard_error": errors, "difference": means["auto"] - means["float32"]}
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10; downloaded there if missing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of PGD in training")
    parser.add_argument("--examples", type=int, default=2000, help="test images for robust error")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "runs" / "precision")
    args = parser.parse_args()
    settings = {"epochs": args.epochs, "steps": args.steps, "examples": args.examples}
    args.device = "cpu"
    record, write = opened(args, __file__, {"settings": settings, "runs": []})
    if record["settings"] != settings:
        parser.error(f"{args.out} holds runs of other settings, {record['settings']}: name another --out")
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    train = full(args.data, train=True)
    images, labels = full(args.data, train=False)
    done = {(run["precision"], run["seed"]) for run in record["runs"]}
    for seed in range(args.seeds):
        for precision in PRECISIONS:
            if (precision, seed) not in done:
                record["runs"].append(run(precision, seed, args, train, (floats(images), labels)))
                record["summary"] = summary(record["runs"])
                write()
                print(record["runs"][-1], flush=True)
    print(json.dumps(record["summary"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
