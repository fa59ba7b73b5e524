"""Makes the small sample of CIFAR-10 that is shipped in ``examples/data``: two lossless mosaics and their labels.

    python examples/make_sample.py --data DIR

The training part holds the first 280 training images of each class, in the published order; the test part is the first
512 test images. Pixels are those of the published files, bit for bit (WebP, lossless).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cifar10 import SAMPLE, full, sample
from several import alone

PER_CLASS, TEST, COLUMNS = 280, 512, 32


def mosaic(images: torch.Tensor) -> Image.Image:
    """Images (N, 3, 32, 32) in rows of 32, the last row filled up with black."""
    rows = -(-len(images) // COLUMNS)
    tiles = np.zeros((rows * COLUMNS, 3, 32, 32), np.uint8)
    tiles[: len(images)] = images.numpy()
    grid = tiles.reshape(rows, COLUMNS, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(rows * 32, COLUMNS * 32, 3)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10; downloaded there if missing")
    args = parser.parse_args()
    alone(Path(__file__).name)
    SAMPLE.mkdir(exist_ok=True)
    index = {"source": "CIFAR-10 (Krizhevsky, 2009)", "command": "python examples/make_sample.py --data DIR"}
    parts = {}
    for name in ("train", "test"):
        images, labels = full(args.data, train=name == "train")
        if name == "train":
            rows = torch.cat([(labels == label).nonzero().flatten()[:PER_CLASS] for label in range(10)]).sort().values
        else:
            rows = torch.arange(TEST)
        file = f"cifar10-sample-{name}.webp"
        mosaic(images[rows]).save(SAMPLE / file, lossless=True, quality=100, method=6, exact=True)
        index[name] = {"file": file, "labels": labels[rows].tolist(), "rows": rows.tolist()}
        parts[name] = images[rows], labels[rows]
    (SAMPLE / "cifar10-sample.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    for name, (images, labels) in parts.items():
        read_images, read_labels = sample(train=name == "train")
        if not (torch.equal(read_images, images) and torch.equal(read_labels, labels)):
            raise SystemExit(f"the {name} part does not read back as it was written")
    print({file.name: file.stat().st_size for file in sorted(SAMPLE.glob("cifar10-sample*"))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
