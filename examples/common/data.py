"""CIFAR-10 as the papers take it: AutoAugment and Cutout, or crops and flips."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from examples import several
from examples.cifar10 import Batches, floats, full, sample
from examples.common.files import Problem


@dataclass(frozen=True)
class Images:
    """Training and test images, uint8 (N, 3, 32, 32), with labels (N,)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def first(self, count: int) -> Images:
        """The first training images alone."""
        x, y = self.train
        return Images((x[:count], y[:count]), self.test)

    def held_out(self, count: int, use: int) -> Images:
        """The last ``count`` training images in place of the test images, and the first ``use`` to train on."""
        x, y = self.train
        return Images((x[:-count][:use], y[:-count][:use]), (x[-count:], y[-count:]))

    def tests(self, count: int) -> tuple[Tensor, Tensor]:
        """The first test images in [0, 1]."""
        return floats(self.test[0][:count]), self.test[1][:count]


def read(folder: Path | None) -> Images:
    """All of CIFAR-10, downloaded into a folder that is new or empty; None: the shipped sample.

    Raises:
        Problem: the folder holds something else, or nothing could be downloaded.
    """
    if folder is None:
        return Images(sample(train=True), sample(train=False))
    parts = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
    new = False
    try:
        new = not folder.exists()
        if not new and any(folder.iterdir()) and not any((folder / part).exists() for part in parts):
            raise Problem(f"--data {folder} is not CIFAR-10: there is no cifar-10-batches-py in it")
        several.of_first(lambda: bool(full(folder, train=True)))  # where it is downloaded, by one process
        return Images(full(folder, train=True), full(folder, train=False))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if not new and "not found or corrupted" in str(error):
            raise Problem(f"--data {folder}: files of CIFAR-10 are missing or damaged in it: remove them") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Problem(f"--data {folder}: no CIFAR-10 there, and none could be had: {reason}") from None


def batches(
    images: Images, *, adversarial: bool, batch_size: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Shuffled, augmented training batches; a new order each epoch, drawn from torch's global generator."""
    if adversarial:
        return Batches(*images.train, batch_size=batch_size, augment=True, drop_last=True, device=device)
    return torch.utils.data.DataLoader(
        _AutoAugmented(*images.train),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=_workers(device),
        pin_memory=device.type == "cuda",
    )


def _workers(device: torch.device) -> int:
    """On a CPU the augmentation would compete with the training for cores."""
    return 0 if device.type == "cpu" else max(1, min(14, (os.cpu_count() or 1) - 2))


class _AutoAugmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Crops with 4 pixels of padding, flips, AutoAugment's policy for CIFAR-10, Cutout of 16 x 16 pixels.

    Cutout is torchvision's RandomErasing of a quarter of the image, to 0: the square lies wholly inside the image.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from torchvision import transforms

        self.pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
                transforms.ToTensor(),
                transforms.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0), value=0),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]
