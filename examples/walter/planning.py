"""How long what is left will take, judged by what is finished."""

from __future__ import annotations

from examples.walter.rows import ROWS
from examples.walter.training import Context


def remaining(context: Context) -> str:
    """One line about what is left to do."""
    results = context.results
    measured = sum(results.evaluation(key) is not None for key in ROWS)
    left = [context.scale.row(row) for key, row in ROWS.items() if results.training(key) is None]
    count = f"{len(ROWS) - measured} of {len(ROWS)} rows are left"
    chunk, epochs = results.seconds_a_chunk(), [results.seconds_an_epoch(row) for row in left]
    if chunk is None:
        return f"{count}; no estimate before the first is done"
    training = sum((seconds or 0.0) * row.epochs for seconds, row in zip(epochs, left, strict=True))
    chunks = -(-context.scale.robust // context.scale.chunk)
    return f"{count}, about {_span(training + chunk * chunks * (len(ROWS) - measured))} by the pace so far"


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
