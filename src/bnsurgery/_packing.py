"""Examples that are broken leave the batch while an attack goes on with the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnsurgery._copies import differs
from bnsurgery._geometry import Norm, distance

Inside = Callable[[Tensor, Tensor], Tensor]
"""Examples (N, ...) and points made from them to whether each lies within eps and the bounds, bool (N,)."""

SURE = 1e-3
"""How far another logit must lie above the label's, relative to the largest: beyond rounding."""


class Packed(nn.Module):
    """A network for APGD on one batch: where an example is broken, nothing more is computed for it.

    APGD itself carries a broken example on to its last iteration, and of all that it finds the first point would have
    done. The network sees each point that is tried; for an example with a misclassified point within eps it answers
    from then on with the logits found there, without a gradient.

    Attributes:
        broken: bool (N,).
        found: the point that broke each example, (N, ...); the example itself where there is none.
    """

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, inside: Inside) -> None:
        """``net`` takes inputs like x (N, ...), of labels y (N,), to logits (N, K), each by itself."""
        super().__init__()
        self.net = net
        self._x, self._y, self._inside = x, y, inside
        self.found, self.broken = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        self._logits: Tensor | None = None
        self._rows = torch.arange(len(y), device=y.device)
        self.eval()

    @staticmethod
    def suits(net: nn.Module, x: Tensor, eps: float, norm: Norm) -> bool:
        """Whether the examples of a batch do not change each other's logits, and can be told apart by what they become.

        They can where no point is within eps of two of them.
        """
        if len(x) < 2:
            return False
        with torch.no_grad():
            whole = net(x)
            if differs(net(x[::2]), whole[::2]):
                return False
        flat = x.flatten(1)
        apart = 2 * eps * (flat.shape[1] ** 0.5 if norm == "linf" else 1.0)  # the L2 distance that is enough
        pairs = torch.triu_indices(len(x), len(x), 1, device=x.device)
        near, others = pairs[:, torch.pdist(flat) <= apart]
        return bool((distance(x[near], x[others], norm) > 2 * eps).all())

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
            rows = torch.cdist(x.flatten(1), self._x.flatten(1)).argmin(1)
            if not bool(self._inside(self._x[rows], x).all()):
                return None
            self._rows = rows
        return self._rows

    def _note(self, x: Tensor, rows: Tensor, logits: Tensor) -> None:
        own = logits.gather(1, self._y[rows, None]).flatten()
        others = logits.scatter(1, self._y[rows, None], -torch.inf).amax(1)
        new = ~self.broken[rows] & (others - own > SURE * logits.abs().amax(1))
        if not bool(new.any()):
            return
        if self._logits is None:
            self._logits = torch.zeros((len(self._y), logits.shape[1]), dtype=logits.dtype, device=logits.device)
        self._logits[rows[new]], self.found[rows[new]] = logits[new], x[new]
        self.broken[rows[new]] = True
