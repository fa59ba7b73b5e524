"""One fine-tuning run under way: steps, epochs, records, schedule."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from bnsurgery._branches import routed
from bnsurgery._data import check_labels, given, unpack
from bnsurgery._frozen import nothing_kept
from bnsurgery._layouts import channels_last, runs_channels_last
from bnsurgery._modes import Buffers
from bnsurgery._replicas import Replicas, can_attack_a_copy, craft_on_copy
from bnsurgery._routing import Rows
from bnsurgery.adapters import craft
from bnsurgery.attacks import PGD, Loss, attacking, cross_entropy
from bnsurgery.errors import BNSurgeryWarning
from bnsurgery.layers import device_of, unwrap

Schedule: TypeAlias = Callable[[float], float]


@dataclass(frozen=True)
class StepRecord:
    """One step: counted from 0 over the whole run.

    Attributes:
        epoch: from 0.
        step: from 0, over all epochs.
        loss: mean over the batch.
        error: share misclassified, in training mode, in percent.
        lr: learning rate of the first parameter group; 0 where nothing but statistics move.
        examples: batch size.
    """

    epoch: int
    step: int
    loss: float
    error: float
    lr: float
    examples: int


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: from 0.
        steps: whole steps in it.
        examples: examples in these steps.
        loss: mean over the examples, on what the model was trained on.
        error: share of these misclassified, in training mode, in percent.
        lr: learning rate at its end.
        skipped: steps undone because a loss or gradient was not finite.
        left_out: batches left out because a BN layer saw one value per channel.
        seconds: wall time, callbacks not counted.
    """

    epoch: int
    steps: int
    examples: int
    loss: float
    error: float
    lr: float
    skipped: int
    left_out: int
    seconds: float


Callback: TypeAlias = Callable[[EpochRecord, nn.Module], "bool | None"]
StepCallback: TypeAlias = Callable[[StepRecord, nn.Module], "bool | None"]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda _progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Epochs 60, 90 and 120 of 150, as in the code that Walter et al. build on.
    "step": lambda progress: 0.1 ** sum(progress >= milestone for milestone in (0.4, 0.6, 0.8)),
}
"""By name: progress from 0 to 1 to a factor on the learning rate."""


class AttackStep:
    """Inputs (N, ...) and labels (N,) to adversarial examples of the live model as it is now.

    ``strength``, in (0, 1], is the factor on eps and step size of a PGD.
    """

    def __init__(self, attack: Any, model: nn.Module, generator: torch.Generator, replicas: Replicas | None) -> None:
        """Attacks copies of the model where there are ``replicas`` and the attack can, else the model."""
        self._attack, self._model, self._generator = attack, model, generator
        self._replicas = replicas if can_attack_a_copy(attack, model) else None
        self.strength = 1.0

    @property
    def live(self) -> bool:
        """Whether the live model itself is run."""
        return self._replicas is None or self._replicas.none

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with self._weakened():
            return self._made(x, y)

    @contextmanager
    def _weakened(self) -> Iterator[None]:
        """Holds a PGD at its present strength, for the block; the object itself, which may be more than a PGD."""
        if self.strength == 1 or not isinstance(self._attack, PGD):
            yield
            return
        full = self._attack.eps, self._attack.step_size
        self._attack.eps, self._attack.step_size = (self.strength * size for size in full)
        try:
            yield
        finally:
            self._attack.eps, self._attack.step_size = full

    def _made(self, x: Tensor, y: Tensor) -> Tensor:
        replica = None if self._replicas is None or not len(x) else self._replicas.fresh(x)
        if replica is None:
            return craft(self._attack, self._model, x, y, generator=self._generator)
        # A loss of the user's own may call the live model, for its clean logits say.
        calls = isinstance(self._attack, PGD) and self._attack.loss is not cross_entropy
        with attacking(self._model) if calls else nullcontext():
            return craft_on_copy(replica, self._attack, x, y, generator=self._generator)


