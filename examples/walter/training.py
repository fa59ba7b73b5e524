"""Trains one row: from its start, with what it trains, resumable to the epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bnsurgery import (
    CheckpointError,
    EpochRecord,
    Finetuning,
    adv_finetune,
    bn_layers,
    bn_state,
    freeze_except_bn,
    load_bn_state,
    reset_bn_stats,
    save_bn_patch,
)
from examples.resnet import ResNet, resnet20
from examples.walter.data import Images, batches
from examples.walter.files import Folder, Problem, load_weights, origin, read_json, serialized, write, write_json
from examples.walter.results import Results
from examples.walter.rows import ROWS, Row
from examples.walter.scales import Scale


@dataclass
class Context:
    """What all commands share.

    Attributes:
        folder: of the results.
        read: reads CIFAR-10 or the sample of it, once it is needed.
        scale: how much is done.
        device: where.
        deadline: in ``time.monotonic()``'s seconds; None: there is none.
        bars: whether progress bars are shown; else a line is printed after each epoch.
        worked: whether anything has been done yet; what would end too late is begun only where nothing has.
    """

    folder: Folder
    read: Callable[[], Images]
    scale: Scale
    device: torch.device
    deadline: float | None = None
    bars: bool = True
    worked: bool = field(default=False, init=False)

    @cached_property
    def images(self) -> Images:
        """CIFAR-10, or the sample of it."""
        return self.read()

    @property
    def results(self) -> Results:
        """What is finished."""
        return Results(self.folder, self.scale)

    @property
    def left(self) -> float | None:
        """Seconds until the deadline, below 0 behind it; None: there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def fits(self, seconds: float | None) -> bool:
        """Whether to begin something that takes about so long; None: nobody knows."""
        left = self.left
        return left is None or (left > 0 and (left >= (seconds or 0.0) or not self.worked))


def network(context: Context, key: str) -> ResNet:
    """The network of a row that is trained; without its weights, that of its start with its BN patch, if that is all.

    Raises:
        Problem: it is not, or its weights are missing, damaged or of another width.
    """
    record = require_trained(context, key)
    row, folder = context.scale.row(ROWS[key]), context.folder
    if row.only_bn and not folder.weights(key).exists():
        model = initial(context, row)
        load_bn_state(model, bn_state(context.results.with_bn_of(key)))
        if serialized(model)[1] == record["sha256"]:
            return model
    model = resnet20(folder.width)
    load_weights(model, folder.weights(key), record["sha256"], folder.record(key, "train"))
    return model.to(context.device).to(memory_format=torch.channels_last)


def require_trained(context: Context, key: str) -> dict[str, Any]:
    """The record of a row's training.

    Raises:
        Problem: there is none, it is damaged, or of another configuration.
    """
    record = context.results.training(key)
    if record is None:
        raise Problem(f"{key} is not trained yet: train it first")
    return record


def initial(context: Context, row: Row) -> ResNet:
    """The network that training starts from.

    Raises:
        Problem: as :func:`network`.
    """
    if row.start is not None:
        model = network(context, row.start)
    else:
        torch.manual_seed(context.folder.seed)
        model = resnet20(context.folder.width)
        if row.gamma == "uniform":
            for layer in bn_layers(model).values():
                torch.nn.init.uniform_(layer.weight)
        model = model.to(context.device).to(memory_format=torch.channels_last)
    if row.reset:
        reset_bn_stats(model)
    return model


def start_of(context: Context, key: str) -> str | None:
    """The SHA-256 of the network that a row starts from; None: it starts from random weights."""
    start = ROWS[key].start
    record = None if start is None else context.results.training(start)
    return None if record is None else str(record["sha256"])


