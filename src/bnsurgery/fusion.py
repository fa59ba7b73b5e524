"""Put BN layers, read as affine maps, into the layers before them.

First an immutable plan is made, then it is applied to a copy, then outputs are compared.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnsurgery._copies import arguments, by_itself, evaluation_copy, verify
from bnsurgery._refusals import has_activation, misfit, refusal
from bnsurgery._symbolic import trace_symbolic
from bnsurgery._tracing import Trace, is_bn, trace_eager
from bnsurgery.errors import BNSurgeryWarning, FusionError
from bnsurgery.folding import converted, foldable, normalized
from bnsurgery.layers import named_modules
from bnsurgery.surgery import selected

_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FusionPlan:
    """Which BN layers go into which layers, and why the others do not; names are qualified names.

    Attributes:
        fused: pairs of a convolution, transposed convolution or linear layer and the BN layer that it feeds.
        skipped: pairs of a BN layer and the reason why it stays.
    """

    fused: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"fuses {len(self.fused)} of {len(self.fused) + len(self.skipped)} BN layers"]
        lines += [f"  {bn!r} into {producer!r}" for producer, bn in self.fused]
        lines += [f"  not {bn!r}: {reason}" for bn, reason in self.skipped]
        return "\n".join(lines)


def fuse_bn(
    model: nn.Module, example_input: Any = None, *, plan: FusionPlan | None = None, strict: bool = True
) -> nn.Module:
    """Puts each BN layer into the convolution or linear layer that feeds it; returns a copy in evaluation mode.

    Arithmetic is done in at least float32 and cast last. Each fused BN layer is an Identity in the copy (timm's
    BatchNormAct2d leaves its dropout and activation), and what it fed on has a weight and a bias of its own, also where
    the weight was tied. Wrappers (DistributedDataParallel, ``torch.compile``) are left out of the copy. A fused copy is
    for evaluation, and for the path through the model that was traced. Of a split model it has the branch that is
    selected (:func:`bnsurgery.use_branch`), and no other.

    Args:
        model: any module; it is not run, and not changed.
        example_input: a tensor, or a tuple of all positional arguments. With it any model can be traced, and the
            outputs of the copy are compared with the original's before it is returned.
        plan: what to fuse, from :func:`plan_fusion`; made here if not given.
        strict: raise where there is no BN layer; with ``False`` warn and return the copy.

    Returns:
        The copy. Its attribute ``fusion_plan`` is the plan.

    Raises:
        NoBatchNormError: there is no BN layer (``strict=True``).
        FusionError: the model cannot be copied or traced, the plan does not fit it, or the outputs differ.
        BNSurgeryError: a BN layer is lazy or on the meta device, or examples take different branches of a split model.

    Warns:
        BNSurgeryWarning: there are BN layers, and none was fused.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> fused = fuse_bn(model, torch.rand(1, 3, 8, 8))
        >>> fused[1]
        Identity()
        >>> print(fused.fusion_plan)
        fuses 1 of 1 BN layers
          '1' into '0'
    """
    model = selected(model, "fuse_bn")
    if plan is None:
        plan = plan_fusion(model, example_input, strict=strict)
    fused = apply_plan(plan, model)
    if example_input is not None:
        original = evaluation_copy(model)
        with by_itself(model):
            verify(original, fused, example_input, lambda wide: apply_plan(plan, wide))
    if plan.skipped and not plan.fused:
        warnings.warn(f"no BN layer was fused: the plan {plan}", BNSurgeryWarning, stacklevel=2)
    fused.fusion_plan = plan  # type: ignore[assignment]  # a plain attribute
    return fused


def plan_fusion(model: nn.Module, example_input: Any = None, *, strict: bool = True) -> FusionPlan:
    """Finds out which BN layers can be fused; changes nothing.

    A BN layer is fused only where one convolution, transposed convolution or linear layer feeds it, each is called
    once, nothing else takes what is between them, and no hook, parametrization or unknown ``forward`` is in the way.

    Args:
        model: any module; a private copy of it is traced.
        example_input: a tensor, or a tuple of all positional arguments: the copy is run on it once, in evaluation mode.
            Without it the model is traced with ``torch.fx``, which knows no shapes: then linear layers are not fused,
            and inputs of convolutions are taken to be batches.
        strict: raise where there is no BN layer; with ``False`` warn and return an empty plan.

    Returns:
        The plan. Each BN layer is in ``plan.fused``, or in ``plan.skipped`` with the reason.

    Raises:
        NoBatchNormError: there is no BN layer (``strict=True``).
        FusionError: the model cannot be copied or traced.
        BNSurgeryError: a BN layer is lazy or on the meta device, or examples take different branches of a split model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(8))
        >>> print(plan_fusion(model))
        fuses 0 of 1 BN layers
          not '2': its input is the output of '1' (ReLU), not of a convolution or linear layer
    """
    return plan_of(selected(model, "plan_fusion"), example_input, strict=strict)


def plan_of(model: nn.Module, example_input: Any, *, strict: bool) -> FusionPlan:
    """As :func:`plan_fusion`, with the branches of a split model under their own names; the path alone counts."""
    if not foldable(model, strict):
        return FusionPlan(())
    private = evaluation_copy(model)
    modules = dict(named_modules(private))
    layers = {name: module for name, module in modules.items() if is_bn(module)}
    reasons: dict[str, str | None] = {
        name: "it stays in training mode in model.eval()" for name, layer in layers.items() if layer.training
    }
    with by_itself(model):
        trace = _trace(private, example_input)
    for name in layers:
        reasons.setdefault(name, refusal(name, modules, trace))
    return FusionPlan(
        fused=tuple((cast(str, trace.sources[name].producer), name) for name in layers if reasons[name] is None),
        skipped=tuple((name, reason) for name in layers if (reason := reasons[name]) is not None),
    )


def fused_parameters(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each pair, the weight and bias of one layer that computes both in evaluation mode; changes nothing.

    Args:
        pairs: a convolution, transposed convolution or linear layer each, and the BN layer with running statistics
            that it feeds.

    Yields:
        Both detached, in the dtype of the producer's weight, computed in at least float32; the weight of the producer's
        shape, the bias of shape (C,).
    """
    for weight, scale, bias in fused_factors(pairs):
        yield (weight * scale).to(weight.dtype), bias.clone()  # in float64 a view of all of them


