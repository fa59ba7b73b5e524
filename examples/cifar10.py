"""CIFAR-10 as tensors: the full set through torchvision, or the small sample shipped in ``examples/data``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SAMPLE = Path(__file__).parent / "data"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def full(folder: str | Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """The 50,000 training or 10,000 test images, in the published order, downloaded where missing.

    Returns:
        uint8 images (N, 3, 32, 32) and int64 labels (N,).
    """
    from torchvision.datasets import CIFAR10

    present = Path(folder, CIFAR10.base_folder).is_dir()
    dataset = CIFAR10(str(folder), train=train, download=not present)
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def sample(*, train: bool) -> tuple[Tensor, Tensor]:
    """The shipped sample (see ``make_sample.py``): class-balanced training images, the first test images.

    Returns:
        uint8 images (N, 3, 32, 32) and int64 labels (N,).
    """
    from PIL import Image

    index = json.loads((SAMPLE / "cifar10-sample.json").read_text(encoding="utf-8"))["train" if train else "test"]
    with Image.open(SAMPLE / index["file"]) as mosaic:
        pixels = np.asarray(mosaic.convert("RGB"))
    rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
    tiles = pixels.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    labels = torch.tensor(index["labels"])
    return torch.from_numpy(tiles[: len(labels)].copy()), labels


def floats(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.float().div_(255)


class Batches:
    """Shuffled, optionally augmented mini-batches of in-memory images; a new order each time it is iterated.

    Args:
        images: uint8 (N, 3, 32, 32), moved to ``device`` once.
        labels: int64 (N,).
        batch_size: images a batch; the last one may be smaller unless ``drop_last``.
        augment: random crop with 4 pixels of zero padding, and horizontal flip.
        shuffle: whether each pass has a new order.
        drop_last: leave out the last, smaller batch.
        device: where the batches come out.

    Random numbers come from torch's global CPU generator, so that whoever seeds or stores it (as
    ``bnsurgery.adv_finetune`` does) decides the order.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        augment: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.augment, self.shuffle, self.drop_last = batch_size, augment, shuffle, drop_last
        if augment:
            self.padded = torch.nn.functional.pad(self.images, (4, 4, 4, 4))

    def __len__(self) -> int:
        count = len(self.labels)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.labels.device
        count = len(self.labels)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for step in range(len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size].to(device)
            yield self._images(rows), self.labels[rows]

    def _images(self, rows: Tensor) -> Tensor:
        if not self.augment:
            return floats(self.images[rows])
        device, count, side = rows.device, len(rows), self.images.shape[-1]
        top, left, flip = (torch.randint(high, (count, 1)).to(device) for high in (9, 9, 2))
        span = torch.arange(side, device=device)
        down = (top + span)[:, None, :, None]
        across = torch.where(flip.bool(), left + side - 1 - span, left + span)[:, None, None, :]
        channel = torch.arange(self.images.shape[1], device=device)[None, :, None, None]
        return floats(self.padded[rows[:, None, None, None], channel, down, across])
