"""Reset and re-estimate the running statistics of BN layers.

Three estimators: ``"pooled"`` merges the moments of every batch into those of all elements seen (Chan, Golub and
LeVeque's pairwise update, 1979) instead of averaging per-batch variances; ``"exact"`` does so layer by layer, so that
no layer's statistics depend on how the samples were split into batches; ``"ema"`` is torch's own running update.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from bnsurgery._data import describe, is_pair, unpack
from bnsurgery._modes import global_state, preserved
from bnsurgery._recalibration import Estimator, Forward, Recalibration, Run, default_forward, to_device
from bnsurgery.adapters import check_attack
from bnsurgery.errors import BNSurgeryWarning
from bnsurgery.layers import bn_layers, has_statistics, select, statistics, unwrap

__all__ = ["Recalibration", "recalibrate_bn", "reset_bn_stats"]


def reset_bn_stats(model: nn.Module, *, layers: str | Iterable[str] | None = None, strict: bool = True) -> list[str]:
    """Resets running means to 0, variances to 1 and counters to 0, in place.

    Unlike ``reset_running_stats`` of torch, this goes by the buffers that a layer holds and not by its
    ``track_running_stats`` flag, which may have been turned off while evaluation still uses the buffers.

    Args:
        model: any module with BN layers.
        layers: qualified names or globs of the layers to reset; all by default.
        strict: raise where there is no BN layer; with ``False`` warn and return an empty list.

    Returns:
        The names of the layers that were reset. Layers without running statistics have nothing to reset and are
        listed in a warning.

    Raises:
        NoBatchNormError: there is no BN layer (``strict=True``).
        ValueError: a pattern matches no BN layer.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8))
        >>> _ = model(torch.rand(4, 8, 2, 2))
        >>> reset_bn_stats(model)
        ['0']
        >>> model[0].running_mean.abs().max()
        tensor(0.)
    """
    found = bn_layers(model, strict=strict)
    if layers is not None:
        found = select(found, layers, "layers")
    reset: list[str] = []
    without: list[str] = []
    for name, layer in found.items():
        (reset if has_statistics(layer) else without).append(name)
        with torch.no_grad():
            for local, buffer in statistics(layer).items():
                buffer.fill_(1 if local == "running_var" else 0)
    if without:
        warnings.warn(
            f"no running statistics to reset in {', '.join(map(repr, without))}", BNSurgeryWarning, stacklevel=2
        )
    return reset


def recalibrate_bn(
    model: nn.Module,
    data: Iterable[Any],
    *,
    attack: Any = None,
    batches: int | None = None,
    estimator: Estimator = "pooled",
    forward: Forward | None = None,
    seed: int = 0,
    strict: bool = True,
) -> Recalibration:
    """Re-estimates the running statistics of all BN layers from data, in place; all of them or, on failure, none.

    While it runs, BN layers normalise as the estimator says and everything else is in evaluation mode (no dropout).
    Parameters, modes and everything but the statistics are as before afterwards. ``num_batches_tracked`` becomes the
    number of batches. Under ``torch.distributed``, the moments of all ranks are merged (not with ``"ema"``).

    Args:
        model: any module with BN layers.
        data: an iterable of batches: inputs, or tuples whose first entry is the inputs; moved to the model's device.
            One pair of inputs and integer labels is one batch.
        attack: the statistics are those of this attack's adversarial examples, made in evaluation mode on the model
            as it was; then ``data`` must yield ``(x, y)``. See :func:`~bnsurgery.evaluate` for what serves.
        batches: stop after so many batches.
        estimator: ``"pooled"``: one pass, BN normalises by the batch as in training; mean and unbiased variance of all
            elements that a layer saw. ``"exact"``: layer by layer, each pass normalising by the whole-set statistics
            already found, ending with those of the whole set as one batch, whichever way it was split; as many passes
            as there are BN calls, over data that must be the same each time (it is held in memory where ``attack`` is
            given). ``"ema"``: torch's own update by momentum in one pass.
        forward: runs the model on a batch, ``forward(model, batch)``; by default ``model(inputs)``.
        seed: seeds the attack.
        strict: raise where there is no BN layer; with ``False`` warn and do nothing.

    Returns:
        Which layers were written, from how much.

    Raises:
        NoBatchNormError: there is no BN layer (``strict=True``).
        TypeError: ``attack`` is none.
        ValueError: an unknown estimator, ``batches`` below 1, no batch at all, or a one-shot iterator for ``"exact"``.
        BNSurgeryError: a layer's statistics are not finite, or not of its number of channels; with ``"exact"``, a model
            whose course depends on the data.

    Warns:
        BNSurgeryWarning: a batch is left out, since a BN layer would see one value per channel.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])
        >>> recalibrate_bn(model, [x[:2], x[1:]]).layers
        ('0',)
        >>> model[0].running_mean
        tensor([2.0000, 3.7500])
    """
    if estimator not in ("pooled", "exact", "ema"):
        raise ValueError(f"estimator must be 'pooled', 'exact' or 'ema', got {estimator!r}")
    if batches is not None and batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    if attack is not None:
        check_attack(attack)
    if isinstance(data, torch.Tensor):
        raise ValueError(f"data must be an iterable of batches, got {describe(data)}: put it in a list")
    if is_pair(data) and not data[1].is_floating_point():
        data = [data]  # inputs and labels, not two batches of inputs
    if estimator == "exact" and isinstance(data, Iterator):
        raise ValueError("estimator='exact' goes over the data several times: data must not be a one-shot iterator")
    root = unwrap(model)
    layers = bn_layers(root, strict=strict)
    run = Run(root, layers, forward or default_forward)

    def source() -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        for batch in islice(data, batches):
            batch = to_device(batch, run.device)
            if attack is not None:
                x, y = unpack(batch)
                batch = (run.craft(attack, x, y, generator), y)
            yield batch

    with preserved(root), global_state(run.device), run.observed():
        root.eval()
        if estimator == "ema":
            found = run.ema(source())
        elif estimator == "pooled":
            found = run.pooled(source())
        elif attack is None:
            found = run.exact(source)
        else:
            held = list(source())
            found = run.exact(lambda: iter(held))
        if not run.batches:
            left_out = f" but {run.left_out} with one value per channel, which were left out" if run.left_out else ""
            raise ValueError(f"data yielded no batch{left_out}")
    return run.write(found, estimator)
