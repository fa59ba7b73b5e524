"""A row that is trained: from the beginning, from where it was, or from where another one was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bnsurgery import EpochRecord, StepRecord
from examples.common.data import Images
from examples.common.files import Pending, Problem, begin_anew, discard, read_json, serialized, write, write_json
from examples.common.records import finite, look_at_measures
from examples.common.work import float32, tune

if TYPE_CHECKING:
    from examples.common.lab import Lab


def train(lab: Lab, key: str) -> bool:
    """Trains a row, or goes on with it; whether it is finished.

    Raises:
        Problem: what it needs is not there yet, a file is damaged or of another configuration, a disk is full, or
            another process works on it.
    """
    if lab.training(key) is not None:
        return True
    if not lab.fits(None):
        return False
    lab.worked = True
    images = lab.images.first(lab.scale.training)
    with lab.folder.locked(key):
        # Another process may have finished it while the images were read.
        return lab.training(key) is not None or _train(lab, key, images)


def _train(lab: Lab, key: str, images: Images) -> bool:
    row, folder = lab.rows[key], lab.folder
    needs = lab.hashes(key)
    for need in (need for need, sha256 in needs.items() if sha256 is None):
        raise Pending(f"{need} is not trained yet in {folder.path}, and {key} needs it")
    checkpoint, log = folder.interim(f"{key}.checkpoint"), folder.interim(f"{key}.calls.json")
    curve, epochs = folder.interim(f"{key}.measures.json"), lab.scale.epochs(row.epochs)
    start, forks = lab.begins_as(row), sorted(lab.forks(key))
    if start is not None and not checkpoint.exists():
        _begin_as(lab, *start, checkpoint, log, curve, needs)
    goes_on = checkpoint.exists()
    for path in (log, curve) if goes_on else ():
        if not path.exists():
            raise Problem(f"{path} is missing, beside {checkpoint}: {begin_anew(path)}")
    measured = read_json(curve, look_at_measures)["measures"] if goes_on else []
    x, y = lab.images.tests(lab.scale.measured)
    model = lab.initial(row)
    batches = lab.batches(row, images)
    calls = lab.note_call(log, goes_on=goes_on, needs=needs)

    def measure(epoch: int, model: nn.Module) -> None:
        with float32():
            found = {"epoch": epoch} | finite(lab.measures(row, model, x, y))
        measured[:] = [*(before for before in measured if before["epoch"] < epoch), found]
        write_json(curve, {"measures": measured})
        if epoch in snapshots(row, epochs):
            data, _ = serialized(model)
            write(folder.interim(f"{key}.epoch{epoch}.safetensors"), lambda partial: partial.write_bytes(data))

    def after(record: EpochRecord, model: nn.Module) -> None:
        measure(record.epoch + 1, model)

    def fork(record: StepRecord, _: nn.Module) -> None:
        if record.step in begins:  # the checkpoint is that of the epochs before this one, still
            data = checkpoint.read_bytes()
            write(_fork(lab, key, record.epoch), lambda partial: partial.write_bytes(data))

    begins = {epoch * len(batches) for epoch in forks}
    if not goes_on:
        measure(0, model)
    options = {"callbacks": [after], "on_step": fork if forks else None} | lab.options(row)
    run = tune(lab, row.name, model, batches, checkpoint, epochs=epochs, **options)
    if run.ended != "epochs":
        return False
    kept = {epoch: path for epoch in forks if (path := _fork(lab, key, epoch)).exists()}
    data, sha256 = serialized(model)
    write(folder.weights(key), lambda partial: partial.write_bytes(data))
    write_json(
        folder.record(key, "train"),
        {
            "row": row.name,
            "configuration": lab.settings(row),
            "needs": needs,
            "sha256": sha256,
            "snapshots": {
                str(epoch): _hash(folder.interim(f"{key}.epoch{epoch}.safetensors")) for epoch in snapshots(row, epochs)
            },
            **({"forks": {str(epoch): _hash(path) for epoch, path in kept.items()}} if kept else {}),
            "seconds": round(sum(record.seconds for record in run.history), 1),
            "history": run.record()["history"],
            "measures": measured,
            "calls": calls,
            **calls[-1],
        },
    )
    discard(checkpoint, log, curve)  # where the record is removed, the row is to be trained anew
    return True


def _begin_as(
    lab: Lab, key: str, epoch: int, checkpoint: Path, log: Path, curve: Path, needs: dict[str, str | None]
) -> None:
    """Makes the first epochs of another row those of one that is not begun; its checkpoint is written last.

    Where the other row's checkpoint of then is not here, as with results of another machine, nothing is done: training
    from the beginning comes to the same.
    """
    record, path = lab.trained(key), _fork(lab, key, epoch)
    sha256 = record.get("forks", {}).get(str(epoch))
    if sha256 is None or not path.exists():
        print(f"{path} is not here: its {epoch} epochs are trained again", flush=True)
        return
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        record_path, remedy = lab.folder.record(key, "train"), "remove it, and its epochs are trained again"
        raise Problem(f"{path} is not the checkpoint of {record_path}: {remedy}")
    write_json(curve, {"measures": [found for found in record["measures"] if found["epoch"] <= epoch]})
    write_json(log, {"calls": record["calls"], "needs": needs})
    write(checkpoint, lambda partial: partial.write_bytes(data))


def _fork(lab: Lab, key: str, epoch: int) -> Path:
    """The checkpoint of a row after so many epochs, from which others go on."""
    return lab.folder.interim(f"{key}.epoch{epoch}.checkpoint")


def snapshots(row: Any, epochs: int) -> tuple[int, ...]:
    """The epochs after which a row's network is kept."""
    return tuple(dict.fromkeys(min(epoch, epochs) for epoch in getattr(row, "snapshots", ())))


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise Problem(f"cannot read {path} ({error.strerror}): {begin_anew(path)}") from None
