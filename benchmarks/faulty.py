"""One process of ``faults.py``: works on a run that goes on from its checkpoint, and may stop in a write.

    python benchmarks/faulty.py KIND FOLDER [--stop-in-write N PLACE]

It prints a line when work begins, one for each step that is done, and at the end a hash of all that came of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from cifar10 import floats, sample
from resnet import resnet20
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnsurgery import PGD, adv_finetune, evaluate, processes

EPOCHS, IMAGES, BATCH, WIDTH = 3, 96, 16, 4
PLACES = ("half", "before the rename", "between the renames")


class Augmented(TensorDataset):
    """Flips and noise from torch's, NumPy's and Python's generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        x = x.flip(-1) if random.random() < 0.5 else x  # noqa: S311 - no secrets
        noise = torch.rand(()) + float(np.random.rand())
        return (x + 0.01 * noise).clamp(0, 1), y


def network(dropout: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [resnet20(WIDTH), nn.Dropout(0.1)] if dropout else [resnet20(WIDTH)]
    return nn.Sequential(*layers)


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """Of all their bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tune(folder: Path) -> str:
    """Everything trains, with dropout, augmentation, momentum, a schedule and an attack with random starts."""
    images, labels = sample(train=True)
    data = Augmented(floats(images[:IMAGES]), labels[:IMAGES])
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    model = network(dropout=True)
    run = adv_finetune(
        model,
        loader,
        epochs=EPOCHS,
        train="all",
        attack=PGD(8 / 255, 2, 4 / 255),
        schedule="cosine",
        clean_fraction=0.25,
        checkpoint=folder / "checkpoint",
        checkpoint_every=0,
        on_step=lambda record, _: print("step", record.step, flush=True),
        progress=False,
    )
    history = [{**epoch, "seconds": 0} for epoch in run.record()["history"]]
    return tensors_hash(model.state_dict()) + hashlib.sha256(json.dumps(history).encode()).hexdigest()


def measure(folder: Path) -> str:
    """PGD and two parts of AutoAttack."""
    images, labels = sample(train=False)
    model = network(dropout=False).eval()
    x = floats(images[:64])
    with torch.no_grad():
        y = model(x).argmax(1)  # an untrained network, robust enough that there is something to do
    y[::9] = labels[:64][::9]
    step = [0]

    def counted(_model: nn.Module, x: Tensor, _y: Tensor) -> Tensor:
        print("step", step[0], flush=True)
        step[0] += 1
        return (x + 0.002 * torch.randn_like(x).sign()).clamp(0, 1)

    result = evaluate(
        model,
        (x, y),
        attacks=["pgd-5", counted, "apgd-ce", "apgd-t"],
        eps=0.002,
        batch_size=8,
        keep_adversarial=True,
        checkpoint=folder / "checkpoint",
        checkpoint_every=0,
        progress=False,
    )
    rows = [{**row, "seconds": 0} for row in result.record()["rows"]]
    found = {"robust": result.robust, "correct": result.correct}
    if result.adversarial is not None:
        found["adversarial"] = result.adversarial
    return tensors_hash(found) + hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def stopping(number: int, place: str) -> None:
    """Makes the write of so many-th checkpoint stop half-way, and wait there to be killed."""
    writes = [0]
    write_bytes, replace = Path.write_bytes, Path.replace

    def wait() -> None:
        print("in the write", flush=True)
        time.sleep(600)

    def writing(path: Path, data: bytes) -> int:
        writes[0] += 1
        if writes[0] == number and place == "half":
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                os.fsync(file.fileno())
            wait()
        return write_bytes(path, data)

    def renaming(path: Path, target: Path) -> Path:
        kept = str(target).endswith(".previous")
        if writes[0] == number and place == ("before the rename" if kept else "between the renames"):
            wait()
        return replace(path, target)

    Path.write_bytes = writing  # type: ignore[method-assign]
    Path.replace = renaming  # type: ignore[method-assign, assignment]


KINDS: dict[str, Callable[[Path], str]] = {"tune": tune, "evaluate": measure}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop-in-write", nargs=2, metavar=("NUMBER", "PLACE"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.stop_in_write:
        stopping(int(args.stop_in_write[0]), args.stop_in_write[1])
    warnings.simplefilter("ignore", UserWarning)  # a full disk is what is tried here
    with processes(timeout=60, device="cpu"):
        print("begins", flush=True)
        found: Any = KINDS[args.kind](args.folder)
        print("hash", found, flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of torch's that outlive a group may abort an interpreter that is being taken down
