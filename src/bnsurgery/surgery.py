"""Split BN layers into branches, choose one, keep one.

Xie and Yuille, "Intriguing Properties of Adversarial Training at Scale" (arXiv 1906.03787): clean and adversarial
inputs have different statistics, so that each gets BN of its own (mixture BN) and shares the rest of the network. Xie
et al. (AdvProp, arXiv 1911.09665) deploy the clean branch, those above the adversarial one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._branches import SHARES, Share, SplitBatchNorm, keeping, routers
from bnsurgery._copies import private_copy, rebind
from bnsurgery._data import describe
from bnsurgery._routing import Router, Routing, Rows
from bnsurgery._tracing import is_hooked
from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import bn_layers, device_of, label, named_modules, require_statistics, select, unwrap


def split_bn(
    model: nn.Module,
    branches: Sequence[str] = ("clean", "adv"),
    *,
    share: Share = "none",
    layers: str | Iterable[str] | None = None,
) -> nn.Module:
    """Puts several BN layers, the branches, in the place of each; returns a copy.

    Source: Xie and Yuille (arXiv 1906.03787), mixture BN. All branches begin as the layer that was there, and are of
    its class, so that timm's BatchNormAct2d keeps its activation. :func:`use_branch` says which of them runs, in
    training and in evaluation; until then the first one does. Everything in this library takes the branches for what
    they are, BN layers, under names such as ``"layer1.bn1.adv"``.

    Args:
        model: any module with BN layers, none of them split; wrapped ones are looked through, and the copy is without
            wrappers.
        branches: their names, at least one, each a Python identifier that is no attribute of modules or of the layers.
        share: what the branches of a layer hold together. ``"none"``: nothing. ``"parameters"``: gamma and beta, so
            that the statistics alone are apart. ``"statistics"``: these, so that gamma and beta alone are.
        layers: qualified names or globs of the layers to split; all by default.

    Returns:
        The copy, in the same modes, without gradients. Parameters that BN layers share stay shared within each branch;
        what is outside of them, the first branch goes on sharing. DistributedDataParallel around it needs
        ``find_unused_parameters=True`` where a step takes one branch alone.

    Raises:
        NoBatchNormError: there is no BN layer.
        ValueError: an invalid name, an unknown ``share``, or a pattern that matches nothing.
        BNSurgeryError: a layer is split already, here or by another library, is lazy, or on the meta device; it has no
            statistics to share; or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> split = split_bn(model)
        >>> list(bn_layers(split))
        ['1.clean', '1.adv']
        >>> x = torch.rand(4, 3, 8, 8)
        >>> with use_branch(split, "adv"):
        ...     _ = split(x)
        >>> bool(split[1].clean.running_mean.any()), bool(split[1].adv.running_mean.any())
        (False, True)
    """
    names = _checked(branches)
    if share not in SHARES:
        raise ValueError(f"share must be one of {', '.join(map(repr, SHARES))}, got {share!r}")
    found = bn_layers(model)
    for name, module in named_modules(model):
        if isinstance(module, SplitBatchNorm):
            raise BNSurgeryError(
                f"{label(name, module)} is split already, into {_listed(module.router.branches)}: "
                "use keep_branch first, or split all branches at once"
            )
    chosen = found if layers is None else select(found, layers, "layers")
    for name, layer in chosen.items():
        for branch in names:
            if hasattr(layer, branch):
                raise ValueError(f"branches must not be named as an attribute of {label(name, layer)}, got {branch!r}")
        if any(isinstance(inner, _BatchNorm) for inner in layer.modules() if inner is not layer):
            raise BNSurgeryError(
                f"{label(name, layer)} holds BN layers of its own, as one that another library has split: put an "
                "ordinary BN layer in its place first, or leave it out"
            )
    if share == "statistics":
        for name, layer in chosen.items():
            require_statistics(name, layer, "share='statistics'")
    router = Router(names, names[0])
    shells = {name: SplitBatchNorm(router, share=share, place=name) for name in chosen}
    memo: dict[int, Any] = {id(layer): shells[name] for name, layer in chosen.items()}
    private = private_copy(model, memo, error=BNSurgeryError)
    rebind(private, list(shells.values()))
    made: dict[str, dict[str, nn.Module]] = {name: {} for name in chosen}
    for number, branch in enumerate(names):
        of_branch = _without(memo, list(chosen.values()), parts=number > 0)
        for name, layer in chosen.items():
            made[name][branch] = _copied(layer, of_branch)
    for name, shell in shells.items():
        shell.fill(made[name])
    return private


@contextmanager
def use_branch(model: nn.Module, branch: str | Tensor) -> Iterator[nn.Module]:
    """Chooses the branch that passes through a split model take, for the length of a ``with`` block.

    It holds in training and in evaluation, for forward passes of this thread (and those that torch makes for it: the
    recomputation of activation checkpointing on an accelerator, ``DataParallel``); other threads choose by themselves.
    Coroutines of one thread do not: a block that awaits holds for the others meanwhile. Blocks nest: the innermost
    counts, and on leaving it, also by an exception, the one before does. Activation checkpointing runs parts of the
    model again in the backward pass, which therefore belongs into the block: after passes in several blocks each has a
    backward pass of its own there, or examples are given their branches in one pass. Copies and pickles made inside it
    have that branch for good, where nothing else is chosen. Where branches are SyncBatchNorm, each process is to send
    examples through the same ones: they wait for one another.

    Args:
        model: a model from :func:`split_bn`, or one with such models in it; wrapped ones are looked through. Given a
            part of it, the block holds for all layers that were split by the same call, in the part and outside.
        branch: the name of a branch, for all examples; or, for batches of N examples, the number of a branch for each,
            in the order in which the branches were named: integers (N,), or of two branches bools. Then BN is to be
            given N examples in the order of the batch.

    Yields:
        The model.

    Raises:
        BNSurgeryError: no layer of the model is split.
        ValueError: no such branch; the numbers are not of integers (N,), or out of range. A pass of another number of
            examples raises it too, naming the layer.

    Example:
        >>> import torch
        >>> model = split_bn(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), ("clean", "adv"))
        >>> x = torch.rand(6, 3)
        >>> with use_branch(model, torch.tensor([0, 0, 0, 1, 1, 1])):
        ...     mixed = model(x)
        >>> with use_branch(model, "adv"):
        ...     alone = model(x[3:])
        >>> torch.allclose(mixed[3:], alone)
        True
    """
    found = _routers(model)
    with ExitStack() as stack:
        for router, routing in [(router, _routing(router, branch, model)) for router in found]:
            stack.enter_context(router.choosing(routing))
        yield model


def keep_branch(model: nn.Module, branch: str) -> nn.Module:
    """Makes an ordinary model of a split one, with the BN layers of one branch; returns a copy.

    After :func:`split_bn` it gives back the model that was split, bit for bit: its classes, its ``state_dict``, its
    modes.

    Args:
        model: a model from :func:`split_bn`; wrapped ones are looked through, and the copy is without wrappers.
        branch: which.

    Returns:
        The copy, in the same modes, without gradients.

    Raises:
        BNSurgeryError: no layer of the model is split; a split layer has hooks, or a ``forward`` of its own, which
            its branch would not have; or the model cannot be copied.
        ValueError: there is no such branch.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> kept = keep_branch(split_bn(model, ("clean", "adv")), "adv")
        >>> type(kept[1]).__name__, list(kept.state_dict()) == list(model.state_dict())
        ('BatchNorm2d', True)
    """
    for router in _routers(model):
        _require(router, branch)
    for name, module in named_modules(model):
        if isinstance(module, SplitBatchNorm) and (is_hooked(module) or "forward" in vars(module)):
            what = "hooks" if is_hooked(module) else "a forward of its own"
            raise BNSurgeryError(f"{label(name, module)} has {what}, which would be lost: put them on its branches")
    with keeping(branch):
        private = private_copy(model, error=BNSurgeryError)
    rebind(private, list(bn_layers(private, strict=False).values()))
    return private


def selected(model: nn.Module, purpose: str) -> nn.Module:
    """A model as it is where nothing is split; else an ordinary copy, with the branch that is selected now."""
    found = routers(model) if isinstance(model, nn.Module) else []
    if not found:
        return model
    chosen = {router.selected() for router in found}
    (branch, *others) = chosen
    if others or not isinstance(branch, str):
        raise BNSurgeryError(
            f"{purpose} takes one branch of a split model, and examples take several: choose one by use_branch(model, "
            f"{found[0].branches[0]!r})"
        )
    return keep_branch(model, branch)


def require_branches(model: nn.Module, branches: Sequence[str]) -> None:
    """Raises :class:`ValueError` unless a split model has all of these branches."""
    for router in routers(model):
        for branch in branches:
            _require(router, branch)


def _checked(branches: Sequence[str]) -> tuple[str, ...]:
    if isinstance(branches, str) or not isinstance(branches, Sequence) or not branches:
        raise ValueError(f"branches must be one or several names, such as ('clean', 'adv'), got {branches!r}")
    for branch in branches:
        if not (isinstance(branch, str) and branch.isidentifier()) or branch in _TAKEN:
            raise ValueError(
                "branches must be Python identifiers, and no attributes of modules, such as 'clean' and 'adv', got "
                f"{branch!r}"
            )
    if len(set(branches)) < len(branches):
        raise ValueError(f"branches must have different names, got {_listed(branches)}")
    return tuple(branches)


def _without(memo: dict[int, Any], layers: list[nn.Module], *, parts: bool) -> dict[int, Any]:
    """What ``copy.deepcopy`` has made of a model, without these layers, and without their tensors where ``parts``.

    What is outside of them, which their hooks may refer to, is then that of the copy. What ties the first branch to it
    stays; the others have tensors of their own.
    """
    inside = [part for layer in layers for part in (*layer.parameters(), *layer.buffers())] if parts else []
    modules = {id(module) for layer in layers for module in layer.modules()}
    left = {key: value for key, value in memo.items() if key not in modules | {id(part) for part in inside}}
    storages: dict[Any, Any] = left.get("torch", {})  # type: ignore[call-overload]  # torch's own key in it
    own = {part.untyped_storage()._cdata for part in inside}
    left["torch"] = {key: value for key, value in storages.items() if key not in own}  # type: ignore[index]
    return left


def _copied(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(layer, memo)
    except Exception as reason:
        raise BNSurgeryError(
            f"{type(layer).__name__} cannot be copied ({type(reason).__name__}: {reason}), and this is done on a copy: "
            "make it work with copy.deepcopy"
        ) from reason


def _routers(model: nn.Module) -> list[Router]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    found = routers(model)
    if not found:
        raise BNSurgeryError(f"no BN layer of {type(unwrap(model)).__name__} is split: use split_bn first")
    return found


def _routing(router: Router, branch: str | Tensor, model: nn.Module) -> Routing:
    if not isinstance(branch, (str, Tensor)):
        raise ValueError(f"branch must be a name, or a tensor of integers (N,), got {describe(branch)}")
    if isinstance(branch, str):
        _require(router, branch)
        return branch
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    if branch.dim() != 1 or branch.dtype not in integers or branch.layout != torch.strided:
        raise ValueError(f"branch must be a name, or integers (N,), one for each example, got {describe(branch)}")
    index = branch.detach().to(device_of(model), torch.int64)
    if len(index):
        low, high = (int(value) for value in torch.aminmax(index))
        if low < 0 or high >= len(router.branches):
            numbered = ", ".join(f"{number} ({name!r})" for number, name in enumerate(router.branches))
            raise ValueError(f"branch must hold numbers among {numbered}, got {low} to {high}")
    return Rows.of(index, router.branches)


def _require(router: Router, branch: str) -> None:
    if branch not in router.branches:
        raise ValueError(f"there is no branch {branch!r}: this model is split into {_listed(router.branches)}")


def _listed(branches: Sequence[str]) -> str:
    return ", ".join(map(repr, branches))


_TAKEN = frozenset((*dir(nn.Module()), *dir(SplitBatchNorm), "place", "router", "share"))
"""Attributes that a branch may not hide."""
