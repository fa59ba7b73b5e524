"""Trace a model for fusing without an example input, by ``torch.fx``: the second tracer of :mod:`bnsurgery._tracing`.

It knows no shapes, and fails on control flow that depends on the input. Layers that may fuse are not looked into.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from bnsurgery._modes import global_state
from bnsurgery._tracing import PRODUCERS, Source, Trace, is_bn, is_hooked, kept, leaves
from bnsurgery.layers import device_of, label, named_modules

_PASS_THROUGH = (nn.Identity, _DropoutNd)
"""Modules that return their very input in evaluation mode."""

_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad", "itemsize", "nbytes"}
_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device", "is_contiguous"}
_METADATA = _ATTRIBUTES | _METHODS | {"is_floating_point", "is_complex", "storage_offset"}
"""How a symbolic trace shows that a tensor is asked about, not used."""


def trace_symbolic(model: nn.Module) -> Trace:
    """Traces the model with ``torch.fx``, optional arguments at their defaults."""
    # fx looks into the forward of the root, which a BN layer shall not be.
    root = nn.Sequential(model) if is_bn(model) else model
    if "forward" in vars(root):
        raise TypeError("the model's forward is an attribute of the instance, which torch.fx does not see")
    parameters = inspect.signature(type(root).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    tracer = _Tracer(root, model)
    with warnings.catch_warnings(), global_state(device_of(model), seed=0):
        warnings.simplefilter("ignore")  # fx warns of every default that it cannot write an assertion for
        graph = tracer.trace(root, concrete_args=defaults)
    return tracer.read(graph)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.names = {id(module): name for name, module in named_modules(model)}
        self.touched: list[tuple[fx.Node, str]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_bn(m) or isinstance(m, PRODUCERS) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outputs = super().call_module(m, forward, args, kwargs)
        if is_hooked(m):
            where = f"a hook on {self.label(m)}"
            self.touched += [(proxy.node, where) for proxy in leaves((args, kwargs, outputs), fx.Proxy)]
        return outputs

    def label(self, module: nn.Module) -> str:
        return label(self.names[id(module)], module)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[cast(str, node.target)] if node.op == "call_module" else None

    def read(self, graph: fx.Graph) -> Trace:
        trace = Trace()
        self.touched += [(proxy.node, where) for proxy, where in kept(self.model, fx.Proxy)]
        for node in graph.nodes:
            called = self.module(node)
            if called is not None:
                name = self.names[id(called)]
                trace.calls[name] += 1
                if is_bn(called):
                    trace.sources[name] = self.source(node)
            elif node.op == "get_attr":
                uses = self.uses(node)
                for owner in self.owners(node.target):
                    # A BN layer that is asked for anything at all cannot go; a weight may tell its shape.
                    if uses or is_bn(owner):
                        trace.leaks[self.names[id(owner)]] = next(iter(uses), "the model's forward")
        return trace

    def owners(self, target: str) -> list[nn.Module]:
        """The modules that hold the tensor of this name, which may be tied."""
        path, _, local = target.rpartition(".")
        tensor = getattr(self.modules.get(path), local, None)
        modules = [module for _, module in named_modules(self.model)]
        return [m for m in modules if any(t is tensor for t in (*m._parameters.values(), *m._buffers.values()))]

    def source(self, bn: fx.Node) -> Source:
        if not bn.all_input_nodes:
            return Source("a tensor from outside the model")
        node = bn.all_input_nodes[0]
        while isinstance(self.module(node), _PASS_THROUGH) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        module = self.module(node)
        if node.op == "placeholder":
            return Source("the model's input")
        if module is None:
            return Source(f"the output of {self.describe(node)}")
        return Source(f"the output of {self.label(module)}", self.names[id(module)], tuple(self.uses(node)))

    def uses(self, node: fx.Node) -> list[str]:
        found = [where for touched, where in self.touched if touched is node]
        for user in node.users:
            asked = user.args[1] if user.target is getattr else user.target
            if isinstance(self.module(user), _PASS_THROUGH):
                found += self.uses(user)
            elif asked not in _METADATA:
                found.append(self.describe(user))
        return found

    def describe(self, node: fx.Node) -> str:
        module = self.module(node)
        if module is not None:
            return self.label(module)
        if node.op == "output":
            return "the model's outputs"
        return str(getattr(node.target, "__name__", node.target))
