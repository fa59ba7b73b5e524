"""The networks that the tests run on: a name, a constructor, and an example input each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parents[1])]

from resnet import resnet20


@dataclass(frozen=True)
class Case:
    """One network; ``build()`` is deterministic, with statistics and parameters away from their initial values."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10

    def __repr__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return shake(self.make()).to(dtype)

    def example(self, batch: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    def labels(self, batch: int | None = None) -> Tensor:
        count = self.shape[0] if batch is None else batch
        return torch.randint(self.classes, (count,), generator=torch.Generator().manual_seed(3))


def shake(model: nn.Module) -> nn.Module:
    """Gives each BN layer random statistics, gamma and beta: initial values hide mistakes."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if layer.running_mean is not None:
                    layer.running_mean.normal_(0, 0.2)
                    layer.running_var.uniform_(0.5, 2)
                    layer.num_batches_tracked.fill_(7)
                if layer.affine:
                    layer.weight.uniform_(0.5, 1.5)
                    if layer.bias is not None:
                        layer.bias.normal_(0, 0.2)
    return model


class SharedBN(nn.Module):
    """One BN layer used after two convolutions, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(8)
        self.bn = nn.BatchNorm2d(8)
        self.logits = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(self.bn(self.conv1(x)))
        x = F.relu(self.bn(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.logits(x.mean((2, 3)))


def small(affine: bool = True, **options: object) -> nn.Sequential:
    """Two convolutions with BN and a linear layer with BN, for images (N, 3, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, affine=affine, **options),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12, affine=affine, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 16),
        nn.BatchNorm1d(16, affine=affine, **options),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def network_1d() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 8, 5, padding=2, groups=2),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def network_3d() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.ConvTranspose3d(6, 8, 2, stride=2, groups=2),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10, **options)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return make


SMALL = Case("small", small, (6, 3, 8, 8))
SHARED = Case("shared", SharedBN, (6, 3, 8, 8))
AFFINE_FREE = Case("affine_free", lambda: small(affine=False), (6, 3, 8, 8))
RESNET20 = Case("resnet20", lambda: resnet20(4), (4, 3, 32, 32))
NETWORK_1D = Case("network_1d", network_1d, (6, 2, 16))
NETWORK_3D = Case("network_3d", network_3d, (4, 2, 4, 6, 6))
TIMM = Case("timm_mobilenetv3", _timm("mobilenetv3_small_050"), (3, 3, 64, 64))

LIGHT = [SMALL, SHARED, AFFINE_FREE, RESNET20, NETWORK_1D, NETWORK_3D]
"""Fast enough for any test."""

HEAVY = [
    Case("resnet18", _torchvision("resnet18"), (3, 3, 64, 64)),
    Case("mobilenet_v3_small", _torchvision("mobilenet_v3_small"), (4, 3, 64, 64)),
    Case("densenet121", _torchvision("densenet121"), (3, 3, 64, 64)),
    Case("googlenet", _torchvision("googlenet", aux_logits=False, init_weights=False), (3, 3, 64, 64)),
]
HEAVY.append(TIMM)
