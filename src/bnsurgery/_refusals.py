"""Why a BN layer cannot go into the layer that feeds it: the rules of :func:`bnsurgery.fusion.plan_fusion`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bnsurgery._tracing import PRODUCERS, Trace, is_bn, is_hooked
from bnsurgery.layers import has_statistics, label


def refusal(name: str, modules: Mapping[str, nn.Module], trace: Trace) -> str | None:
    """Why this BN layer cannot be fused, going by the layers and the trace; None if it can."""
    layer, calls = modules[name], trace.calls[name]
    reason = _bn_refusal(layer)
    if reason is not None:
        return reason
    if name not in trace.sources:
        return "it was not reached when the model was traced"
    if calls > 1:
        return f"it is called {calls} times"
    if name in trace.leaks:
        return f"its parameters or statistics are also used by {trace.leaks[name]}"
    source = trace.sources[name]
    if source.producer is None or not isinstance(modules[source.producer], PRODUCERS):
        return f"its input is {source.description}, not of a convolution or linear layer"
    producer = modules[source.producer]
    title = label(source.producer, producer)
    reason = _producer_refusal(producer) or _pair_refusal(producer, layer)
    if reason is not None:
        return f"{title} feeds it, but {reason}"
    if trace.calls[source.producer] > 1:
        return f"{title} feeds it, but is called {trace.calls[source.producer]} times"
    if source.producer in trace.leaks:
        return f"{title} feeds it, but its weight or bias is also used by {trace.leaks[source.producer]}"
    others = sorted(set(source.uses) - {label(name, layer)})
    if others:
        return f"the output of {title} is also used by {', '.join(others)}"
    return _shape_refusal(producer, title, source.ndim)


def misfit(producer: nn.Module | None, layer: nn.Module | None) -> str | None:
    """Why these two cannot be fused, going by nothing but themselves; None if they can."""
    if producer is None or layer is None:
        return "the model has no such modules"
    if not isinstance(producer, PRODUCERS) or not is_bn(layer):
        return f"they are {type(producer).__name__} and {type(layer).__name__}"
    return _bn_refusal(layer) or _producer_refusal(producer) or _pair_refusal(producer, layer)


def has_activation(layer: nn.Module) -> bool:
    """Whether this BN layer goes on with a dropout ``layer.drop`` and an activation ``layer.act``, as timm's do."""
    return type(layer).forward in _with_activation()


def knows_forward(layer: nn.Module) -> bool:
    """Whether what this BN layer does, in evaluation mode, is Eq. 1 and nothing that would not be kept."""
    return "forward" not in vars(layer) and type(layer).forward in _known_forwards()


def _bn_refusal(layer: nn.Module) -> str | None:
    if not has_statistics(layer):
        return "it has no running statistics: build it with track_running_stats=True"
    if not knows_forward(layer):
        return f"{type(layer).__name__} has a forward of its own, which may do more than normalise"
    if is_hooked(layer):
        return "it has hooks, which would no longer see its input and output: remove them"
    return None


def _producer_refusal(producer: nn.Module) -> str | None:
    kind = next(kind for kind in PRODUCERS if isinstance(producer, kind))
    methods = ("forward", "_conv_forward", "_output_padding")
    if "forward" in vars(producer) or any(getattr(type(producer), m, 0) is not getattr(kind, m, 0) for m in methods):
        return f"{type(producer).__name__} has a forward of its own, which may do more than that of {kind.__name__}"
    if parametrize.is_parametrized(producer):
        return "it is parametrized: see torch.nn.utils.parametrize.remove_parametrizations"
    if any(name not in producer._parameters for name in ("weight", "bias")):
        return "its weight or bias is no parameter but computed: see torch.nn.utils.remove_weight_norm"
    if is_hooked(producer):
        return "it has hooks, which would see another output: remove them"
    return None


def _pair_refusal(producer: nn.Module, layer: nn.Module) -> str | None:
    weight, variance = cast(Tensor, producer.weight), cast(Tensor, layer.running_var)
    outputs = producer.out_features if isinstance(producer, nn.Linear) else producer.out_channels
    if outputs != len(variance):
        return f"it has {outputs} output channels, and BN normalises {len(variance)}"
    if (weight.dtype, weight.device) != (variance.dtype, variance.device):
        return f"it is {weight.dtype} on {weight.device}, and BN is {variance.dtype} on {variance.device}"
    return None


def _shape_refusal(producer: nn.Module, title: str, ndim: int | None) -> str | None:
    expected = cast(Tensor, producer.weight).ndim
    if ndim is None and isinstance(producer, nn.Linear):
        return f"the shape of what {title} returns is unknown without example_input, and only (N, C) will do"
    if ndim is not None and ndim != expected:
        return f"the output of {title} has {ndim} dimensions, not {expected}: the channels are not in dimension 1"
    return None


def _known_forwards() -> list[Any]:
    """The ``forward`` functions of layers known to do Eq. 1 in evaluation mode, and nothing that is not kept."""
    frozen = _forwards("torchvision.ops.misc", "FrozenBatchNorm2d")
    return [_BatchNorm.forward, nn.SyncBatchNorm.forward, *frozen, *_with_activation()]


def _with_activation() -> list[Any]:
    return _forwards("timm.layers.norm_act", "BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")


def _forwards(module: str, *classes: str) -> list[Any]:
    """Of an optional package; where it has not been imported there are no instances."""
    found = (getattr(sys.modules.get(module), name, None) for name in classes)
    return [own.forward for own in found if own is not None]
