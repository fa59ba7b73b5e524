"""Trains the ResNet-20 that the quickstart starts from, on all of CIFAR-10, and writes it as safetensors.

    python examples/train_resnet20.py --data DIR --width 16 --out examples/data/resnet20-w16.safetensors

SGD with Nesterov momentum 0.9, weight decay 5e-4 on all parameters, batch 128, random crops and flips, a linear
warm-up over the first epoch and cosine decay to 0, bfloat16 autocast; no adversarial examples. The script writes a
JSON record beside the network: command, settings, seed, versions, hardware, wall time, clean accuracy on the 10,000
test images. It saves a checkpoint after each epoch (``OUT.checkpoint``) and goes on from it when called again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar10 import Batches, floats, full
from resnet import resnet20
from safetensors.torch import save
from several import alone
from torch import nn


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    """Share of right top-1 predictions in evaluation mode, float32."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(labels), 500):
            logits = model(floats(images[start : start + 500].to(device)))
            right += int((logits.argmax(1).cpu() == labels[start : start + 500]).sum())
    return right / len(labels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10; downloaded there if missing")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    alone(Path(__file__).name)
    device = torch.device(args.device)
    images, labels = full(args.data, train=True)
    test_images, test_labels = full(args.data, train=False)
    torch.manual_seed(args.seed)
    model = resnet20(args.width).to(device, memory_format=torch.channels_last)
    batches = Batches(images, labels, batch_size=128, augment=True, drop_last=True, device=device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    total, warmup = args.epochs * len(batches), len(batches)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / total, 1))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    checkpoint = args.out.with_suffix(".checkpoint")
    epoch, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"])
        epoch, seconds = saved["epoch"], saved["seconds"]

    while epoch < args.epochs:
        start = time.perf_counter()
        model.train()
        total_loss = torch.zeros((), device=device)
        for x, y in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
        epoch += 1
        seconds += time.perf_counter() - start
        print(f"epoch {epoch}/{args.epochs}: loss {total_loss.item() / len(batches):.4f}, {seconds:.0f} s", flush=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "epoch": epoch,
            "seconds": seconds,
        }
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    clean = accuracy(model, test_images, test_labels, device)
    args.out.write_bytes(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    record = {
        "command": f"python examples/train_resnet20.py --data DIR --width {args.width} --epochs {args.epochs} "
        f"--lr {args.lr} --seed {args.seed} --device {args.device} --out {args.out}",
        "epochs": args.epochs,
        "seed": args.seed,
        "train_images": len(labels),
        "test_images": len(test_labels),
        "clean_accuracy": clean,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
