"""How long what is left will take, judged by what is finished."""

from __future__ import annotations

from examples.walter.results import Results
from examples.walter.rows import ROWS
from examples.walter.training import Session, finished, passes, seconds_a_pass


def remaining(session: Session) -> str:
    """One line about what is left to do."""
    results = Results(session.folder)
    measured = {key: record for key in ROWS if (record := results.evaluation(key)) is not None}
    count = len(ROWS) - len(measured)
    pace = seconds_a_pass(session)
    if pace is None or not measured:
        return f"{count} of {len(ROWS)} rows are left; no estimate before the first is done"
    left = [session.scaled(row) for key, row in ROWS.items() if finished(session, key) is None]
    each = sum(record["seconds"] for record in measured.values()) / len(measured)
    seconds = pace * sum(row.epochs * passes(row) for row in left) + each * count
    return f"{count} of {len(ROWS)} rows are left, about {_span(seconds)} by the pace so far"


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
