"""Trains one row: from its start, with what it trains, resumable to the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bnsurgery import (
    Finetuning,
    bn_layers,
    bn_state,
    freeze_except_bn,
    load_bn_state,
    reset_bn_stats,
    save_bn_patch,
)
from examples.resnet import ResNet, resnet20
from examples.common import work
from examples.common.data import Images, batches
from examples.common.files import Problem, discard, load_weights, serialized, write, write_json
from examples.common.work import Work
from examples.walter.results import Results
from examples.walter.rows import ROWS, Row


@dataclass
class Context(Work):
    """What all commands share."""

    program = "walter"

    @property
    def results(self) -> Results:
        """What is finished."""
        return Results(self.folder, self.scale)


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
    return work.tune(
        context,
        row.name,
        model,
        batches(images, adversarial=row.adversarial, batch_size=context.scale.batch_size, device=context.device),
        checkpoint,
        epochs=row.epochs,
        train=row.train,
        also=row.also,
        attack=row.attack(),
        eps_warmup=row.eps_warmup,
        lr=row.lr,
        weight_decay=row.weight_decay,
        schedule="cosine",
    )


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
    calls = context.note_call(log, goes_on=checkpoint.exists())
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
    discard(checkpoint, log)  # where the record is removed, the row is to be trained anew
    return True


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
