"""Sets of images of which only some features go with the labels: made some at a time, each part kept as it comes."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bnsurgery.analysis import FeatureSet, feature_dataset
from examples.benz.rows import SetRow
from examples.cifar10 import floats
from examples.common.files import Pending, Problem, read_json, write, write_json
from examples.common.work import require_begun_of

if TYPE_CHECKING:
    from examples.benz.work import Benz

CHUNK = 2500
"""Images that are made at a time."""


def images_of(lab: Benz, key: str) -> tuple[Tensor, Tensor]:
    """The images, uint8 (N, 3, 32, 32), and labels (N,) of a set.

    Raises:
        Problem: it is not made yet, or its images are missing or damaged.
    """
    record, path = lab.training(key), lab.folder.interim(f"{key}.set.safetensors")
    if record is None:
        raise Pending(f"{key} is not made yet in {lab.folder.path}")
    remedy = f"remove {lab.folder.record(key, 'set')}, and it is made again"
    try:
        data = path.read_bytes()
        found = load(data)
    except (OSError, SafetensorError) as error:
        raise Problem(f"cannot read {path} ({str(error).splitlines()[0]}): {remedy}") from None
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise Problem(f"{path} is not the set of {lab.folder.record(key, 'set')}: {remedy}")
    return found["images"], found["labels"]


def make(lab: Benz, key: str, row: SetRow, needs: dict[str, str | None]) -> bool:
    """Makes a set, or goes on with it; whether it is finished.

    Raises:
        Problem: parts of it were made of other results than are here now, or a file is damaged.
    """
    settings, model = lab.settings(row), lab.network(row.model)
    x, y = lab.images.train if row.source is None else images_of(lab, row.source)
    x, y = x[: settings["images"]], y[: settings["images"]]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(lab.folder.seed))
    log, parts = lab.folder.interim(f"{key}.calls.json"), []
    made_of = {**needs, "configuration": settings, "images at a time": CHUNK}
    calls = lab.note_call(log, goes_on=True, needs=made_of)
    seconds = 0.0
    for number, rows in enumerate(torch.split(torch.arange(len(y)), CHUNK)):
        part = lab.folder.interim(f"{key}.part{number}.safetensors")
        if not _is_there(part, made_of):
            if not lab.fits(seconds or None):
                return False
            lab.worked = True
            began = time.perf_counter()
            made = feature_dataset(
                model,
                (floats(x[rows]), y[rows]),
                row.kind,
                steps=settings["steps"],
                step_size=row.step_size,
                starts=floats(x[order[rows]]) if row.kind == "matched" else None,
                seed=lab.folder.seed + number,
                progress=lab.bars,
            )
            seconds = time.perf_counter() - began
            _keep(part, made, seconds, made_of)
            if not lab.bars:
                print(f"{row.name}: {int(rows[-1]) + 1:,} of {len(y):,} images, {seconds:.0f} s", flush=True)
        parts.append(part)
    _join(lab, key, parts, {"configuration": settings, "needs": needs, "calls": calls, **calls[-1]})
    log.unlink(missing_ok=True)
    return True


def look_at_set(record: dict[str, Any]) -> None:
    """Goes over what the record of a set is to hold."""
    _ = record["sha256"], dict(record["needs"]), record["configuration"]["width"], float(record["seconds"])
    _ = record["reached"], record["distance"], int(record["examples"]), int(record["nonfinite"])


def _is_there(part: Path, made_of: dict[str, Any]) -> bool:
    """Whether a part is finished; :class:`Problem` where it was made of other results than are here now."""
    if not (part.exists() and part.with_suffix(".json").exists()):
        return False
    record = read_json(part.with_suffix(".json"), lambda record: (int(record["examples"]), dict(record["made_of"])))
    require_begun_of(part, record["made_of"], made_of)
    return True


def _keep(path: Path, made: FeatureSet, seconds: float, made_of: dict[str, Any]) -> None:
    """Images rounded to 8 bits, which moves them by about 0.06 in L2."""
    images = (made.images * 255).round().clamp(0, 255).to(torch.uint8)
    write_json(path.with_suffix(".json"), made.record() | {"seconds": seconds, "made_of": made_of})
    data = save({"images": images.contiguous(), "labels": made.labels})
    write(path, lambda partial: partial.write_bytes(data))


def _join(lab: Benz, key: str, parts: list[Path], about: dict[str, Any]) -> None:
    """Puts the parts into one file, and writes the record."""
    try:
        loaded = [load(part.read_bytes()) for part in parts]
    except (OSError, SafetensorError) as error:
        raise Problem(
            f"a part of {key} is damaged ({str(error).splitlines()[0]}): remove {parts[0].parent}/{key}.part*"
        ) from None
    records = [read_json(part.with_suffix(".json"), lambda record: record["examples"]) for part in parts]
    joined = {name: torch.cat([tensors[name] for tensors in loaded]).contiguous() for name in loaded[0]}
    data = save(joined)
    write(lab.folder.interim(f"{key}.set.safetensors"), lambda partial: partial.write_bytes(data))
    sums = {name: sum(record[name] for record in records) for name in ("examples", "nonfinite")}
    distances = None
    if records[0]["distance"] is not None:
        weighted = [[record["examples"] * value for value in record["distance"]] for record in records]
        distances = [sum(values) / sums["examples"] for values in zip(*weighted, strict=True)]
    write_json(
        lab.folder.record(key, "set"),
        {
            "row": lab.rows[key].name,
            "sha256": hashlib.sha256(data).hexdigest(),
            **sums,
            "reached": None if records[0]["reached"] is None else sum(record["reached"] for record in records),
            "distance": distances,
            "seconds": round(sum(record["seconds"] for record in records), 1),
            **about,
        },
    )
    for part in parts:
        part.unlink()
        part.with_suffix(".json").unlink()
