"""An evaluation's attacks gone through batch by batch: shared with other processes, kept on disk, gone on with."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bnsurgery import _states
from bnsurgery._evaluating import AttackRow, Attempt, Run, Threat, percent
from bnsurgery._ranks import Ranks
from bnsurgery._records import require_numbers
from bnsurgery._signals import Signals
from bnsurgery.errors import BNSurgeryWarning

KIND = "evaluate"


@dataclass
class _Under:
    """An attack under way: what it began with, and how far it is."""

    number: int
    left: Tensor
    batches: int = 0
    broken: int = 0
    rejected: int = 0
    seconds: float = 0.0


class Rounds:
    """The attacks of one evaluation in turn. In a round, each process takes a batch; then all know what came of it.

    Attributes:
        correct: whether each example is right clean, bool (N,).
        rows: of the attacks that are done.
    """

    def __init__(
        self,
        run: Run,
        attacks: list[tuple[str, Any]],
        threat: Threat,
        *,
        seed: int,
        progress: bool,
        keep_adversarial: bool,
        path: Path | None,
        every: float,
        configuration: dict[str, Any],
    ) -> None:
        self._run, self._attacks, self._threat, self._seed = run, attacks, threat, seed
        self._keep, self._path, self._every, self._configuration = keep_adversarial, path, every, configuration
        self._ranks = Ranks()
        self._progress = progress and self._ranks.first
        self._under: _Under | None = None
        self._written, self._changed = time.monotonic(), False
        self._signals = Signals(wanted=path is not None and self._ranks.first, before=self._save_what_is_new)
        self.correct = torch.empty(0, dtype=torch.bool)
        self.rows: list[AttackRow] = []

    def go(self) -> None:
        """All that is left to do."""
        with self._signals:
            if not self._resumed():
                self.correct = self._clean()
                self._run.robust = self.correct.clone()
                with self._signals.held():
                    self._ranks.first_does(lambda: self._save(first=True))
                self._signals.deliver()
            for number in range(len(self.rows), len(self._attacks)):
                self._attack(number)

    def _clean(self) -> Tensor:
        """Whether each example is right without an attack; each process looks at every so many-th batch."""
        every = torch.arange(len(self._run.y))
        parts = list(torch.split(every, self._run.batch_size))
        own = parts[self._ranks.rank :: self._ranks.world]
        said = [(part, self._run.right(part, self._run.x[part])) for part in own]
        correct = torch.zeros(len(every), dtype=torch.bool)
        for rows, right in (pair for pairs in self._ranks.gather(said) for pair in pairs):
            correct[rows] = right
        return correct

    def _attack(self, number: int) -> None:
        """One attack on what is still right, from its beginning or from where it was."""
        name, attack = self._attacks[number]
        under = self._under or _Under(number, self._run.robust.nonzero().flatten())
        self._under = under
        began = time.perf_counter() - under.seconds
        parts = self._run.parts(name, attack, under.left)
        world, rank = self._ranks.world, self._ranks.rank
        done = sum(map(len, parts[: under.batches]))
        show = self._progress and len(under.left) > 0
        with tqdm(total=len(under.left), initial=done, desc=name, unit="img", disable=not show, leave=False) as bar:
            while under.batches < len(parts):
                round_ = parts[under.batches : under.batches + world]
                mine = self._attempt(name, attack, round_[rank], under.batches + rank) if rank < len(round_) else None
                attempts = self._ranks.gather(mine)
                with self._signals.held():
                    for attempt in filter(None, attempts):
                        self._run.take(attempt)
                        under.broken += len(attempt.rows)
                        under.rejected += attempt.rejected
                    under.batches += len(round_)
                    under.seconds = time.perf_counter() - began
                    self._changed = True
                    if time.monotonic() - self._written >= self._every:
                        self._save()
                self._signals.deliver()
                bar.update(sum(map(len, round_)))
                bar.set_postfix(robust_error=f"{percent(~self._run.robust):.1f}%")
        if under.rejected:
            warnings.warn(
                f"{name} moved {under.rejected} of {len(under.left)} examples out of the {self._threat.norm} ball of "
                f"eps {self._threat.eps:.4g} or out of bounds: they do not count as broken",
                BNSurgeryWarning,
                stacklevel=4,
            )
        with self._signals.held():
            error, tried = percent(~self._run.robust), len(under.left)
            seconds = self._ranks.of_first(time.perf_counter() - began)
            self.rows.append(AttackRow(name, tried, under.broken, under.rejected, error, seconds))
            self._under = None
            self._save()
        self._signals.deliver()

    def _attempt(self, name: str, attack: Any, rows: Tensor, batch: int) -> Attempt:
        # A seed of its own for each batch: what comes of it does not hang on who takes which.
        generator = torch.Generator().manual_seed((self._seed + 1_000_003 * batch) % 2**63)
        return self._run.attempt(name, attack, rows, self._threat, generator)

    def _save_what_is_new(self) -> None:
        if self._changed:
            self._save()

    def _save(self, *, first: bool = False) -> None:
        """Writes how far it is; where that fails after the first time, the evaluation goes on."""
        if self._path is None or not self._ranks.first:
            return
        robust = self._run.robust
        broken = (self.correct & ~robust).nonzero().flatten()
        state = {
            "configuration": self._configuration,
            "correct": self.correct,
            "robust": robust,
            "rows": [asdict(row) for row in self.rows],
            "under_way": None if self._under is None else vars(self._under),
            "adversarial": self._run.adversarial[broken] if self._keep else None,
        }
        try:
            _states.save(self._path, KIND, state)
        except OSError as error:
            if first:
                raise
            _states.warn_unwritten(self._path, error, "evaluation", stacklevel=5)
        self._written, self._changed = time.monotonic(), False

    def _resumed(self) -> bool:
        """Goes back to where the file says it was; False where there is none.

        Raises:
            CheckpointError: it is damaged, or belongs to another evaluation.
        """
        if self._path is None:
            return False
        state = _states.of_first(self._ranks, self._path, KIND)
        if state is None:
            return False
        with _states.taken_apart(self._path):
            saved = dict(state["configuration"])
            names = _states.differences(saved, self._configuration)
        if names:
            differing = [f"{name} was {saved.get(name)!r}, is {self._configuration.get(name)!r}" for name in names]
            raise _states.of_another(self._path, "evaluation", differing)
        with _states.taken_apart(self._path):
            self._restore(state)
        return True

    def _restore(self, state: dict[str, Any]) -> None:
        count = len(self._run.y)
        correct, robust = state["correct"], state["robust"]
        for mask in (correct, robust):
            if mask.dtype != torch.bool or mask.shape != (count,):
                raise ValueError(f"{mask.dtype} {tuple(mask.shape)} for {count} examples")
        if bool((robust & ~correct).any()):
            raise ValueError("what is wrong clean is said to be robust")
        rows = [AttackRow(**row) for row in state["rows"]]
        under = None if state["under_way"] is None else _Under(**state["under_way"])
        for numbers in (*map(vars, rows), {} if under is None else vars(under)):
            require_numbers({name: value for name, value in numbers.items() if name not in ("attack", "left")})
        names = [name for name, _ in self._attacks]
        if [row.attack for row in rows] != names[: len(rows)] or (under is not None and under.number != len(rows)):
            raise ValueError("its attacks are not those that it says")
        if under is not None:
            tried = under.left.dtype == torch.int64 and under.left.dim() == 1 and bool(correct[under.left].all())
            if len(rows) == len(names) or not tried or not 0 <= under.batches <= count:
                raise ValueError("it tries what is wrong already")
        broken = (correct & ~robust).nonzero().flatten()
        if self._keep:
            self._run.adversarial[broken] = state["adversarial"]
        self.correct, self.rows, self._under = correct, rows, under
        self._run.robust = robust
