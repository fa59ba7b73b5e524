"""How adversarial examples are made fast: the switches of the private copy on which attacks run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from bnsurgery.errors import BNSurgeryWarning
from bnsurgery.layers import device_of

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "bfloat16", "float16")
StepPrecision = Literal["model", "auto", "bfloat16"]
STEP_PRECISIONS: tuple[StepPrecision, ...] = ("model", "auto", "bfloat16")
EngineLike = Literal["fast", "plain"]

__all__ = ["Engine"]


@dataclass(frozen=True)
class Engine:
    """Switches of the engine behind :func:`bnsurgery.adv_finetune` and :func:`bnsurgery.evaluate`.

    Attacks need the gradient of the input alone, of a network in evaluation mode, in which BN is an affine map (Eq. 1
    of Walter et al.). The engine keeps a private copy of the model for them, into whose convolutions that map has
    gone, and writes the live model's values into it, in place, before each batch. ``engine="fast"`` is ``Engine()``,
    ``engine="plain"`` is no engine at all: attacks run on the live model. The switches are independent, and none
    changes results beyond rounding, unless the model draws random numbers in evaluation mode. Its hooks are called in
    the copy too, also while that is made.

    Attributes:
        fuse: put BN layers into the layers that feed them, as :func:`bnsurgery.fuse_bn` does; what cannot be fused
            stays as it is.
        channels_last: run image networks (inputs (N, C, H, W)) in the memory format that convolutions are fastest in,
            in the training step too.
        chunk: examples that pass through the copy at once. ``"auto"``: on a CPU so many that the largest activation
            takes at most 16 MiB in 16 bits, else 4 MiB, but no fewer than 16; elsewhere all. ``None``: all. Networks in
            which examples of a batch touch one another in evaluation mode are not cut, nor are batches of a
            :class:`bnsurgery.PGD` with a loss of its own.
        cuda_graph: on CUDA, capture the step of a :class:`bnsurgery.PGD` in a graph, and replay it; not with a loss of
            its own.
        keep_memory: on a CPU with glibc, keep what is freed for the next step, until the call ends; glibc would hand it
            back to the system and fetch it again, page by page. Nothing is done where the environment sets glibc's
            thresholds (``MALLOC_TRIM_THRESHOLD_`` and the like, ``GLIBC_TUNABLES``).

    Raises:
        ValueError: ``chunk`` is less than 1.

    Example:
        >>> Engine(chunk=64)
        Engine(fuse=True, channels_last=True, chunk=64, cuda_graph=True, keep_memory=True)
    """

    fuse: bool = True
    channels_last: bool = True
    chunk: int | Literal["auto"] | None = "auto"
    cuda_graph: bool = True
    keep_memory: bool = True

    def __post_init__(self) -> None:
        if not (self.chunk is None or self.chunk == "auto" or (isinstance(self.chunk, int) and self.chunk >= 1)):
            raise ValueError(f"chunk must be 'auto', None or a whole number of at least 1, got {self.chunk!r}")


def chosen_engine(engine: Engine | EngineLike) -> Engine | None:
    """The switches that ``engine=`` stands for; None where attacks are to run on the live model.

    Raises:
        ValueError: it is none of the names.
    """
    if isinstance(engine, Engine):
        return engine
    if engine not in ("fast", "plain"):
        raise ValueError(f"engine must be 'fast', 'plain' or an Engine, got {engine!r}")
    return Engine() if engine == "fast" else None


def check_precision(precision: str, engine: Engine | None) -> None:
    """Raises :class:`ValueError` unless this precision is known and can be had."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if engine is None and precision != "auto":
        raise ValueError(
            f"precision={precision!r} is that of the engine's copy, and engine='plain' has none: leave precision out"
        )


def dtype_for(model: nn.Module, precision: Precision, *, lower: bool) -> torch.dtype | None:
    """What the copy computes in; None for the model's own dtype.

    Args:
        model: the live model.
        precision: as asked for.
        lower: whether ``"auto"`` may take fewer digits than the model has.
    """
    if precision != "auto":
        asked: torch.dtype = getattr(torch, precision)
        device = device_of(model)
        if asked == torch.bfloat16 and not fast_bfloat16(device):
            warnings.warn(
                f"precision='bfloat16': {device} has no fast bfloat16, this may be slower than float32",
                BNSurgeryWarning,
                stacklevel=4,
            )
        return asked
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not lower or own != {torch.float32} or not fast_bfloat16(device_of(model)):
        return None
    # On a CPU, depthwise convolutions are slower in bfloat16 than in float32, backwards above all.
    if device_of(model).type == "cpu" and any(_is_depthwise(module) for module in model.modules()):
        return None
    return torch.bfloat16


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supports = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(supported()) for supported in supports if supported is not None)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1
