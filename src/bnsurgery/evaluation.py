"""Measure clean and robust error: attacks in turn, each on what is left, every adversarial example checked."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery import _states
from bnsurgery._data import Data, check_eps
from bnsurgery._evaluating import AttackRow, Threat, percent, plan, running
from bnsurgery._geometry import Norm, check_norm
from bnsurgery._ranks import Ranks, distributed
from bnsurgery._rounds import Rounds
from bnsurgery.adapters import configuration_of, is_autoattack
from bnsurgery.engine import Engine, EngineLike, chosen_engine
from bnsurgery.layers import unwrap

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
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 10.0,
    progress: bool = True,
    engine: Engine | EngineLike = "fast",
    compile: bool = False,  # noqa: A002 - torch's own word
) -> Evaluation:
    """Measures clean and robust error of a model in evaluation mode; changes nothing.

    Attacks run one after another, each on the examples that are still right. An example counts as broken only if the
    adversarial one lies within eps and the bounds, and the model misclassifies it. The data is held in memory.

    Where ``torch.distributed`` is initialised (:func:`bnsurgery.processes`), all its processes work on one evaluation:
    each is given the same model and all of the data, and attacks every so many-th batch. All return the same as one
    process would.

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
        seed: seeds each batch of each attack anew, so that a result does not hang on what ran before it, or where.
        keep_adversarial: return the adversarial examples too.
        checkpoint: a file from which the evaluation goes on where it exists, to the same result as in one go; a
            finished one is read from it. Written before the first attack, after each attack, every ``checkpoint_every``
            seconds after a batch, and when SIGINT or SIGTERM comes; the one before it is kept beside it (``.previous``)
            and used, with a warning, where the newest is damaged.
        checkpoint_every: seconds between checkpoints within an attack, at least 0.
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
        CheckpointError: the checkpoint is damaged, and so is the one before it, or it belongs to another model, other
            data or another configuration (the message lists the differences).
        LostProcessError: another process of this evaluation is gone or does not answer.
        OSError: the first checkpoint cannot be written.

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
    if not checkpoint_every >= 0:
        raise ValueError(f"checkpoint_every must be at least 0, got {checkpoint_every}")
    path = None if checkpoint is None else Path(checkpoint)
    _states.require_folder(path)
    plans = plan(attacks, eps, norm, bounds, normalised=mean is not None)
    switches = chosen_engine(engine)
    ready = running(
        model,
        data,
        bounds=bounds,
        mean=mean,
        std=std,
        batch_size=batch_size,
        max_examples=max_examples,
        switches=switches,
        compile=compile,
    )
    with ready as run:
        same = _same(unwrap(model), run.x, run.y) if path is not None or distributed() else {}
        _check_processes(same)
        run.logits(torch.arange(min(batch_size, len(run.y))), run.x[:batch_size])  # tells the number of classes
        built = [(name, build(run, seed)) for name, build in plans]
        for name, attack in built:
            run.refuse_around(name, attack)
        configuration = {
            "attacks": [_described(name, attack) for name, attack in built],
            "batch_size": batch_size,
            "bounds": list(bounds),
            "compile": compile,
            "engine": repr(switches and replace(switches, keep_memory=True)),
            "eps": float(eps),
            "keep_adversarial": keep_adversarial,
            "mean": None if mean is None else [float(value) for value in torch.as_tensor(mean).flatten()],
            "norm": norm,
            "seed": seed,
            "std": None if std is None else [float(value) for value in torch.as_tensor(std).flatten()],
            **same,
        }
        _states.require_same_in_all(Ranks(), configuration)
        rounds = Rounds(
            run,
            built,
            Threat(eps, norm, bounds),
            seed=seed,
            progress=progress,
            keep_adversarial=keep_adversarial,
            path=path,
            every=checkpoint_every,
            configuration=configuration,
        )
        rounds.go()
    made = None
    if keep_adversarial:
        made = run.adversarial if run.inside is None else run.inside.inputs(run.adversarial)
    return Evaluation(
        examples=len(run.y),
        clean_error=percent(~rounds.correct),
        robust_error=percent(~run.robust),
        rows=tuple(rounds.rows),
        eps=eps,
        norm=norm,
        seed=seed,
        correct=rounds.correct,
        robust=run.robust,
        adversarial=made,
    )


def _described(name: str, attack: Any) -> str:
    """For the configuration of a checkpoint: a part that was named here goes by its name and the other arguments."""
    own = is_autoattack(attack) and attack.attacks_to_run == [name]
    described = name if own else configuration_of(attack)
    return name if described == name else f"{name}: {described}"


def _same(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, str]:
    """What must be the same in all processes, and when an evaluation goes on."""
    return {
        "data": _states.fingerprint([("x", x), ("y", y)]),
        "model": _states.fingerprint((*model.named_parameters(), *model.named_buffers())),
    }


def _check_processes(same: dict[str, str]) -> None:
    for name, what in (("data", "all of the same data, in the same order"), ("model", "the same model")):
        said = set(Ranks().gather(same.get(name)))
        if len(said) > 1:
            raise ValueError(f"the processes were given different {name}: evaluate shares the work, give each {what}")
