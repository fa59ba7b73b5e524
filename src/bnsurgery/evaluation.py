"""Measure clean and robust error: attacks in turn, each on what is left, every adversarial example checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from bnsurgery._data import Data, check_eps
from bnsurgery._evaluating import AttackRow, percent, plan, running
from bnsurgery._geometry import Norm, check_norm
from bnsurgery.engine import Engine, EngineLike, chosen_engine

__all__ = ["AttackRow", "Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Clean and robust error of a model, in percent; robust error counts what is wrong clean or under any attack.

    Attributes:
        examples: number of examples.
        clean_error: share of examples misclassified without an attack, in percent.
        robust_error: share misclassified clean or under any of the attacks, in percent.
        rows: one for each attack, in order.
        eps: radius in pixel units.
        norm: of the ball.
        seed: of the attacks.
        correct: whether each example is classified right clean, bool (N,), on the CPU.
        robust: whether each example is right clean and under all attacks, bool (N,), on the CPU.
        adversarial: where asked for, the inputs (N, ...) with each broken example replaced by what broke it, as the
            model takes them (normalised where ``mean`` and ``std`` were given), on the CPU.
    """

    examples: int
    clean_error: float
    robust_error: float
    rows: tuple[AttackRow, ...]
    eps: float
    norm: Norm
    seed: int
    correct: Tensor = field(repr=False, compare=False)
    robust: Tensor = field(repr=False, compare=False)
    adversarial: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def standard_error(self) -> float:
        """Standard error of ``robust_error`` as an estimate for the population, in percentage points."""
        share = self.robust_error / 100
        return 100 * math.sqrt(share * (1 - share) / self.examples)

    def record(self) -> dict[str, Any]:
        """The numbers alone, ready for JSON."""
        names = ("examples", "clean_error", "robust_error", "standard_error", "eps", "norm", "seed")
        return {name: getattr(self, name) for name in names} | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        after = [(f"after {row.attack}", f"{row.robust_error:6.2f}%  ({row.seconds:.1f} s)") for row in self.rows]
        lines = [
            ("clean error", f"{self.clean_error:6.2f}%"),
            *after,
            ("robust error", f"{self.robust_error:6.2f}%  +- {self.standard_error:.1f} (one standard error)"),
        ]
        width = max(26, *(len(name) for name, _ in lines)) + 2
        head = f"{self.examples} examples, {self.norm}, eps {self.eps:.4g}"
        return "\n".join([head, *(f"{name:{width}}{value}" for name, value in lines)])


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    attacks: str | Sequence[Any] = ("autoattack",),
    eps: float = 8 / 255,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    max_examples: int | None = None,
    seed: int = 0,
    keep_adversarial: bool = False,
    progress: bool = True,
    engine: Engine | EngineLike = "fast",
    compile: bool = False,  # noqa: A002 - torch's own word
) -> Evaluation:
    """Measures clean and robust error of a model in evaluation mode; changes nothing.

    Attacks run one after another, each on the examples that are still right. An example counts as broken only if the
    adversarial one lies within eps and the bounds, and the model misclassifies it. The data is held in memory.

    Args:
        model: maps inputs to logits (N, K). Normalisation belongs inside it, or in ``mean`` and ``std``.
        data: an iterable of ``(x, y)`` batches, or one pair of tensors: inputs (N, ...) and labels (N,). Inputs of
            another dtype are rounded to float32, in which attacks work, and given to the model in its own.
        attacks: any of: ``"autoattack"`` (standard AutoAttack, a row for each of its four parts), a part's own name
            (``"apgd-ce"``, ``"apgd-t"``, ``"fab-t"``, ``"square"``), ``"pgd-20"`` (so many steps of 2.5 eps / steps),
            a :class:`PGD`, a torchattacks object, an AutoAttack object, a callable ``attack(model, x, y)``.
        eps: radius of the threat in pixel units, at least 0.
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest valid input, in pixel units; AutoAttack knows [0, 1] alone.
        mean: per-channel mean by which ``data`` was normalised, if it was: attacks then work on the pixels.
        std: per-channel standard deviation likewise.
        batch_size: examples attacked at once.
        max_examples: use the first so many examples.
        seed: seeds each attack anew, so that one attack's result does not hang on which ran before it.
        keep_adversarial: return the adversarial examples too.
        progress: show a progress bar on standard error.
        engine: ``"fast"``: a :class:`PGD` with ``bn="eval"``, a torchattacks or an AutoAttack object attacks a private
            copy of the model, fused, in the model's own precision; callables attack the model itself. ``"plain"``:
            everything attacks the model itself. An :class:`Engine` sets the switches. What counts as broken is always
            found out on the model itself.
        compile: run the copy through ``torch.compile``: seconds to minutes at the start.

    Returns:
        Errors in percent, one row for each attack, and which examples held.

    Raises:
        ValueError: an unknown name, an argument out of range, no data, wrong shapes, labels or inputs out of range, an
            attack object bound to a module around the model where that takes other inputs than float32 pixels.
        TypeError: an attack that is none.
        BNSurgeryError: an attack returned something else than inputs of the same shape.
        MissingExtraError: AutoAttack is asked for and not installed.

    Warns:
        BNSurgeryWarning: an attack returned examples outside eps or the bounds, which do not count, or is set to
            another eps or norm; the model cannot be copied or fused.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        >>> x, y = torch.rand(8, 3, 2, 2), torch.arange(8)
        >>> result = evaluate(model, (x, y), attacks=["pgd-10"], progress=False)
        >>> result.examples, len(result.rows), result.robust_error >= result.clean_error
        (8, 1, True)
    """
    check_norm(norm)
    check_eps(eps, norm, bounds)
    plans = plan(attacks, eps, norm, bounds, normalised=mean is not None)
    ready = running(
        model,
        data,
        bounds=bounds,
        mean=mean,
        std=std,
        batch_size=batch_size,
        max_examples=max_examples,
        switches=chosen_engine(engine),
        compile=compile,
    )
    with ready as run:
        correct = run.clean()
        run.robust = correct.clone()
        rows = []
        built = [(name, build(run, seed)) for name, build in plans]
        for name, attack in built:
            run.refuse_around(name, attack)
        for name, attack in built:
            rows.append(run.attack(name, attack, eps, norm, bounds, seed, progress))
    made = None
    if keep_adversarial:
        made = run.adversarial if run.inside is None else run.inside.inputs(run.adversarial)
    return Evaluation(
        examples=len(run.y),
        clean_error=percent(~correct),
        robust_error=percent(~run.robust),
        rows=tuple(rows),
        eps=eps,
        norm=norm,
        seed=seed,
        correct=correct,
        robust=run.robust,
        adversarial=made,
    )
