"""Private copies of a model in evaluation mode, and whether two of them compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bnsurgery._modes import global_state, preserved
from bnsurgery._references import refuse_references
from bnsurgery._tracing import leaves
from bnsurgery.errors import BNSurgeryError, FusionError
from bnsurgery.layers import device_of, unwrap

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What outputs may differ by, relative to the largest: rounding, in a deep network."""
_TF32 = 1e-2
"""The same for float32 on an accelerator, whose convolutions may round to 10 bits."""
_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
"""How a class may change what copy.deepcopy makes of it."""


def evaluation_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Returns a copy without wrappers, in evaluation mode; arguments and errors as for :func:`private_copy`."""
    return private_copy(model, memo).eval()


def private_copy(
    model: nn.Module, memo: dict[int, Any] | None = None, *, error: type[BNSurgeryError] = FusionError
) -> nn.Module:
    """Returns a copy without wrappers.

    Args:
        model: any module.
        memo: what takes the place of which object of the model, by ``id``, wherever it is referred to: under several
            names, in a plain list, or in a bound method.
        error: what is raised.

    Raises:
        BNSurgeryError: something in the model cannot be copied, or its copy is not its own: of ``error``'s kind, or
            where this is not for fusing, since a function refers to the model.
    """
    memo = {} if memo is None else memo
    if error is not FusionError:  # fusing finds out what its copies run, in passes that there are not here
        refuse_references(model)
    purpose = "fusing is done on copies" if error is FusionError else "this is done on a copy"
    try:
        for module in reversed(list(model.modules())):
            for tensor in leaves(vars(module), Tensor):
                if not tensor.is_leaf:  # an old-style weight_norm's weight, or features kept from a training step
                    memo[id(tensor)] = tensor.detach().clone()
            if unwrap(module) is not module:
                memo[id(module)] = copy.deepcopy(unwrap(module), memo)
        private: nn.Module = copy.deepcopy(unwrap(model), memo)
    except Exception as reason:
        raise error(
            f"{type(unwrap(model)).__name__} cannot be copied ({type(reason).__name__}: {reason}), and {purpose}: "
            "make it work with copy.deepcopy"
        ) from reason
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, part in (*private.named_modules(), *private.named_parameters(), *private.named_buffers()):
        if id(part) in own:
            raise error(
                f"a copy of {type(unwrap(model)).__name__} shares {name!r} with it, and {purpose}: make "
                f"copy.deepcopy copy {type(part).__name__}"
            )
    return private


def rebind(model: nn.Module, modules: list[nn.Module]) -> None:
    """Binds methods anew that attributes of a copy hold of modules that took the place of others, in place.

    ``copy.deepcopy`` binds the method of the class that was there.
    """
    new = {id(module) for module in modules}

    def bound(value: Any) -> Any:
        if isinstance(value, MethodType) and id(value.__self__) in new:
            return getattr(value.__self__, value.__name__, value)
        return value

    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, (list, dict)):
                for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    value[key] = bound(part)
            elif id(module) not in new and isinstance(value, MethodType):
                vars(module)[name] = bound(value)


@contextmanager
def by_itself(model: nn.Module) -> Iterator[None]:
    """Raises where what runs in the block, a copy of the model, runs parts of the model itself.

    It does where a function is kept as an attribute that refers to the model: functions are not copied. Modes,
    gradients and buffers of the model are as they were afterwards.

    Raises:
        FusionError: on leaving the block.
    """
    with preserved(model):
        for module in model.modules():  # without model.eval(), which may be overridden to write to weights
            module.training = False
        own = {id(module) for module in model.modules()}
        watch = _Watch([*model.parameters(), *model.buffers()])

        def look(module: nn.Module, _inputs: Any) -> None:
            watch.met = watch.met or id(module) in own

        calls = register_module_forward_pre_hook(look)
        try:
            with watch:
                yield
        except Exception:
            if not watch.met:
                raise
        finally:
            calls.remove()
        if watch.met:
            raise FusionError(
                f"a copy of {type(unwrap(model)).__name__} runs parts of the model itself, and fusing is done on "
                "copies: a function that refers to the model is kept as an attribute (model.forward = "
                "torch.compile(model.forward), say); make it a method, or a forward hook"
            )


def is_faithful(model: nn.Module, copied: nn.Module, x: Tensor) -> bool:
    """Whether a copy gives what the model does. The model is run for that only where classes say how to copy it."""
    if not any(_copies_itself(module) for module in model.modules()):
        return True
    with torch.no_grad(), preserved(model):
        for module in model.modules():
            module.training = False
        try:
            _compare(unwrap(model), copied, x)
        except FusionError:
            return False
    return True


def _copies_itself(module: nn.Module) -> bool:
    """Whether its class, unless it is one of torch's own, says how copy.deepcopy copies it."""
    methods = [getattr(type(module), name, None) for name in _COPYING]
    return any(
        method is not getattr(nn.Module, name, None)
        and not getattr(method, "__module__", "").startswith(("torch.", "bnsurgery."))
        for name, method in zip(_COPYING, methods, strict=True)
    )


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether any of these tensors is computed with."""

    supports_higher_order_operators = True

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {id(tensor) for tensor in tensors}
        self._memory = {address for tensor in tensors if (address := _address(tensor))}
        self.met = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.met = self.met or any(
            id(tensor) in self._own or _address(tensor) in self._memory for tensor in leaves((args, kwargs), Tensor)
        )
        return func(*args, **kwargs)


def _address(tensor: Tensor) -> int:
    """Where a tensor's values lie, those of ``tensor.data`` too; 0 where they lie nowhere."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or is_fake(tensor):
        return 0
    return tensor.untyped_storage().data_ptr()


