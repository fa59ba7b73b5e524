"""A row that is trained, measured in full: what is done of it is not done again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

from examples.common.files import read_json, require_same, write_json
from examples.common.records import finite, look_at_tests
from examples.common.work import float32

if TYPE_CHECKING:
    from examples.common.lab import Lab


def evaluate(lab: Lab, key: str) -> bool:
    """Evaluates a row that is trained, or goes on with it; whether it is finished.

    Raises:
        Diverged: its outputs are not finite.
        Problem: as in training.
    """
    if lab.evaluation(key) is not None:
        return True
    lab.trained(key)
    if not lab.fits(None):
        return False
    x, y = lab.images.tests(lab.scale.tested)
    with lab.folder.locked(key), float32():
        return lab.evaluation(key) is not None or _evaluate(lab, key, x, y)


def _evaluate(lab: Lab, key: str, x: Tensor, y: Tensor) -> bool:
    row, path = lab.rows[key], lab.folder.interim(f"{key}.tests.json")
    sha256, configuration = lab.trained(key)["sha256"], lab.test_settings(row)
    done: dict[str, Any] = {"configuration": configuration, "sha256": sha256, "calls": [], "seconds": 0.0, "tests": {}}
    if path.exists():
        done = read_json(path, look_at_tests)
        require_same(path, done["configuration"] | {"sha256": done["sha256"]}, configuration | {"sha256": sha256})
    done["calls"] = lab.note_call(lab.folder.interim(f"{key}.tests.calls.json"), goes_on=path.exists())
    model = lab.network(key)
    tests = lab.tests(row, model, x, y)
    for name in (name for name in tests if name not in done["tests"]):
        if not lab.fits(None):
            return False
        lab.worked = True
        began = time.perf_counter()
        done["tests"][name] = finite(tests[name]())
        done["seconds"] = round(done["seconds"] + time.perf_counter() - began, 1)
        write_json(path, done)
    write_json(lab.folder.record(key, "evaluate"), {"row": row.name, **done, **done["calls"][-1]})
    for left in (path, lab.folder.interim(f"{key}.tests.calls.json")):
        left.unlink(missing_ok=True)
    return True
