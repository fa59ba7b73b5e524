"""Measures one row as the paper does: clean error, AutoAttack, PGD-20 beside it, and outputs under attack."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from bnsurgery import PGD, Evaluation, evaluate
from bnsurgery.analysis import Outputs, histogram, outputs
from examples.resnet import ResNet
from examples.walter.files import Problem, origin, read_json, write_json
from examples.walter.rows import EPS, ROWS
from examples.walter.training import Session, configuration, finished, network, require_same

CONFIDENCES, LOGITS = (0.0, 1.0), (-20.0, 20.0)
"""Bounds of the histograms of Figure 3."""


def evaluated(session: Session, key: str) -> dict[str, Any] | None:
    """The record of a row that is evaluated already; None where it is not.

    Raises:
        Problem: it is damaged, or of another configuration.
    """
    path = session.folder.record(key, "evaluate")
    if not path.exists():
        return None
    record = read_json(path)
    require_same(path, record, settings(session, key))
    return record


def settings(session: Session, key: str) -> dict[str, Any]:
    """What decides about the result of evaluating a row."""
    scale = session.scale
    attacks = {"clean_on": list(scale.clean), "robust_on": scale.robust, "chunk": scale.chunk, "eps": EPS}
    return configuration(session, ROWS[key]) | {"evaluation": attacks}


def evaluate_row(session: Session, key: str) -> bool:
    """Evaluates a row that is trained, or goes on with it; whether it is finished.

    Raises:
        Problem: the row is not trained yet, a file is damaged or of another configuration, or a disk is full.
    """
    if evaluated(session, key) is not None:
        return True
    if finished(session, key) is None:
        raise Problem(f"{key} is not trained yet: train it first")
    session.folder.make()
    model = network(session, key)
    chunks = autoattack(session, key, model)
    if chunks is None:
        return False
    began = time.perf_counter()
    data = session.images.tests(session.scale.robust)
    under = {eps: under_attack(session, model, data, eps) for eps in session.scale.robust_eps}
    record = {
        "row": ROWS[key].name,
        "configuration": settings(session, key),
        "clean_error": clean_errors(session, model),
        "autoattack": joined(chunks),
        "pgd20": [pgd(session, model, eps, made) for eps, made in under.items()],
        "histograms": {
            kind: histograms(made) for kind, made in (("clean", outputs(model, data)), ("adversarial", under[EPS]))
        },
        **origin(session.folder.seed, session.device),
    }
    record["seconds"] = round(sum(chunk["seconds"] for chunk in chunks) + time.perf_counter() - began, 1)
    write_json(session.folder.record(key, "evaluate"), record)
    return True


def autoattack(session: Session, key: str, model: ResNet) -> list[dict[str, Any]] | None:
    """Standard AutoAttack on the first test images, some of them at a time; None where the budget ends before them."""
    path, scale = session.folder.work(f"{key}.autoattack.json"), session.scale
    x, y = session.images.tests(scale.robust)
    starts = range(0, len(y), scale.chunk)
    chunks: list[dict[str, Any]] = []
    if path.exists():
        record = read_json(path)
        require_same(path, record, settings(session, key))
        chunks = record["chunks"]
    for start in starts[len(chunks) :]:
        if not session.fits(max((chunk["seconds"] for chunk in chunks), default=0.0)):
            return None
        session.worked = True
        began = time.perf_counter()
        data = x[start : start + scale.chunk], y[start : start + scale.chunk]
        found = attacked(session, model, data, "autoattack")
        held = "".join(str(int(flag)) for flag in found.robust)
        chunks.append(found.record() | {"held": held, "seconds": time.perf_counter() - began})
        write_json(path, {"configuration": settings(session, key), "chunks": chunks})
    return chunks


def attacked(
    session: Session, model: ResNet, data: tuple[Tensor, Tensor], *attacks: Any, eps: float = EPS
) -> Evaluation:
    """Errors in percent under these attacks."""
    return evaluate(model, data, attacks=attacks, eps=eps, seed=session.folder.seed, progress=session.progress)


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The results on parts of the examples as one."""
    count = sum(chunk["examples"] for chunk in chunks)

    def wrong(error: str) -> int:
        return sum(round(chunk[error] * chunk["examples"] / 100) for chunk in chunks)

    robust = wrong("robust_error") / count
    rows, broken = [], wrong("clean_error")
    for parts in zip(*(chunk["rows"] for chunk in chunks), strict=True):
        sums = {name: sum(part[name] for part in parts) for name in ("tried", "broken", "rejected", "seconds")}
        broken += sums["broken"]
        rows.append({"attack": parts[0]["attack"], **sums, "robust_error": 100 * broken / count})
    return {
        "examples": count,
        "clean_error": 100 * wrong("clean_error") / count,
        "robust_error": 100 * robust,
        "standard_error": 100 * (robust * (1 - robust) / count) ** 0.5,
        "eps": EPS,
        "norm": "linf",
        "rows": rows,
        "held": "".join(chunk["held"] for chunk in chunks),
    }


def clean_errors(session: Session, model: ResNet) -> dict[str, float]:
    """Clean error in percent by number of first test images."""
    right = attacked(session, model, session.images.tests(max(session.scale.clean))).correct
    return {str(count): 100 * float((~right[:count]).double().mean()) for count in session.scale.clean}


def pgd(session: Session, model: ResNet, eps: float, made: Outputs) -> dict[str, Any]:
    """PGD-20 at a radius: robust error, and the cross-entropy of all adversarial examples, ``made``."""
    robust = attacked(session, model, session.images.tests(session.scale.robust), "pgd-20", eps=eps)
    return {
        "eps": eps,
        "robust_error": robust.robust_error,
        "standard_error": robust.standard_error,
        "cross_entropy": float(made.loss.mean()),
        "cross_entropy_standard_error": float(made.loss.std() / len(made.loss) ** 0.5),
    }


def under_attack(session: Session, model: ResNet, data: tuple[Tensor, Tensor], eps: float) -> Outputs:
    """Outputs on PGD-20's adversarial examples of all examples."""
    attack = PGD(eps, steps=20, step_size=2.5 * eps / 20)
    return outputs(model, data, attack=attack, seed=session.folder.seed)


def histograms(made: Outputs) -> dict[str, Any]:
    """Figure 3: confidences and logits."""
    return {
        "confidence": histogram(made.confidence, bins=20, bounds=CONFIDENCES).record(),
        "logits": histogram(made.logits, bins=40, bounds=LOGITS).record(),
    }