def arguments(example_input: Any) -> tuple[Any, ...]:
    """The positional arguments in ``example_input``; tensors are copied, since a model may write to its input."""
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    return copy.deepcopy(args, {id(t): t.detach().clone() for t in leaves(args, Tensor)})


def verify(original: nn.Module, fused: nn.Module, example_input: Any, fuse: Callable[[nn.Module], nn.Module]) -> None:
    """Runs two evaluation copies on the same input and compares all tensors that they return.

    Deep networks amplify rounding. Where the outputs differ, both are therefore compared once more in float64, for
    which ``fuse`` makes the fused copy anew: that tells rounding from a wrong plan.

    Args:
        original: converted to float64 where need be.
        fused: its fused copy.
        example_input: a tensor, or a tuple of all positional arguments.
        fuse: from an original to its fused copy.

    Raises:
        FusionError: one does not run, or they differ by more than rounding.
    """
    try:
        _compare(original, fused, example_input)
    except FusionError as error:
        wide = original.double()
        inputs = tuple(
            argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
            for argument in arguments(example_input)
        )
        try:
            _compare(wide, fuse(wide), inputs)
        except FusionError:
            raise error from None


def _compare(original: nn.Module, fused: nn.Module, example_input: Any) -> None:
    expected = _outputs(original, example_input, "the original")
    actual = _outputs(fused, example_input, "the fused copy")
    if not expected:
        raise FusionError("the model returns no tensor that could be compared: let it return tensors, lists or dicts")
    shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in actual]
    if shapes[0] != shapes[1]:
        raise FusionError(f"the original returns tensors of shapes {shapes[0]}, and the fused copy {shapes[1]}")
    tolerance = rounding(original, expected)
    largest = max(_relative_error(*pair) for pair in zip(actual, expected, strict=True))
    if largest > tolerance:
        raise FusionError(
            f"the outputs of the fused copy differ from the original's by a relative error of {largest:.1e}, and the "
            f"tolerance is {tolerance:.0e}: the trace missed something; leave the layers in question out of the plan"
        )


def rounding(model: nn.Module, outputs: Iterable[Tensor]) -> float:
    """What outputs of a model and of its copy may differ by, relative to the largest of them."""
    outputs = list(outputs)
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *outputs)} & _TOLERANCES.keys()
    tolerance = max((_TOLERANCES[dtype] for dtype in dtypes), default=0.0)
    devices = {tensor.device.type for tensor in (*model.parameters(), *outputs)}
    return max(tolerance, _TF32) if torch.float32 in dtypes and devices - {"cpu"} else tolerance


def differs(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two outputs differ by more than the tolerance, relative to the largest entry."""
    return _relative_error(actual, expected) > tolerance


def _outputs(model: nn.Module, example_input: Any, which: str) -> list[Tensor]:
    try:
        with torch.no_grad(), global_state(device_of(model), seed=0):
            return [tensor.cpu() for tensor in leaves(model(*arguments(example_input)), Tensor)]
    except Exception as error:
        raise FusionError(f"{which} does not run on example_input ({type(error).__name__}: {error})") from error


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference by the largest finite expected magnitude; equal infinities and NaN are no difference."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.to(wide), expected.to(wide)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual - expected).abs()[~same]
    magnitudes = expected[expected.isfinite()].abs()
    if not difference.numel():
        return 0.0
    largest = float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    scale = float(magnitudes.max()) if magnitudes.numel() else 0.0
    return largest / scale if scale else largest
