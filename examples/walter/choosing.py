"""Compares settings that the paper does not give, on training images that are left out of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bnsurgery.analysis import outputs
from examples.common.work import float32
from examples.walter.evaluating import pgd, under_attack
from examples.common.files import discard, label, write_json
from examples.walter.rows import CHOICES, EPS, ROWS
from examples.walter.training import Context, initial, start_of, tune


def choose(context: Context, key: str) -> tuple[str, bool]:
    """Trains a row with each of its settings, briefly, and measures; a table, and whether it is all of it.

    The network that a row starts from has seen the left-out images in its own, clean training.

    Raises:
        Problem: the start is not trained yet, a file is damaged or of another configuration, or a disk is full.
    """
    lines, longest = [f"{'setting':32} clean error   robust error (PGD-20)"], 0.0
    with context.folder.locked(f"{key}-choose"):
        for settings in CHOICES[key]:
            record = context.results.choice(key, settings)
            if record is None:
                record = one(context, key, settings) if context.fits(longest) else None
            if record is None:
                return "\n".join(lines), False
            longest = max(longest, record["seconds"])
            robust = f"{record['robust_error']:.2f} ± {record['standard_error']:.2f}"
            lines.append(f"{label(settings):32} {record['clean_error']:11.2f}   {robust}")
    return "\n".join(lines), True


def one(context: Context, key: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Trains and measures one setting, or goes on with it; None where the budget ends before that."""
    context.worked = True
    scale, folder, path = context.scale, context.folder, context.folder.choice(key, settings)
    row = scale.compared(ROWS[key], settings)
    images = context.images.held_out(scale.held_out, scale.compared_training)
    checkpoint, log = folder.interim(f"{path.name}.checkpoint"), folder.interim(f"{path.name}.calls.json")
    model = initial(context, row)
    calls = context.note_call(log, goes_on=checkpoint.exists())
    run = tune(context, row, model, images, checkpoint)
    if run.ended != "epochs":
        return None
    x, y = images.tests(len(images.test[1]))
    last = x[-scale.robust :], y[-scale.robust :]
    with float32():
        clean_error = outputs(model, (x, y)).error
        found = pgd(outputs(model, last), under_attack(context, model, last, EPS))
    record = {
        "row": row.name,
        "clean_error": clean_error,
        **{name: value if math.isfinite(value) else None for name, value in found.items()},
        "examples": [len(y), len(last[1])],
        "seconds": round(sum(record.seconds for record in run.history), 1),
        "history": run.record()["history"],
        "calls": calls,
        **calls[-1],
        "start_sha256": start_of(context, key),
        "configuration": scale.of_choice(ROWS[key], settings, folder.width),
    }
    write_json(path, record)
    discard(checkpoint, log)
    return record
