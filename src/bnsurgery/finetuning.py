"""Adversarial fine-tuning of batch normalization, or of anything: what trains, how, and the record of it."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bnsurgery import _checkpoints, _states
from bnsurgery._allocator import keeping_memory
from bnsurgery._arguments import (
    DataOrder,
    OptimizerLike,
    Train,
    attack_text,
    check,
    check_choices,
    check_consistent,
    check_warmup,
    goes_through_branches,
    optimizer_over,
    options_of,
    schedule_of,
)
from bnsurgery._branches import layout_of
from bnsurgery._crafting import AttackStep
from bnsurgery._keeping import Keeper
from bnsurgery._modes import global_state, gradients_aside, preserved
from bnsurgery._random import seed_global
from bnsurgery._ranks import Ranks
from bnsurgery._records import Callback, EpochRecord, StepCallback, StepRecord
from bnsurgery._replicas import Replicas, can_attack_a_copy
from bnsurgery._sharing import Shard, Share, Sync, splits
from bnsurgery._signals import Signals
from bnsurgery._source import Data, described
from bnsurgery._step import OnNonFinite, Step
from bnsurgery._tuning import Schedule, Tuning
from bnsurgery.adapters import check_attack
from bnsurgery.attacks import PGD, Loss, cross_entropy
from bnsurgery.engine import (
    Engine,
    EngineLike,
    Precision,
    StepPrecision,
    check_precision,
    chosen_engine,
    dtype_for,
)
from bnsurgery.errors import BNSurgeryWarning
from bnsurgery.freezing import freeze_except_bn
from bnsurgery.layers import device_of, named_parameters, unwrap

__all__ = ["EpochRecord", "Finetuning", "StepRecord", "Train", "adv_finetune"]


@dataclass(frozen=True)
class Finetuning:
    """What :func:`adv_finetune` did.

    Attributes:
        history: one record for each epoch.
        trainable: names of the parameters that trained.
        steps: steps in all, those skipped or left out included.
        train: as asked for.
        ended: ``"epochs"``, ``"max_steps"``, ``"max_seconds"`` or ``"callback"``.
    """

    history: tuple[EpochRecord, ...]
    trainable: tuple[str, ...]
    steps: int
    train: Train
    ended: str

    @property
    def skipped(self) -> int:
        """Steps undone because a number was not finite."""
        return sum(record.skipped for record in self.history)

    def record(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON; a loss or error of no step at all is None."""
        record = asdict(self)
        for epoch in record["history"]:
            epoch.update({name: None for name in ("loss", "error") if not math.isfinite(epoch[name])})
        return record


