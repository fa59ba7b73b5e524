"""One of several processes of test_surgery: takes a step on a mixed batch under DistributedDataParallel.

Run as ``python split_ranks.py RANK WORLD STORE OUT``; each process writes ``OUT.RANK``.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bnsurgery import PGD, adv_finetune, split_bn, use_branch
from networks import SMALL

INDEX = torch.tensor([0, 0, 0, 1, 1, 1])


def model() -> nn.Module:
    return split_bn(SMALL.build(torch.float64))


def loss(split: nn.Module, rank: int) -> Tensor:
    """Of a rank's share of the examples, half of them through each branch."""
    split.train()
    rows = slice(6 * rank, 6 * rank + 6)
    x, y = SMALL.example(12, torch.float64)[rows], SMALL.labels(12)[rows]
    with use_branch(split, INDEX):
        return F.cross_entropy(split(x), y)


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    wrapped = nn.parallel.DistributedDataParallel(model())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    loss(wrapped, rank).backward()
    optimizer.step()
    found = {"by hand": {name: p.detach() for name, p in wrapped.module.named_parameters()}}

    wrapped = nn.parallel.DistributedDataParallel(model())
    data = [(SMALL.example(12, torch.float64)[rank::2], SMALL.labels(12)[rank::2])] * 2
    adv_finetune(wrapped, data, epochs=2, train="all", clean_fraction=0.5, attack=PGD(steps=2), progress=False)
    found["tuned"] = {name: p.detach() for name, p in wrapped.module.named_parameters()}
    torch.save(found, f"{out}.{rank}")
    dist.barrier()  # who leaves first takes the store along
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    sys.stderr.flush()
    os._exit(0)  # threads of torch's that outlive the group may abort an interpreter that is being taken down
