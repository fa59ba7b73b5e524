"""Measures one row as the paper does: clean error, AutoAttack, PGD-20 beside it, and outputs under attack."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from bnsurgery import PGD, Evaluation, evaluate
from bnsurgery.analysis import Outputs, histogram, outputs
from examples.resnet import ResNet
from examples.common.files import Problem, origin, read_json, require_same, write_json
from examples.common.work import float32
from examples.walter.results import look_at_chunk
from examples.walter.rows import EPS, ROWS
from examples.walter.training import Context, network, require_trained

CONFIDENCES, LOGITS = (0.0, 1.0), (-40.0, 40.0)
"""Bounds of the histograms of Figure 3."""


class Diverged(Problem):
    """The outputs of a row are not finite."""


def evaluate_row(context: Context, key: str) -> bool:
    """Evaluates a row that is trained, or goes on with it; whether it is finished.

    Raises:
        Diverged: its outputs are not finite.
        Problem: the row is not trained yet, a file is damaged or of another configuration, a disk is full, or another
            process works on it.
    """
    if context.results.evaluation(key) is not None:
        return True
    require_trained(context, key)
    data = context.images.tests(context.scale.robust)
    with context.folder.locked(key), float32():
        # Another process may have finished it while the images were read.
        return context.results.evaluation(key) is not None or _evaluate(context, key, data)


def _evaluate(context: Context, key: str, data: tuple[Tensor, Tensor]) -> bool:
    model = network(context, key)
    clean = outputs(model, data)
    require_finite(context, key, clean)
    done = autoattack(context, key, model)
    if done is None or not context.fits(None):
        return False
    began = time.perf_counter()
    under = {eps: under_attack(context, model, data, eps) for eps in context.scale.robust_eps}
    for made in under.values():
        require_finite(context, key, made)
    record = {
        "row": ROWS[key].name,
        "configuration": done["configuration"],
        "sha256": done["sha256"],
        "clean_error": clean_errors(context, model),
        "autoattack": joined(done["chunks"]),
        "pgd20": [pgd(clean, made) | {"eps": eps} for eps, made in under.items()],
        "histograms": {"clean": histograms(clean), "adversarial": histograms(under[EPS])},
        "calls": done["calls"],
        **done["calls"][-1],
    }
    record["seconds"] = round(sum(chunk["seconds"] for chunk in done["chunks"]) + time.perf_counter() - began, 1)
    write_json(context.folder.record(key, "evaluate"), record)
    return True


def require_finite(context: Context, key: str, made: Outputs) -> None:
    """Raises :class:`Diverged` where the outputs of a row are not finite."""
    if not bool(made.logits.isfinite().all() and made.loss.isfinite().all()):
        made_of_it = f"{context.folder.path / key}.* and {context.folder.interim(key)}.*"
        remedy = f"change its settings in examples/walter/rows.py, and remove {made_of_it}"
        raise Diverged(f"{key} has diverged, its outputs are not finite: {remedy}")


def autoattack(context: Context, key: str, model: ResNet) -> dict[str, Any] | None:
    """Standard AutoAttack on the first test images, some of them at a time; None where the budget ends before them."""
    path, scale = context.folder.interim(f"{key}.autoattack.json"), context.scale
    configuration = scale.of_evaluation(ROWS[key], context.folder.width)
    sha256 = (context.results.training(key) or {})["sha256"]
    done: dict[str, Any] = {"configuration": configuration, "sha256": sha256, "chunks": [], "calls": []}
    if path.exists():
        done = _read(path, configuration, sha256)
    done["calls"].append(origin(context.program, context.folder.seed, context.device))
    x, y = context.images.tests(scale.robust)
    for start in range(0, len(y), scale.chunk)[len(done["chunks"]) :]:
        known = [chunk["seconds"] for chunk in done["chunks"]]
        if not context.fits(max(known) if known else context.results.seconds_a_chunk()):
            return None
        context.worked = True
        began = time.perf_counter()
        found = attacked(context, model, (x[start : start + scale.chunk], y[start : start + scale.chunk]), "autoattack")
        held = "".join(str(int(flag)) for flag in found.robust)
        done["chunks"].append(found.record() | {"held": held, "seconds": time.perf_counter() - began})
        write_json(path, done)
        if not context.bars:
            print(f"{ROWS[key].name}: AutoAttack, {start + len(held)} of {len(y)} examples done", flush=True)
    return done


def _read(path: Path, configuration: dict[str, Any], sha256: str) -> dict[str, Any]:
    """What is done of an evaluation."""

    def look(record: dict[str, Any]) -> None:
        _ = record["configuration"]["width"], record["sha256"], list(record["calls"])
        for chunk in record["chunks"]:
            look_at_chunk(chunk)
            float(chunk["seconds"])

    done = read_json(path, look)
    require_same(path, done["configuration"], configuration)
    if done["sha256"] != sha256:
        raise Problem(f"{path} is of another network than is here now: remove it, and it is made again")
    return done


def attacked(context: Context, model: ResNet, data: tuple[Tensor, Tensor], *attacks: Any) -> Evaluation:
    """Errors in percent under these attacks."""
    return evaluate(model, data, attacks=attacks, eps=EPS, seed=context.folder.seed, progress=context.bars)


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
        "chunk_seconds": [round(chunk["seconds"], 1) for chunk in chunks],
    }


def clean_errors(context: Context, model: ResNet) -> dict[str, float]:
    """Clean error in percent by number of first test images."""
    right = attacked(context, model, context.images.tests(max(context.scale.clean))).correct
    return {str(count): 100 * float((~right[:count]).double().mean()) for count in context.scale.clean}


def under_attack(context: Context, model: ResNet, data: tuple[Tensor, Tensor], eps: float) -> Outputs:
    """Outputs on PGD-20's adversarial examples of all examples, those that are wrong clean included."""
    attack = PGD(eps, steps=20, step_size=2.5 * eps / 20)
    return outputs(model, data, attack=attack, seed=context.folder.seed)


def pgd(clean: Outputs, made: Outputs) -> dict[str, Any]:
    """Robust error, wrong clean or under PGD-20, and the cross-entropy of all adversarial examples."""
    wrong = (clean.logits.argmax(1) != clean.labels) | (made.logits.argmax(1) != made.labels)
    share, count = float(wrong.double().mean()), len(wrong)
    return {
        "robust_error": 100 * share,
        "standard_error": 100 * (share * (1 - share) / count) ** 0.5,
        "cross_entropy": float(made.loss.mean()),
        "cross_entropy_standard_error": float(made.loss.std() / count**0.5),
    }


def histograms(made: Outputs) -> dict[str, Any]:
    """Figure 3: confidences and logits."""
    return {
        "confidence": histogram(made.confidence, bins=20, bounds=CONFIDENCES).record(),
        "logits": histogram(made.logits, bins=80, bounds=LOGITS).record(),
    }