def tune(context: Context, row: Row, model: ResNet, images: Images, checkpoint: Path) -> Finetuning:
    """Trains a model as a row says, in place; goes on from the checkpoint, and ends at the deadline.

    Raises:
        Problem: the checkpoint is damaged, of another run, or cannot be written.
    """
    left = context.left

    def say(record: EpochRecord, _: torch.nn.Module) -> None:
        left = record.seconds * (row.epochs - record.epoch - 1) / 60
        print(
            f"{row.name}: epoch {record.epoch + 1} of {row.epochs}, loss {record.loss:.3f}, error {record.error:.1f}%, "
            f"{record.seconds:.0f} s; about {left:.0f} min left",
            flush=True,
        )

    try:
        return adv_finetune(
            model,
            batches(images, adversarial=row.adversarial, batch_size=context.scale.batch_size, device=context.device),
            epochs=row.epochs,
            train=row.train,
            also=row.also,
            attack=row.attack(),
            eps_warmup=row.eps_warmup,
            lr=row.lr,
            weight_decay=row.weight_decay,
            schedule="cosine",
            step_precision="auto",
            seed=context.folder.seed,
            max_seconds=None if left is None else max(left, 1e-3),
            checkpoint=checkpoint,
            callbacks=() if context.bars else say,
            progress=context.bars,
        )
    except CheckpointError as error:
        raise Problem(str(error)) from None
    except OSError as error:
        raise Problem(f"cannot write {checkpoint}: {error.strerror or error}") from None


def train(context: Context, key: str) -> bool:
    """Trains a row, or goes on with it; whether it is finished.

    Raises:
        Problem: its start is not trained yet, a file is damaged or of another configuration, a disk is full, or another
            process works on it.
    """
    if context.results.training(key) is not None:
        return True
    if not context.fits(context.results.seconds_an_epoch(ROWS[key])):
        return False
    context.worked = True
    images = context.images.first(context.scale.training)
    with context.folder.locked(key):
        # Another process may have finished it while the images were read.
        return context.results.training(key) is not None or _train(context, key, images)


def _train(context: Context, key: str, images: Images) -> bool:
    row, folder = context.scale.row(ROWS[key]), context.folder
    model = initial(context, row)
    checkpoint, log = folder.interim(f"{key}.checkpoint"), folder.interim(f"{key}.calls.json")
    calls = note_call(log, context, goes_on=checkpoint.exists())
    run = tune(context, row, model, images, checkpoint)
    if run.ended != "epochs":
        return False
    data, sha256 = serialized(model)
    write(folder.weights(key), lambda partial: partial.write_bytes(data))
    write(folder.patch(key), lambda partial: save_bn_patch(model, partial))
    write_json(
        folder.record(key, "train"),
        {
            "row": ROWS[key].name,
            "configuration": context.scale.of_training(ROWS[key], folder.width),
            "trains": shares(model, row),
            "statistics": row.statistics,
            "sha256": sha256,
            "start_sha256": start_of(context, key),
            "seconds": round(sum(record.seconds for record in run.history), 1),
            "history": run.record()["history"],
            "calls": calls,
            **calls[-1],
        },
    )
    for path in (checkpoint, log):
        path.unlink(missing_ok=True)  # where the record is removed, the row is to be trained anew
    return True


def note_call(path: Path, context: Context, *, goes_on: bool) -> list[dict[str, Any]]:
    """What each call that worked on a result was made with, this one last; kept beside the checkpoint."""
    before: list[dict[str, Any]] = []
    if goes_on and path.exists():
        before = read_json(path, lambda record: list(record["calls"]))["calls"]
    calls = [*before, origin(context.folder.seed, context.device)]
    write_json(path, {"calls": calls})
    return calls


def shares(model: ResNet, row: Row) -> dict[str, Any]:
    """How many parameters train (Table 1), and how many of them weight decay is on."""
    total = sum(parameter.numel() for parameter in model.parameters())
    count = total
    if row.train != "all":
        moves = row.train != "bn-stats"
        with freeze_except_bn(model, weight=moves, bias=moves, also=row.also) as freeze:
            count = sum(parameter.numel() for parameter in freeze.parameters())
    decayed = count if row.weight_decay else 0
    return {"parameters": count, "of": total, "percent": 100 * count / total, "with_weight_decay": decayed}
