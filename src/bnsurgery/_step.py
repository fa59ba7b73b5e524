"""One training step: whole, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._branches import routed
from bnsurgery._crafting import AttackStep
from bnsurgery._data import check_labels
from bnsurgery._frozen import nothing_kept
from bnsurgery._layouts import StepLayouts
from bnsurgery._modes import Buffers, global_state
from bnsurgery._nonfinite import first_nonfinite, is_finite, largest
from bnsurgery._ranks import waits_for_others
from bnsurgery._records import StepRecord, Undone
from bnsurgery._routing import Rows as Runs
from bnsurgery._sharing import Rows, Share, Sum, without_ddp
from bnsurgery._troubles import NotFinite, OneValue, kind_of, of_all, one_value_ends
from bnsurgery._undo import Undo
from bnsurgery.attacks import Loss, Part
from bnsurgery.errors import NonFiniteError
from bnsurgery.layers import device_of, named_parameters, unwrap

OnNonFinite = Literal["skip", "raise"]


@dataclass(frozen=True)
class At:
    """Where in a run a step is.

    Attributes:
        epoch: from 0.
        step: from 0, over all epochs.
        factor: on the learning rates.
        consistent: BN normalises as in evaluation.
    """

    epoch: int
    step: int
    factor: float
    consistent: bool


class Step:
    """Takes steps. ``model`` is called for the training pass (it may be wrapped), its inside is attacked."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        make: AttackStep | None,
        clean_fraction: float,
        loss: Loss,
        images_channels_last: bool,
        lean: bool,
        autocast: torch.dtype | None,
        compile: bool,  # noqa: A002 - the public name
        branches: tuple[str, str] | None,
        on_nonfinite: OnNonFinite,
        share: Share,
    ) -> None:
        self.model, self.root, self._optimizer = without_ddp(model), unwrap(model), optimizer
        self._run = torch.compile(self.model) if compile else self.model
        self.share = share
        self._lean = lean and not compile
        self._autocast = autocast
        self._layouts = StepLayouts(self.root, wanted=images_channels_last)
        self.make, self._clean_fraction, self._loss = make, clean_fraction, loss
        self._branches, self._on_nonfinite = branches, on_nonfinite
        self.device = device_of(model)
        self._rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        self._undo = Undo(optimizer) if optimizer is not None else None
        self._looked = False
        # A buffer may hold infinity on purpose, a mask say.
        self._buffers = [
            (module, name)
            for module in self.root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and is_finite([buffer])
        ]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Puts the learning rates back on leaving the block."""
        try:
            yield
        finally:
            for group, rate in zip(self._optimizer.param_groups if self._optimizer else (), self._rates, strict=True):
                group["lr"] = rate

    @property
    def lr(self) -> float:
        """The learning rate now; 0 where nothing but statistics move."""
        return float(self._optimizer.param_groups[0]["lr"]) if self._optimizer else 0.0

    def take(self, x: Tensor, y: Tensor, at: At, asked: Callable[[], dict[str, bool]]) -> StepRecord | Undone:
        """A whole step, or none: what an exception or a number that is not finite interrupts is undone.

        ``asked`` is what this process asks of all, called when they are told.

        Raises:
            NonFiniteError: a number is not finite, and that is to be an error.
            ValueError: the data of another process has ended.
        """
        if self._undo is not None:
            self._undo.forget()
        self.share.note()
        before, random = Buffers(self.root), torch.get_rng_state()
        starts = None if self.make is None else self.make.generator.get_state()
        clean = round(self._clean_fraction * len(x))
        rows = self.share.rows(x, y, clean, parted=self._branches is not None)
        made, whole = None, False
        try:
            trouble: OneValue | NotFinite | None = None
            loss, wrong, examples, labels = 0.0, 0.0, len(x), y
            try:
                if not is_finite([rows.x]):  # where the data is: the device is not waited for
                    raise NotFinite("what the data gives as inputs")
                labels, rows = rows.y, replace(rows, x=rows.x.to(self.device), y=rows.y.to(self.device).long())
                made = self._made(rows)
            except (OneValue, NotFinite) as error:
                trouble = error
            self._set_modes(at.consistent)
            parted = self._branches is not None
            weight, elsewhere = self.share.agree(rows, trouble is not None, self.device, parted=parted)
            if trouble is None and made is not None and not elsewhere:
                try:
                    loss, wrong = self._passed(made, rows, labels, before, weight)
                except (OneValue, NotFinite) as error:
                    trouble = error
            if not self.share.ranks.alone:
                total = self._together(rows, loss, wrong, trouble, asked(), weighted=weight is not None)
                loss, wrong, examples = total.loss, total.wrong, total.examples
                trouble = of_all(trouble, total.troubles)
            if trouble is not None:
                raise trouble
            self._update(at.factor)
            whole = True
        except OneValue as error:
            return Undone("left out", str(error))
        except NotFinite as error:
            self._take_back(before)
            where = str(error) if made is None else self._where(made, rows.clean, at, random, otherwise=str(error))
            if self._on_nonfinite == "raise":
                message = f"step {at.step}: {where} is not finite; the model is as after the last whole step"
                raise NonFiniteError(message) from None
            return Undone("skipped", f"{where} is not finite")
        finally:
            if not whole:
                self._take_back(before)
                if self.make is not None and starts is not None:  # which not all processes may have drawn from
                    self.make.generator.set_state(starts)
            self._clear()
        return StepRecord(at.epoch, at.step, loss, 100 * wrong, self.lr, examples)

    def ended(self) -> None:
        """Tells the other processes that there are no more batches in this epoch.

        Raises:
            ValueError: another process has more.
        """
        self.share.ended(self._parameters, self.device)

    def require_same(self) -> None:
        """Raises :class:`BNSurgeryError` where what the optimizer moves differs from process to process."""
        self.share.require_same(self._parameters)

    def _take_back(self, before: Buffers) -> None:
        """The model and the optimizer become what they were; may be called again."""
        before.restore()
        if self._undo is not None:
            self._undo.restore()
        self._clear()

    def _clear(self) -> None:
        torch.clear_autocast_cache()  # the caller's own autocast would go on with the weights of the first step
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    def _made(self, rows: Rows) -> Tensor:
        """The batch to train on, its first part clean, the rest adversarial, in the layout of the step."""
        x, clean = rows.x, rows.clean
        self._layouts.try_out(x)
        if self.make is not None and clean < len(x):
            of = None if rows.every == 1 else Part(slice(rows.first, None, rows.every), rows.whole)
            with self._one_value_ends(self.make.live, len(x), clean), self._through(0, len(x)):
                x = torch.cat([x[:clean], self.make(x[clean:], rows.y[clean:], of)])
        return self._layouts.arranged(x)

    def _passed(
        self, x: Tensor, rows: Rows, labels: Tensor, before: Buffers, weight: float | None
    ) -> tuple[float, float]:
        """Forward and backward: the mean loss, and the share of examples misclassified.

        ``labels`` are as the data gave them: to look at those on the CPU, the device is not waited for.
        """
        clean = rows.clean if self.make is not None else len(x)
        # Until the backward pass is done: activation checkpointing runs parts of the model once more in it.
        lean = nothing_kept(self.model) if self._lean else nullcontext()
        with lean, self._through(clean, len(x)), self.share.normalising(rows):
            # One value here is one of more where processes normalise together, and all have to be there.
            watch = self._one_value_ends(weight is None, len(x), rows.clean)
            with watch, torch.set_grad_enabled(self._optimizer is not None):
                with self._mixed_precision(x):
                    logits = self._layouts.run(self._run, x, before)
                check_labels(labels, logits)
                if self._autocast is not None:
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = self._loss(logits, rows.y).mean()
            if self._optimizer is not None:
                (loss if weight is None else loss * weight).backward()  # type: ignore[no-untyped-call]
        wrong = (logits.detach().argmax(1) != rows.y).double().mean()
        mean, share = self._read(loss.detach(), wrong)
        return mean, share

    def _together(
        self,
        rows: Rows,
        loss: float,
        wrong: float,
        trouble: OneValue | NotFinite | None,
        asked: dict[str, bool],
        *,
        weighted: bool,
    ) -> Sum:
        """Gradients and statistics become those of all processes."""
        return self.share.add_up(
            self._parameters,
            rows=rows,
            weighted=weighted,
            loss=loss,
            wrong=wrong,
            trouble=kind_of(trouble),
            asked=asked,
            device=self.device,
        )

    def _read(self, *numbers: Tensor) -> list[float]:
        """Some numbers; with them, in one answer from the device, whether buffers and gradients are finite.

        Raises:
            NotFinite: one of all these is not.
        """
        buffers = [buffer for module, name in self._buffers if (buffer := module._buffers[name]) is not None]
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        told = largest([*buffers, *gradients, *numbers])
        values: list[float] = torch.stack([number.to(told) for number in (told, *numbers)]).tolist()
        if not math.isfinite(values[0]):
            before = is_finite([*buffers, *numbers])
            gradient = self._name_of_last(lambda parameter: parameter.grad) if before else None
            raise NotFinite("the loss" if gradient is None else f"the gradient of {gradient}")
        return values[1:]

    def _update(self, factor: float) -> None:
        """The optimizer's step.

        Raises:
            NotFinite: what comes of it is not.
        """
        if not self.share.ranks.alone:
            self._read()  # of all processes: a sum of what was finite may not be
        if self._optimizer is None or self._undo is None:
            return
        self._undo.note()
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * float(factor)
        self._optimizer.step()
        if not is_finite(self._parameters):
            raise NotFinite(f"the optimizer's update of {self._name_of_last(lambda parameter: parameter)}")

    def _name_of_last(self, value: Callable[[nn.Parameter], Tensor | None]) -> str | None:
        """The last parameter, which is the first that a backward pass comes to, of which a value is not finite."""
        names = [
            name
            for name, parameter in named_parameters(self.root).items()
            if (tensor := value(parameter)) is not None and not is_finite([tensor])
        ]
        return repr(names[-1]) if names else None

    def _where(self, x: Tensor, clean: int, at: At, random: Tensor, *, otherwise: str) -> str:
        """Where in a pass numbers went wrong, in words; looked for once a run, as it takes a pass of its own."""
        if not is_finite([x]):
            return "what the attack gives"
        if self._looked or waits_for_others(self.root):
            return otherwise
        self._looked = self._on_nonfinite == "skip"
        before = Buffers(self.root)
        autocast = self._mixed_precision(x)
        found = None
        try:
            with global_state(self.device), self._through(clean if self.make is not None else len(x), len(x)), autocast:
                torch.set_rng_state(random)
                self._set_modes(at.consistent)
                with suppress(Exception):  # it has run before; what it says now is not what matters
                    found = first_nonfinite(self.root, lambda: self.root(x))
        finally:
            before.restore()
        return found or otherwise

    def _one_value_ends(self, watch: bool, count: int, clean: int) -> AbstractContextManager[None]:
        """Watches for BN layers that are given one value per channel, where a batch may come to that."""
        few = 1 in (count, count - clean) or (self._branches is not None and clean == 1)
        return one_value_ends(self.root) if watch and few else nullcontext()

    def _through(self, clean: int, count: int) -> AbstractContextManager[None]:
        """Sends the first ``clean`` of so many examples through the clean branch, the rest through the adversarial."""
        if self._branches is None:
            return nullcontext()
        runs = [(name, size) for name, size in zip(self._branches, (clean, count - clean), strict=True) if size]
        return routed(self.root, runs[0][0] if len(runs) == 1 else Runs(runs))

    def _set_modes(self, consistent: bool) -> None:
        """Training mode; towards the end of the run BN may stay as in evaluation."""
        self.model.train()
        if consistent:
            for module in self.root.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False

    def _mixed_precision(self, x: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(x.device.type, self._autocast) if self._autocast is not None else nullcontext()
