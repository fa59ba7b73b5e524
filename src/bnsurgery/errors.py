"""The errors and the warning that bnsurgery raises.

A wrong argument is a plain :class:`ValueError` or :class:`TypeError`. What is wrong with a model, a file or a run is a
:class:`BNSurgeryError`, so that one ``except`` clause catches all that is particular to this library.
"""

from __future__ import annotations


class BNSurgeryError(Exception):
    """Base of the errors that are particular to this library."""


class NoBatchNormError(BNSurgeryError):
    """The model has no batch-normalization layer to work on."""


class FusionError(BNSurgeryError):
    """A model cannot be traced for fusing, or its fused copy does not compute the same outputs."""


class PatchError(BNSurgeryError):
    """A BN patch does not fit the model, or its file is not a valid patch."""


class CheckpointError(BNSurgeryError):
    """A checkpoint cannot be read, or belongs to another model or configuration."""


class NonFiniteError(BNSurgeryError):
    """A loss, a gradient, an activation or an input is NaN or infinite (``on_nonfinite="raise"``)."""


class LostProcessError(BNSurgeryError):
    """One of several processes of a run is gone, or does not answer."""


class MissingExtraError(BNSurgeryError, ImportError):
    """An optional package is not installed; the message names the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'bnsurgery[{extra}]'")


class BNSurgeryWarning(UserWarning):
    """Something was left out or is probably not meant, and the call went on."""