def fused_factors(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As :func:`fused_parameters`, the weight in two factors: the producer's own, and what to multiply it by.

    Yields:
        The weight itself, detached; the factor, of a shape that goes with it, in its dtype and at least float32; the
        bias.
    """
    weights = [cast(Tensor, producer.weight).detach() for producer, _ in pairs]
    shifts, factors = [], []
    for (producer, _), (m, b) in zip(pairs, normalized([layer for _, layer in pairs]), strict=True):
        bias = cast("Tensor | None", producer.bias)
        factors.append(m)
        shifts.append(b if bias is None else b + m * bias.detach().to(m.dtype))
    scales = converted(factors, [_at_least_float32(weight.dtype) for weight in weights])
    biases = converted(shifts, [weight.dtype for weight in weights])
    for (producer, _), weight, scale, shift in zip(pairs, weights, scales, biases, strict=True):
        if getattr(producer, "transposed", False):
            # (inputs, outputs / groups, ...): the inputs of a group lead to the outputs of that group alone.
            groups = cast(int, producer.groups)
            scale = scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
        yield weight, scale.view(*scale.shape, *(1,) * (weight.ndim - scale.ndim)), shift


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _WIDE else torch.promote_types(dtype, torch.float32)


def _trace(private: nn.Module, example_input: Any) -> Trace:
    symbolic = example_input is None
    try:
        return trace_symbolic(private) if symbolic else trace_eager(private, arguments(example_input))
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        message = (
            f"cannot be traced without an input ({failure}): pass example_input, a tensor or a tuple of arguments"
            if symbolic
            else f"does not run on example_input ({failure}): pass a tensor, or a tuple of all positional arguments"
        )
        raise FusionError(f"{type(private).__name__} {message}") from error


def apply_plan(plan: FusionPlan, model: nn.Module) -> nn.Module:
    """A copy of the model, in evaluation mode, fused as planned."""
    layers = dict(named_modules(model))
    for producer, name in plan.fused:
        reason = misfit(layers.get(producer), layers.get(name))
        if reason is not None:
            raise FusionError(f"the plan does not fit the model in {name!r} after {producer!r}: {reason}; make it anew")
    memo: dict[int, Any] = {}
    for _, name in plan.fused:
        memo[id(layers[name])] = _remainder(layers[name], memo)
    fused = evaluation_copy(model, memo)
    copies = dict(named_modules(fused))
    pairs = [(copies[producer], layers[name]) for producer, name in plan.fused]
    for (target, _), (weight, bias) in zip(pairs, fused_parameters(pairs), strict=True):
        trains = cast(Tensor, target.weight).requires_grad
        target.weight, target.bias = nn.Parameter(weight, trains), nn.Parameter(bias, trains)
    return fused


def _remainder(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What stays of a BN layer whose affine map has gone: nothing, or timm's dropout and activation."""
    if has_activation(layer):
        return nn.Sequential(*(copy.deepcopy(cast(nn.Module, part), memo) for part in (layer.drop, layer.act)))
    return nn.Identity()
