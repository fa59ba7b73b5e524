"""Compares settings that the paper does not give, on training images that are left out of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from examples.walter.data import Images
from examples.walter.evaluating import pgd, under_attack
from examples.walter.files import origin, read_json, require_same, write_json
from examples.walter.results import look_at_choice
from examples.walter.rows import CHOICES, EPS, ROWS, Row, label
from examples.walter.scales import FULL
from examples.walter.training import Context, initial, tune
from bnsurgery.analysis import outputs

HELD_OUT = 5000
"""The last training images, measured on: clean error on all of them, PGD-20 on the last thousand."""
TRAINING = 15_000
"""Training images, the first: enough to compare."""
EPOCHS = 3


def choose(context: Context, key: str) -> tuple[str, bool]:
    """Trains a row with each of its settings, briefly, and measures; a table, and whether it is all of it.

    The network that a row starts from has seen the left-out images in its own, clean training.

    Raises:
        Problem: the start is not trained yet, a file is damaged or of another configuration, or a disk is full.
    """
    full = context.scale == FULL
    held, training, epochs = (HELD_OUT, TRAINING, EPOCHS) if full else (64, 128, 1)
    images = context.images.held_out(held, training)
    lines, longest = [f"{'setting':32} clean error   robust error (PGD-20)"], 0.0
    with context.folder.locked(f"{key}-choose"):
        for settings in CHOICES[key]:
            row = replace(ROWS[key].shortened(epochs), **settings)
            path = context.folder.choice(key, settings)
            configuration = row.configuration() | {"held_out": held, "training_images": training}
            if not path.exists():
                if not context.fits(longest):
                    return "\n".join(lines), False
                context.worked = True
                write_json(path, one(context, row, images) | {"configuration": configuration})
            record = read_json(path, look_at_choice)
            require_same(path, record["configuration"], configuration)
            longest = max(longest, record["seconds"])
            robust = f"{record['robust_error']:.2f} ± {record['standard_error']:.2f}"
            lines.append(f"{label(settings):32} {record['clean_error']:11.2f}   {robust}")
    return "\n".join(lines), True


def one(context: Context, row: Row, images: Images) -> dict[str, Any]:
    """Trains and measures one setting."""
    made_with = origin(context.folder.seed, context.device)
    model = initial(context, row)
    run = tune(context, row, model, images, checkpoint=None, max_seconds=None)
    x, y = images.tests(len(images.test[1]))
    last = x[-context.scale.robust :], y[-context.scale.robust :]
    found = pgd(outputs(model, last), under_attack(context, model, last, EPS))
    return {
        "row": row.name,
        "clean_error": outputs(model, (x, y)).error,
        **found,
        "examples": [len(y), len(last[1])],
        "seconds": round(sum(record.seconds for record in run.history), 1),
        "history": run.record()["history"],
        **made_with,
    }
