"""Compares settings that the paper does not give, on training images that are left out of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bnsurgery import Evaluation, evaluate
from examples.walter.files import Problem, origin, read_json, write_json
from examples.walter.rows import CHOICES, EPS, ROWS, Row
from examples.walter.training import Scale, Session, finished, initial, require_same, tune

HELD_OUT = 5000
"""The last training images, measured on: clean error on all of them, PGD-20 on the last thousand."""
TRAINING = 15_000
"""Training images, the first: enough to compare."""
EPOCHS = 3


def choose(session: Session, key: str) -> str:
    """Trains a row with each of its settings, briefly, and measures; returns a table of what came out.

    The network that a row starts from has seen the left-out images in its own, clean training.
    """
    row, folder, scale = ROWS[key], session.folder, session.scale
    whole = scale == Scale()
    held, training = (HELD_OUT, TRAINING) if whole else (64, 128)
    epochs = EPOCHS if whole else 1
    images = session.images.held_out(held, training)
    if row.start is not None and finished(session, row.start) is None:
        raise Problem(f"{key} starts from {row.start}, which is not trained yet: train {row.start} first")
    folder.make()
    lines = [f"{'setting':40} clean error  robust error (PGD-20)"]
    for settings in CHOICES[key]:
        chosen = replace(row, epochs=epochs, **settings)
        name = "-".join(f"{option}{value}" for option, value in settings.items())
        path = folder.record(f"{key}-{name}", "choose")
        configuration = chosen.configuration() | {"held_out": held, "training_images": training}
        if path.exists():
            record = read_json(path)
            require_same(path, record, configuration)
        elif not session.fits(0.0):
            break
        else:
            record = one(replace(session, deadline=None), chosen, images, configuration)
            session.worked = True
            write_json(path, record)
        lines.append(f"{name:40} {record['clean_error']:11.2f}  {record['robust_error']:12.2f}")
    return "\n".join(lines)


def one(session: Session, row: Row, images: Any, configuration: dict[str, Any]) -> dict[str, Any]:
    """Trains and measures one setting."""
    model = initial(session, row)
    run = tune(session, row, model, images, checkpoint=None)
    count = len(images.test[1])
    clean = measure(session, model, images.tests(count))
    last = images.tests(count)
    few = min(session.scale.robust, count)
    robust = measure(session, model, (last[0][-few:], last[1][-few:]), "pgd-20")
    return {
        "row": row.name,
        "configuration": configuration,
        "clean_error": clean.clean_error,
        "robust_error": robust.robust_error,
        "standard_error": robust.standard_error,
        "examples": [count, few],
        "seconds": round(sum(record.seconds for record in run.history), 1),
        "history": run.record()["history"],
        **origin(session.folder.seed, session.device),
    }


def measure(session: Session, model: Any, data: Any, *attacks: str) -> Evaluation:
    """Errors in percent."""
    return evaluate(model, data, attacks=attacks, eps=EPS, seed=session.folder.seed, progress=session.progress)
