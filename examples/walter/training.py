"""Trains one row: from its start, with what it trains, resumable to the epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bnsurgery import CheckpointError, adv_finetune, bn_layers, freeze_except_bn, reset_bn_stats, save_bn_patch
from examples.resnet import ResNet, resnet20
from examples.walter.data import Images, batches
from examples.walter.files import Folder, Problem, load_weights, origin, read_json, save_weights, write, write_json
from examples.walter.rows import ROWS, Row


@dataclass(frozen=True)
class Scale:
    """How much is done: all of it, or just enough to see that everything runs.

    Attributes:
        batch_size: in training.
        most_epochs: no row trains longer.
        training: how many training images are used; None: all.
        clean: numbers of first test images that clean error is reported on.
        robust: number of first test images that are attacked.
        chunk: of these, how many between two looks at the clock.
        robust_eps: radii, in pixel units of [0, 1], at which PGD-20 is run, next to AutoAttack at the first.
    """

    batch_size: int = 128
    most_epochs: int | None = None
    training: int | None = None
    clean: tuple[int, ...] = (900, 1000, 10_000)
    robust: int = 1000
    chunk: int = 250
    robust_eps: tuple[float, ...] = (8 / 255, 4 / 255, 2 / 255, 1 / 255)


FULL = Scale()
QUICK = Scale(batch_size=64, most_epochs=1, training=512, clean=(64, 512), robust=16, chunk=16)


@dataclass
class Session:
    """What all commands share.

    Attributes:
        folder: of the results.
        images: CIFAR-10 or the sample of it.
        scale: how much is done.
        device: where.
        deadline: in ``time.monotonic()``'s seconds; None: there is none.
        worked: whether anything has been done before it; what would end too late is begun only where nothing has.
        progress: whether progress bars are shown.
    """

    folder: Folder
    images: Images
    scale: Scale
    device: torch.device
    deadline: float | None = None
    progress: bool = True
    worked: bool = False

    def fits(self, seconds: float) -> bool:
        """Whether to begin something that takes about so long."""
        left = self.left
        return left is None or (left > 0 and (left >= seconds or not self.worked))

    @property
    def left(self) -> float | None:
        """Seconds until the deadline, below 0 behind it; None: there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def scaled(self, row: Row) -> Row:
        """The row with as many epochs as are made here."""
        return replace(row, epochs=min(row.epochs, self.scale.most_epochs or row.epochs))


def configuration(session: Session, row: Row) -> dict[str, Any]:
    """What decides about the result of training a row."""
    count = len(session.images.train[1][: session.scale.training])
    more = {"width": session.folder.width, "batch_size": session.scale.batch_size, "training_images": count}
    return session.scaled(row).configuration() | more


def finished(session: Session, key: str) -> dict[str, Any] | None:
    """The record of a row that is trained already; None where it is not.

    Raises:
        Problem: it is damaged, or of another configuration.
    """
    path = session.folder.record(key, "train")
    if not path.exists():
        return None
    record = read_json(path)
    require_same(path, record, configuration(session, ROWS[key]))
    return record