def adv_finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int,
    train: Train = "bn",
    also: str | Iterable[str] = (),
    attack: Any = PGD(),  # noqa: B008 - a plain description: the run draws from a generator of its own
    eps_warmup: int = 0,
    clean_fraction: float = 0.0,
    branches: tuple[str, str] = ("clean", "adv"),
    consistent_bn_after: int | None = None,
    optimizer: OptimizerLike | None = None,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str | Schedule = "step",
    loss: Loss = cross_entropy,
    callbacks: Callback | Sequence[Callback] = (),
    on_step: StepCallback | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    data_order: DataOrder = "same",
    on_nonfinite: OnNonFinite = "skip",
    shard: Shard = "auto",
    sync: Sync = "buffers",
    progress: bool = True,
    engine: Engine | EngineLike = "fast",
    precision: Precision = "auto",
    step_precision: StepPrecision = "model",
    compile: bool = False,  # noqa: A002 - torch's own word
) -> Finetuning:
    """Fine-tunes a model on adversarial examples, in place; by default its BN layers alone.

    Each step attacks the batch with the model in evaluation mode, then takes an optimizer step on the adversarial
    examples with the model in training mode (Walter et al., following Madry et al.). What changes in the model is the
    parameters that train and the statistics; modes, ``requires_grad``, gradients and the process's random state are
    as before afterwards, also after an exception, which leaves the model as after the last whole step. The call
    freezes by itself: a freeze of your own counts with ``train="as-is"`` alone.

    Where ``torch.distributed`` is initialised (:func:`bnsurgery.processes`), all its processes work on one run: each on
    its share of the data, with one exchange a step, in which gradients and statistics become those of all.

    Args:
        model: maps inputs to logits (N, K).
        data: an iterable of ``(x, y)`` batches, gone over once an epoch; moved to the model's device. Inputs x (N, ...)
            in the model's dtype, within the attack's bounds (by default [0, 1]); integer labels y (N,) from 0 to K - 1.
        epochs: number of passes over the data, at least 1.
        train: ``"bn"``: gamma, beta and statistics (Table 1 of Walter et al.: BN PARAMS). ``"bn-params"``: gamma and
            beta, with BN normalising by fixed statistics (BN ONLY PARAMS). ``"bn-stats"``: statistics alone, nothing
            but forward passes (BN STATS). ``"all"``: everything. ``"as-is"``: what requires a gradient now.
        also: names or globs of modules or parameters that train too, such as ``("conv1", "logits")``.
        attack: a :class:`PGD`, a torchattacks or AutoAttack object, or a callable ``attack(model, x, y)``; ``None``
            trains on clean examples.
        eps_warmup: number of first epochs, below ``epochs``, over which a :class:`PGD` grows to its full strength: with
            n of them, epoch k (from 0) attacks with (k + 1) / (n + 1) of ``eps`` and of ``step_size``. For networks
            that an attack of full strength would at once turn into a constant.
        clean_fraction: share of each batch, from its front, that stays clean, in [0, 1].
        branches: of a model from :func:`bnsurgery.split_bn`, the branch that clean examples go through, and the one
            that adversarial examples are made on and go through (Xie and Yuille: mixture BN), both in one pass. Where
            :func:`bnsurgery.use_branch` has chosen, for all split layers, all goes there. Callbacks find the first
            branch, or that one.
        consistent_bn_after: number of epochs after which BN normalises in training as it does in evaluation, by its
            running statistics, which stay from then on, while gamma and beta go on training (Xie and Yuille: consistent
            BN); below ``epochs``.
        optimizer: a function from the list of parameters to an optimizer, or an optimizer over at least these; by
            default SGD with Nesterov momentum.
        lr: learning rate of the default optimizer.
        momentum: of the default optimizer.
        weight_decay: of the default optimizer, on all that trains, gamma and beta included.
        schedule: factor on the learning rate: ``"step"`` (x 0.1 after 40, 60 and 80 % of the steps), ``"cosine"``,
            ``"linear"``, ``"constant"``, or a function of progress from 0 to 1.
        loss: logits (N, K) and labels (N,) to a loss for each example (N,).
        callbacks: one or several, called after each epoch with its record and the model; one that returns True ends
            the run. Of several processes each calls those that it was given, if any, and where one ends the run it
            ends in all.
        on_step: called after each step likewise.
        max_steps: end after so many steps.
        max_seconds: begin no epoch that, taking as long as the longest before it in this call, would end later than
            this; the first is made in any case. With a checkpoint, another call goes on from there. Under ``torchrun``
            all processes stop where the first of them would.
        seed: seeds the attack and, for the length of the call, torch's, NumPy's and Python's global generators. What
            the data draws from these (a shuffling loader, random transforms) comes from a stream of its own, which does
            not depend on what the model and the attack draw.
        checkpoint: a file from which the run goes on where it exists, to the same bits as a run in one go (on the CPU,
            or with deterministic algorithms). Written before the first step, then every ``checkpoint_every`` seconds
            after a step, before the callbacks of an epoch and after them, and after the step under way when SIGINT or
            SIGTERM comes (which in a callback of an epoch, and the second time, act at once); the one before it
            is kept beside it (``.previous``) and used, with a warning, where the newest is damaged. A copy of it can go
            on in another way: with another ``consistent_bn_after``, where BN was not consistent yet, nor is to have
            been. What callbacks remember is theirs to keep; those of an epoch in which the run is killed are called
            once more. Of several processes a signal to one ends all.
        checkpoint_every: seconds between checkpoints within an epoch, at least 0; ``math.inf``: none.
        data_order: within an epoch, batches that are behind a checkpoint are drawn again and passed over. ``"same"``:
            they must be those of before. ``"any"``: the run goes on with what comes, as for a stream that never gives
            the same again, and does not end with the same bits.
        on_nonfinite: where an input, an activation that reaches the statistics, the loss, a gradient or an update is
            NaN or infinite: ``"skip"``: the step is undone and counted, and the first one warns of the place;
            ``"raise"``: it is undone, and an error names the place. For this, what trains and the optimizer's state are
            held in memory once more, and the buffers of the model.
        shard: with several processes. ``"split"``: all are given the same batches, and each takes every so many-th row
            of each (a batch too small for two rows each is worked on whole by all). ``"none"``: each is given batches
            of its own, equally many. ``"auto"``: ``"none"`` for a loader with a DistributedSampler and for a model in
            DistributedDataParallel, else ``"split"``.
        sync: with several processes, whose batch BN normalises by in training. ``"buffers"``: each by its own share;
            running statistics are averaged after each step. ``"batch"``: by that of all together, as one process would;
            each BN layer then talks to the others, forward and backward. ``"none"``: each by its own, and keeps running
            statistics of its own.
        progress: show a progress bar on standard error.
        engine: ``"fast"``: a :class:`PGD` with ``bn="eval"``, a torchattacks or an AutoAttack object attacks a private
            copy of the model, fused, which follows the model step by step; the rest, callables above all, attacks the
            model itself. ``"plain"``: everything attacks the model itself. An :class:`Engine` sets the switches.
        precision: what the copy computes in; for the training step see ``step_precision``. ``"auto"``: for a PGD on a
            float32 model bfloat16 where the hardware has it fast (on a CPU not with depthwise convolutions, which are
            slower so), else the model's own. ``"float32"``, ``"bfloat16"``, ``"float16"``: that; with a warning
            where there is no copy to attack.
        step_precision: what the training step's forward pass computes in. ``"model"``: the model's own dtype.
            ``"bfloat16"``: bfloat16 under ``torch.autocast``; parameters and statistics keep their dtype, and the loss
            is computed from logits in at least float32.
            ``"auto"``: that for a float32 model where the hardware has it fast, else the model's own.
        compile: run the copy and the training step through ``torch.compile``: seconds to minutes at the start.

    Returns:
        The history, and what trained.

    Raises:
        NoBatchNormError: ``train`` is one of the ``"bn"`` kinds and there is no BN layer.
        ValueError: an argument out of range, nothing to train, no data, wrong shapes, inputs or labels out of range, a
            split model without these branches.
        TypeError: ``attack`` is none.
        CheckpointError: the checkpoint is damaged, and so is the one before it, or it belongs to another run (the
            message lists the differences) or to another order of the data.
        NonFiniteError: a number is not finite, and ``on_nonfinite="raise"``.
        LostProcessError: another process of this run is gone or does not answer.
        OSError: the first checkpoint cannot be written, or read.
        BNSurgeryError: the attack returned something else than inputs of the same shape; the optimizer's state holds
            what cannot be kept in a checkpoint; of several processes one has been told to end, or one has made
            updates that the others have not (looked at before each checkpoint and at the end of each epoch); or this is
            ``torch.inference_mode()``.

    Warns:
        BNSurgeryWarning: a step is skipped, since a number is not finite, or a batch left out, since a BN layer would
            see one value per channel; the model cannot be copied or fused; ``precision`` changes nothing; a checkpoint
            cannot be written, and the run goes on without; the newest checkpoint is damaged; the data has more batches
            than it said.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8))
        >>> data = [(torch.rand(16, 3, 2, 2), torch.arange(16) % 8) for _ in range(4)]
        >>> run = adv_finetune(model, data, epochs=2, lr=0.01, progress=False)
        >>> run.trainable, run.steps
        (('2.weight', '2.bias'), 8)
    """
    check(
        data,
        epochs=epochs,
        max_steps=max_steps,
        max_seconds=max_seconds,
        checkpoint_every=checkpoint_every,
        clean_fraction=clean_fraction,
    )
    check_choices(
        data_order=data_order,
        on_nonfinite=on_nonfinite,
        shard=shard,
        step_precision=step_precision,
        sync=sync,
        train=train,
    )
    if attack is not None:
        check_attack(attack)
    check_warmup(eps_warmup, epochs, attack)
    factor = schedule_of(schedule)
    switches = chosen_engine(engine)
    check_precision(precision, switches)
    each_epoch = (callbacks,) if callable(callbacks) else tuple(callbacks)
    root, device = unwrap(model), device_of(model)
    parted = goes_through_branches(root, branches)
    check_consistent(consistent_bn_after, epochs, train, root)
    path = None if checkpoint is None else Path(checkpoint)
    ranks = Ranks()
    _states.require_folder(path)
    share = Share(ranks, root, split=splits(shard, model, data, ranks), sync=sync)
    generator = torch.Generator().manual_seed(seed)
    began, longest = time.perf_counter(), 0.0

    with preserved(root, buffers=False), global_state(device, seed), _training(root, train, also) as trainable:
        if not (ranks.alone or share.split):
            seed_global((seed + 104729 * ranks.rank) % 2**63)
        source = Data(data, watched=path is not None, share=share)
        seed_global(ranks.seed(seed))
        parameters = named_parameters(root)
        chosen = optimizer_over(optimizer, [parameters[name] for name in trainable], lr, momentum, weight_decay)
        dtype = None if switches is None else dtype_for(root, precision, lower=isinstance(attack, PGD))
        copies = None if switches is None else Replicas(root, switches, dtype=dtype, compile=compile)
        if precision != "auto" and (attack is None or not can_attack_a_copy(attack, root)):
            reason = "there is no attack" if attack is None else f"{type(attack).__name__} attacks the model itself"
            warnings.warn(f"precision={precision!r} changes nothing: {reason}", BNSurgeryWarning, stacklevel=2)
        autocast = torch.bfloat16 if step_precision == "bfloat16" else None
        if step_precision == "auto":
            autocast = dtype_for(root, "auto", lower=True)
        descriptions = ranks.gather(described(data))
        configuration = {
            "attack": attack_text(attack, eps_warmup),
            "branches": list(branches) if parted else None,
            "clean_fraction": float(clean_fraction),
            "compile": compile,
            "consistent_bn_after": consistent_bn_after,
            "data": descriptions if any(own != descriptions[0] for own in descriptions) else descriptions[0],
            "epochs": epochs,
            "frozen": _checkpoints.fingerprint(root, trainable) if path is not None else "",
            "loss": getattr(loss, "__name__", type(loss).__name__),
            "max_steps": max_steps,
            "optimizer": None if chosen is None else type(chosen).__name__,
            "engine": [repr(switches and replace(switches, keep_memory=True)), str(dtype)],  # what may round otherwise
            "options": [] if chosen is None else [options_of(group) for group in chosen.param_groups],
            "schedule": schedule if isinstance(schedule, str) else "function",
            "seed": seed,
            "step": str(autocast),
            "sync": sync,
            "train": train,
            "trainable": [[name, *parameters[name].shape] for name in trainable],
            **layout_of(root),
        }
        not_kept = {"data_order": data_order, "max_seconds given": max_seconds is not None, "shard": shard}
        moved = _checkpoints.tensors(root, tuple(parameters), chosen)
        layout = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in moved.items()}
        _states.require_same_in_all(ranks, {**configuration, **not_kept, "on_nonfinite": on_nonfinite})
        _states.require_same_in_all(ranks, layout)
        ranks.as_first(list(moved.values()))
        with_callbacks = ranks.any(bool(each_epoch))
        signals = Signals(wanted=path is not None)
        step = Step(
            model,
            chosen,
            make=None if attack is None else AttackStep(attack, root, generator, copies),
            clean_fraction=clean_fraction,
            loss=loss,
            images_channels_last=switches is not None and switches.channels_last,
            lean=switches is not None,
            autocast=autocast,
            compile=compile,
            branches=branches if parted else None,
            on_nonfinite=on_nonfinite,
            share=share,
        )
        tuning = Tuning(
            step,
            source,
            schedule=factor,
            epochs=epochs,
            max_steps=max_steps,
            eps_warmup=eps_warmup,
            consistent_bn_after=consistent_bn_after,
            on_step=on_step,
            progress=progress and ranks.first,
        )
        keeper = Keeper(
            path,
            tuning,
            source,
            every=checkpoint_every,
            configuration=configuration,
            targets=lambda: _checkpoints.tensors(root, trainable, chosen),
            optimizer=chosen,
            device=device,
            generator=generator,
            share=share,
            signals=signals,
            seed=seed,
            before_callbacks=with_callbacks,
        )
        kept = keeping_memory(device, wanted=switches is not None and switches.keep_memory)
        stepped = [] if chosen is None else [p for group in chosen.param_groups for p in group["params"]]
        with tuning.running(), kept, signals, gradients_aside(stepped):
            keeper.begin(same=data_order == "same")
            ended = keeper.ended
            while tuning.epoch < epochs and ended == "epochs":
                start = time.perf_counter()
                with signals.held():
                    record = tuning.run_epoch(keeper.step_done, keeper.asked)
                    keeper.history.append(record)
                    with signals.let_through():  # all is saved, where there are callbacks
                        stop = [bool(callback(record, root)) for callback in each_epoch]
                    if tuning.stopped or (with_callbacks and ranks.any(any(stop))):
                        keeper.ended = "callback"
                    elif tuning.done:
                        keeper.ended = "max_steps"
                    tuning.epoch += 1
                    keeper.epoch_done()
                ended = keeper.ended
                now = time.perf_counter()
                longest = max(longest, now - start)
                if max_seconds is not None and ended == "epochs" and tuning.epoch < epochs:
                    late = ranks.largest(now - began + longest - max_seconds) > 0
                    ended = "max_seconds" if late else ended  # the checkpoint does not say so: the run is to go on
    return Finetuning(tuple(keeper.history), trainable, tuning.step, train, ended)


@contextmanager
def _training(model: nn.Module, train: Train, also: str | Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Makes trainable what ``train`` says, for the block; yields the names."""
    if train == "as-is":
        if also:
            raise ValueError("also= goes with the other kinds of train=: with 'as-is', set requires_grad yourself")
        names = tuple(name for name, parameter in named_parameters(model).items() if parameter.requires_grad)
        if not names:
            raise ValueError("train='as-is', and no parameter requires a gradient")
        yield names
        return
    if train == "all":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        also = "*"
    moves = train in ("bn", "bn-params")
    stats: Literal["frozen", "update"] = "frozen" if train == "bn-params" else "update"
    has_bn = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if train == "all" and not has_bn:
        yield tuple(named_parameters(model))
        return
    with freeze_except_bn(model, weight=moves, bias=moves, stats=stats, also=also) as freeze:
        if moves and not freeze.trainable:
            raise ValueError(
                f"train={train!r}, and no BN layer has a gamma or beta: nothing trains; name some with also="
            )
        yield freeze.trainable
