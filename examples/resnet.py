"""ResNet-18, 20, 56, 110 for CIFAR-10: the networks of the papers that the examples reproduce.

The names, the initialisation and the whitening layer follow the public code of Walter et al.'s second author. With
``width=64`` ResNet-20 has 4,327,754 parameters, 6,272 of them in 21 batch-normalization layers (0.14%).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.4914, 0.4822, 0.4465)
"""Per-channel mean of the CIFAR-10 training images in [0, 1]."""
STD = (0.2470, 0.2435, 0.2616)
"""Per-channel standard deviation of the CIFAR-10 training images in [0, 1]."""


class Whiten(nn.Module):
    """Clamps images to [0, 1] and whitens each channel, so that attacks live in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.clamp(0, 1) - self.mean) / self.std


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, added to the shortcut (conv-BN where the shape changes), ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of ``depth`` 6 n + 2 and base ``width``; images (N, 3, 32, 32) in [0, 1] to logits (N, classes).

    With four stages the depth is 8 n + 2: ``ResNet(18, 64, stages=4)`` has 11,173,962 parameters.
    """

    def __init__(self, depth: int = 20, width: int = 64, classes: int = 10, *, stages: int = 3) -> None:
        super().__init__()
        if depth < 2 * stages + 2 or (depth - 2) % (2 * stages):
            known = "20, 56, 110" if stages == 3 else "18, 26, 34"
            raise ValueError(f"depth must be {2 * stages} n + 2 ({known}, ...), got {depth}")
        self.whiten = Whiten()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        channels = width
        made = []
        for stage in range(stages):
            blocks = []
            for index in range((depth - 2) // (2 * stages)):
                outputs = width * 2**stage
                blocks.append(Block(channels, outputs, stride=2 if stage and not index else 1))
                channels = outputs
            made.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*made)
        self.logits = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(self.whiten(x))))
        return self.logits(self.stages(x).mean((2, 3)))


def resnet20(width: int = 64) -> ResNet:
    """ResNet-20 of the given base width."""
    return ResNet(20, width)
