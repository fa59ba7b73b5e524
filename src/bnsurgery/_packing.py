"""Examples that are broken leave the batch while an attack goes on with the others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnsurgery._copies import differs
from bnsurgery._geometry import Norm
from bnsurgery._modes import global_state

Inside = Callable[[Tensor, Tensor], Tensor]
"""Examples (N, ...) and points made from them to whether each lies within eps and the bounds, bool (N,)."""

_ORDERS: dict[Norm, float] = {"linf": math.inf, "l2": 2.0}
SURE = 10
"""How far another logit must lie above the label's, as a multiple of what the copy's logits may differ by."""


class Packed(nn.Module):
    """A network for APGD on one batch: where an example is broken, nothing more is computed for it.

    APGD itself carries a broken example on to its last iteration, and of all that it finds the first point would have
    done. The network sees each point that is tried; for an example with a misclassified point within eps it answers
    from then on with the logits found there, without a gradient.

    Attributes:
        broken: bool (N,).
        found: the point that broke each example, (N, ...); the example itself where there is none.
    """

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, inside: Inside, norm: Norm, tolerance: float) -> None:
        """``net`` takes inputs like x (N, ...), of labels y (N,), to logits (N, K), each by itself.

        ``tolerance`` is what its logits may differ by from those that count, relative to the largest.
        """
        super().__init__()
        self.net = net
        self._x, self._y, self._inside = x, y, inside
        self._order, self._margin = _ORDERS[norm], SURE * tolerance
        self.found, self.broken = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        self._logits: Tensor | None = None
        self._rows = torch.arange(len(y), device=y.device)
        self.eval()

    @staticmethod
    def suits(net: nn.Module, x: Tensor, eps: float, norm: Norm, tolerance: float) -> bool:
        """Whether the examples of a batch do not change each other's logits, and can be told apart by what they become.

        They can where no point is within eps of two of them.
        """
        if len(x) < 2:
            return False
        with torch.no_grad(), global_state(x.device, seed=0):
            whole = net(x)
            if net(x[:1]).shape != whole[:1].shape or differs(net(x[::2]), whole[::2], tolerance):
                return False
        flat = x.flatten(1)
        distances = torch.cdist(flat, flat, p=_ORDERS[norm]).fill_diagonal_(math.inf)
        return bool((distances > 2 * eps * (1 + 1e-4)).all())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (M, K) of points x (M, ...) made from examples of the batch."""
        rows = self._made_from(x.detach())
        if rows is None:
            return self._run(x)
        known = self.broken[rows]
        if self._logits is None or not bool(known.any()):
            logits = self._run(x)
        else:
            left = (~known).nonzero().flatten()
            logits = self._logits[rows]
            if len(left):
                logits = logits.index_copy(0, left, self._run(x[left]))
            else:  # of zero gradient, not without one
                logits = logits + 0 * x.flatten(1)[:, :1]
        self._note(x.detach(), rows, logits.detach())
        return logits

    def _run(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def _made_from(self, x: Tensor) -> Tensor | None:
        """Which examples these points were made from; None where they are others."""
        if len(x) != len(self._rows) or not bool(self._inside(self._x[self._rows], x).all()):
            rows = torch.cdist(x.flatten(1), self._x.flatten(1), p=self._order).argmin(1)
            if not bool(self._inside(self._x[rows], x).all()):
                return None
            self._rows = rows
        return self._rows

    def _note(self, x: Tensor, rows: Tensor, logits: Tensor) -> None:
        own = logits.gather(1, self._y[rows, None]).flatten()
        others = logits.scatter(1, self._y[rows, None], -torch.inf).amax(1)
        new = ~self.broken[rows] & (others - own > self._margin * logits.abs().max())
        if not bool(new.any()):
            return
        if self._logits is None:
            self._logits = torch.zeros((len(self._y), logits.shape[1]), dtype=logits.dtype, device=logits.device)
        self._logits[rows[new]], self.found[rows[new]] = logits[new], x[new]
        self.broken[rows[new]] = True