def require_same(path: Any, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises :class:`Problem` unless a record was made with this configuration."""
    before = record.get("configuration")
    if not isinstance(before, dict):
        raise Problem(f"{path} is not a result: remove it, and it is made again")
    differences = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if differences:
        raise Problem(f"{path} was made otherwise ({'; '.join(differences)}): remove it, or use another --out")


def network(session: Session, key: str) -> ResNet:
    """The network of a row that is trained.

    Raises:
        Problem: its weights are missing, damaged or of another width.
    """
    model = resnet20(session.folder.width)
    load_weights(model, session.folder.weights(key))
    return model.to(session.device).to(memory_format=torch.channels_last)


def initial(session: Session, row: Row) -> ResNet:
    """The network that training starts from."""
    if row.start is not None:
        model = network(session, row.start)
    else:
        torch.manual_seed(session.folder.seed)
        model = resnet20(session.folder.width).to(session.device).to(memory_format=torch.channels_last)
        if row.gamma == "uniform":
            for layer in bn_layers(model).values():
                torch.nn.init.uniform_(layer.weight)
    if row.reset:
        reset_bn_stats(model)
    return model


def tune(session: Session, row: Row, model: ResNet, images: Images, *, checkpoint: str | None) -> Any:
    """Trains a model as a row says, in place; returns what :func:`bnsurgery.adv_finetune` does."""
    return adv_finetune(
        model,
        batches(images, adversarial=row.adversarial, batch_size=session.scale.batch_size, device=session.device),
        epochs=row.epochs,
        train=row.train,
        also=row.also,
        attack=row.attack(),
        lr=row.lr,
        weight_decay=row.weight_decay,
        schedule="cosine",
        step_precision="auto",
        seed=session.folder.seed,
        max_seconds=None if session.left is None else max(session.left, 1e-3),
        checkpoint=checkpoint,
        progress=session.progress,
    )


def train(session: Session, key: str) -> bool:
    """Trains a row, or goes on with it; whether it is finished.

    Raises:
        Problem: a file is damaged or of another configuration; a disk is full.
    """
    if finished(session, key) is not None:
        return True
    if not session.fits(seconds_an_epoch(session, ROWS[key])):
        return False
    session.worked = True
    row, folder = session.scaled(ROWS[key]), session.folder
    if row.start is not None and finished(session, row.start) is None:
        raise Problem(f"{key} starts from {row.start}, which is not trained yet: train {row.start} first")
    folder.make()
    model = initial(session, row)
    x, y = session.images.train
    images = Images((x[: session.scale.training], y[: session.scale.training]), session.images.test)
    try:
        run = tune(session, row, model, images, checkpoint=str(folder.work(f"{key}.checkpoint")))
    except CheckpointError as error:
        raise Problem(str(error)) from None
    except OSError as error:
        raise Problem(f"cannot write {folder.work(f'{key}.checkpoint')}: {error.strerror or error}") from None
    if run.ended != "epochs":
        return False
    save_weights(model, folder.weights(key))
    write(folder.patch(key), lambda partial: save_bn_patch(model, partial))
    write_json(
        folder.record(key, "train"),
        {
            "row": ROWS[key].name,
            "configuration": configuration(session, ROWS[key]),
            "trains": shares(model, row),
            "statistics": statistics(row),
            "seconds": round(sum(record.seconds for record in run.history), 1),
            "history": run.record()["history"],
            **origin(folder.seed, session.device),
        },
    )
    return True


def passes(row: Row) -> int:
    """Passes through the network, forward or backward, that a training image takes in an epoch."""
    attack = row.attack()
    return 3 + (0 if attack is None else 2 * attack.steps)


def seconds_a_pass(session: Session) -> float | None:
    """Of the training set through the network, by the rows that are trained; None where none is."""
    records = {key: record for key in ROWS if (record := finished(session, key)) is not None}
    made = sum(passes(ROWS[key]) * record["configuration"]["epochs"] for key, record in records.items())
    return sum(record["seconds"] for record in records.values()) / made if made else None


def seconds_an_epoch(session: Session, row: Row) -> float:
    """About how long an epoch takes; 0 where nothing is known."""
    return (seconds_a_pass(session) or 0.0) * passes(row)


def shares(model: ResNet, row: Row) -> dict[str, Any]:
    """How many parameters train (Table 1), and that weight decay is on all of them."""
    total = sum(parameter.numel() for parameter in model.parameters())
    count = total
    if row.train != "all":
        moves = row.train != "bn-stats"
        with freeze_except_bn(model, weight=moves, bias=moves, also=row.also) as freeze:
            count = sum(parameter.numel() for parameter in freeze.parameters())
    return {"parameters": count, "of": total, "percent": 100 * count / total, "with_weight_decay": count}


def statistics(row: Row) -> str:
    """What the BN statistics do in training."""
    if row.train == "bn-params":
        return "frozen"
    return "reset, then updated" if row.reset else "updated"