class _OneValue(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """A BN layer in training mode was given one value per channel."""


class Tuning:
    """The loop. ``model`` is called for the training step (it may be wrapped), its inside is attacked."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        make: AttackStep | None,
        eps_warmup: int,
        clean_fraction: float,
        loss: Loss,
        schedule: Schedule,
        epochs: int,
        max_steps: int | None,
        steps_per_epoch: int | None,
        on_step: StepCallback | None,
        progress: bool,
        images_channels_last: bool,
        lean: bool,
        autocast: torch.dtype | None,
        compile: bool,  # noqa: A002 - the public name
        branches: tuple[str, str] | None,
        consistent_bn_after: int | None,
    ) -> None:
        self.model, self.root, self.optimizer = model, unwrap(model), optimizer
        self._run = torch.compile(model) if compile else model
        self._images_channels_last, self._lean = images_channels_last, lean and not compile
        self._autocast = autocast
        self._layouts: dict[torch.Size, bool] = {}
        self.make, self.clean_fraction, self.loss, self.schedule = make, clean_fraction, loss, schedule
        self._eps_warmup, self._branches, self._consistent_bn_after = eps_warmup, branches, consistent_bn_after
        self.epochs, self.max_steps, self.on_step = epochs, max_steps, on_step
        self.device = device_of(model)
        self.step = self.epoch = 0
        self.stopped = False
        self._warned: set[str] = set()
        self._rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        total = None if steps_per_epoch is None else epochs * steps_per_epoch
        self.total = max_steps if total is None else min(total, max_steps or total)
        self._bar = tqdm(total=self.total, desc="fine-tuning", unit="step", disable=not progress)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Closes the progress bar and puts the learning rates back on leaving the block."""
        try:
            yield
        finally:
            self._bar.close()
            for group, rate in zip(self.optimizer.param_groups if self.optimizer else (), self._rates, strict=True):
                group["lr"] = rate

    def resume(self, epoch: int, step: int) -> None:
        """Goes on at the start of an epoch."""
        self.epoch, self.step = epoch, step
        self._bar.update(step)

    def run_epoch(self, data: Iterable[Any]) -> EpochRecord:
        """One pass over the data, or less where ``max_steps`` or a callback ends it."""
        began = time.perf_counter()
        steps = examples = skipped = left_out = batches = 0
        total_loss = wrong = 0.0
        if self.make is not None:
            self.make.strength = min(1.0, (self.epoch + 1) / (self._eps_warmup + 1))
        for batch in data:
            batches += 1
            x, y = unpack(batch)
            if not len(x):
                raise ValueError(f"data yielded a batch without examples in epoch {self.epoch}")
            outcome = self._try(x.to(self.device), y.to(self.device).long())
            self.step += 1
            self._bar.update()
            if isinstance(outcome, StepRecord):
                steps, examples = steps + 1, examples + outcome.examples
                total_loss += outcome.loss * outcome.examples
                wrong += outcome.error * outcome.examples
                self._bar.set_postfix(epoch=self.epoch + 1, loss=f"{outcome.loss:.3f}", error=f"{outcome.error:.1f}%")
                self.stopped = bool(self.on_step and self.on_step(outcome, self.root))
            else:
                skipped += outcome == "skipped"
                left_out += outcome == "left out"
            if self.stopped or self.done:
                break
        if not batches:
            raise ValueError(
                f"data yielded no batch in epoch {self.epoch}: it must be an iterable that can be gone over each epoch"
            )
        return EpochRecord(
            epoch=self.epoch,
            steps=steps,
            examples=examples,
            loss=total_loss / examples if examples else math.nan,
            error=wrong / examples if examples else math.nan,
            lr=self._lr(),
            skipped=skipped,
            left_out=left_out,
            seconds=time.perf_counter() - began,
        )

    @property
    def done(self) -> bool:
        """Whether ``max_steps`` are behind us."""
        return self.max_steps is not None and self.step >= self.max_steps

    def _try(self, x: Tensor, y: Tensor) -> StepRecord | str:
        """A whole step, or none: what an exception or a number that is not finite interrupts is undone."""
        before = Buffers(self.root)
        clean = round(self.clean_fraction * len(x))
        whole = False
        try:
            watched = 1 in (len(x), len(x) - clean) or (self._branches is not None and clean == 1)
            last = self._takes_channels_last(x)
            with self._one_value_ends(watched and self.make is not None and self.make.live):
                with self._through(0, len(x)):
                    x = self._mixed(x, y, clean)
                if self._images_channels_last and x.dim() == 4:
                    x = channels_last(x) if last else x.contiguous()
            # Until the backward pass is done: activation checkpointing runs parts of the model once more in it.
            lean = nothing_kept(self.model) if self._lean else nullcontext()
            with lean, self._through(clean if self.make is not None else len(x), len(x)):
                with self._one_value_ends(watched):
                    self._set_modes()
                    with torch.set_grad_enabled(self.optimizer is not None):
                        logits = self._logits(x, before)
                        check_labels(y, logits)
                        if self._autocast is not None:
                            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                        loss = self.loss(logits, y).mean()
                if not self._backward(loss):
                    self._warn(
                        "skipped", f"step {self.step}: the loss or a gradient is not finite; the step is skipped"
                    )
                    return "skipped"
            whole = True
        except _OneValue as error:
            self._warn("left out", f"step {self.step}: {error}; that batch is left out")
            return "left out"
        finally:
            if not whole:
                before.restore()
            torch.clear_autocast_cache()  # the caller's own autocast would go on with the weights of the first step
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
        error_rate = 100 * float((logits.detach().argmax(1) != y).double().mean())
        return StepRecord(self.epoch, self.step, float(loss.detach()), error_rate, self._lr(), len(x))

    def _through(self, clean: int, count: int) -> AbstractContextManager[None]:
        """Sends the first ``clean`` of so many examples through the clean branch, the rest through the adversarial."""
        if self._branches is None:
            return nullcontext()
        runs = [(name, size) for name, size in zip(self._branches, (clean, count - clean), strict=True) if size]
        return routed(self.root, runs[0][0] if len(runs) == 1 else Rows(runs))

    def _set_modes(self) -> None:
        """Training mode; towards the end of the run BN may stay as in evaluation."""
        self.model.train()
        if self._consistent_bn_after is not None and self.epoch >= self._consistent_bn_after:
            for module in self.root.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False

    def _logits(self, x: Tensor, before: Buffers) -> Tensor:
        """The model's own in training mode; with images in the usual layout where a hook takes no other."""
        mixed = torch.autocast(x.device.type, self._autocast) if self._autocast is not None else nullcontext()
        with mixed:
            try:
                logits: Tensor = self._run(x)
            except RuntimeError as error:
                if not self._layouts.get(x.shape[1:]) or "view size is not compatible" not in str(error):
                    raise
                self._layouts[x.shape[1:]] = False
                before.restore()
                logits = self._run(x.contiguous())
        return logits

    def _takes_channels_last(self, x: Tensor) -> bool:
        """Whether the step is to be made in the memory format that is fastest for images."""
        if not self._images_channels_last or x.dim() != 4:
            return False
        if x.shape[1:] not in self._layouts:
            if len(x) < 2:  # one example may not do in training mode, which says nothing of larger batches
                return False
            # In training mode SyncBatchNorm waits for the other processes, which need not be trying this out.
            alone = not any(isinstance(module, nn.SyncBatchNorm) for module in self.root.modules())
            modes = (False, True) if alone else (False,)
            self._layouts[x.shape[1:]] = runs_channels_last(self.root, x[:2], modes=modes, hooks=False)
        return self._layouts[x.shape[1:]]

    def _mixed(self, x: Tensor, y: Tensor, clean: int) -> Tensor:
        """The batch to train on: its first part clean, the rest adversarial."""
        if self.make is None or clean == len(x):
            return x
        return torch.cat([x[:clean], self.make(x[clean:], y[clean:])])

    def _backward(self, loss: Tensor) -> bool:
        """Steps the optimizer; False, with nothing changed, where a number is not finite."""
        if not bool(torch.isfinite(loss)):
            return False
        if self.optimizer is None:
            return True
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norms = torch._foreach_norm(gradients, math.inf) if gradients else ()  # the largest entry: it cannot overflow
        if norms and not bool(torch.stack([norm.float().to(self.device) for norm in norms]).isfinite().all()):
            return False
        factor = self.schedule(self._progress())
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        return True

    def _progress(self) -> float:
        done = self.step / self.total if self.total else self.epoch / self.epochs
        return min(done, 1.0)

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else 0.0

    @contextmanager
    def _one_value_ends(self, watch: bool) -> Iterator[None]:
        """Watches, where a batch is of one, for BN layers that would have to take the variance of one value."""

        def look(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = given(inputs, named)
            if layer.training and x.numel() == x.shape[1]:
                raise _OneValue(f"a BN layer was given one value per channel, {tuple(x.shape)}")

        with ExitStack() as stack:
            if watch:
                for module in self.root.modules():
                    if isinstance(module, _BatchNorm):
                        stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
            yield

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message} (said once)", BNSurgeryWarning, stacklevel=5)
