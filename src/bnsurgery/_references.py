"""What functions that a model keeps refer to: ``copy.deepcopy`` takes a function as it is, with what it refers to."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import label, named_modules, unwrap

_NOT_COPIED = "_compiled_call_impl"
"""What ``Module.compile`` keeps; torch leaves it out of copies."""


def refuse_references(model: nn.Module) -> None:
    """Raises where a copy of the model would go on to compute with parts of the model itself.

    Raises:
        BNSurgeryError: a function that is kept as an attribute, or as a hook, refers to the model.
    """
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, module in named_modules(model):
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules", _NOT_COPIED):
                continue
            hook = attribute.endswith("_hooks")  # these may have a list of what they have seen
            if any(id(part) in own for part in _held(value, set(), copied=True, lists=not hook)):
                what = "a hook of" if hook else f"attribute {attribute!r} of"
                raise BNSurgeryError(
                    f"a copy of {type(unwrap(model)).__name__} would run parts of the model itself, and this is done "
                    f"on a copy: {what} {label(name, module)} is, or holds, a function that refers to the model; make "
                    "it a method of the module's class, or a hook that takes what it needs from its arguments"
                )


def _held(value: Any, met: set[int], *, copied: bool, lists: bool) -> Iterator[Any]:
    """The modules and tensors that a copy of a value holds as they are.

    Args:
        value: what a module keeps.
        met: what has been looked into, by ``id``.
        copied: whether ``copy.deepcopy`` copies it, rather than what holds it being taken as it is.
        lists: whether to look into lists and the like that are not copied.
    """
    if id(value) in met:
        return
    if isinstance(value, (nn.Module, Tensor)):
        if not copied:
            yield value
        return
    parts: list[tuple[Any, bool]] = []
    if isinstance(value, FunctionType):
        parts += [(cell.cell_contents, False) for cell in value.__closure__ or () if _is_filled(cell)]
        parts += [(value.__globals__[name], False) for name in _globals(value.__code__) if name in value.__globals__]
        parts += [(default, False) for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())]
    elif isinstance(value, MethodType):
        parts = [(value.__func__, False), (value.__self__, copied)]
    elif isinstance(value, partial):
        parts = [(part, copied) for part in (value.func, *value.args, *value.keywords.values())]
    elif not (copied or lists):
        return
    elif isinstance(value, Mapping):
        parts = [(part, copied) for part in value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [(part, copied) for part in value]
    if parts:
        met.add(id(value))
    for part, as_well in parts:
        yield from _held(part, met, copied=as_well, lists=lists)


def _globals(code: CodeType) -> set[str]:
    """The global names that code reads, and the functions defined in it."""
    found = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            found |= _globals(part)
    return found


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty one raises
    except ValueError:
        return False
    return True
