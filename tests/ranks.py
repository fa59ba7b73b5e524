"""One of several processes of test_stats: recalibrates on its share of the data, agrees on a time, and writes both.

Run as ``python ranks.py RANK WORLD STORE OUT``; each process writes ``OUT.RANK``.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnsurgery import adv_finetune, freeze_except_bn, recalibrate_bn
from bnsurgery._ranks import Ranks
from networks import SHARED, SMALL, Case

CASES = {"small": SMALL, "shared": SHARED}
SHARES = ([5, 2, 3], [4])
"""Sizes of the batches of each rank, of unlike number: together 14 samples."""


def samples(case: Case) -> Tensor:
    return case.example(sum(map(sum, SHARES)), torch.float64)


def share(case: Case, rank: int) -> list[Tensor]:
    begin = sum(map(sum, SHARES[:rank]))
    return list(samples(case)[begin:].split([*SHARES[rank], sum(map(sum, SHARES[rank + 1 :]))])[: len(SHARES[rank])])


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    for name, case in CASES.items():
        for estimator in ("pooled", "exact"):
            model = case.build(torch.float64)
            result = recalibrate_bn(model, share(case, rank), estimator=estimator)
            found[name, estimator] = model.state_dict(), result.batches, result.elements
    found["slowest"] = Ranks().largest(10.0 * rank)
    model = SMALL.build()
    with freeze_except_bn(model):
        wrapped = nn.parallel.DistributedDataParallel(model)
        x, y = SMALL.example(), SMALL.labels()
        limit = (1000.0, 1e-9)[rank]  # "what is left until a deadline" differs from process to process
        run = adv_finetune(wrapped, [(x, y)] * 2, epochs=3, train="as-is", max_seconds=limit, progress=False)
    found["ended"] = run.ended, run.steps
    torch.save(found, f"{out}.{rank}")
    dist.barrier()  # who leaves first takes the store along
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    sys.stderr.flush()
    os._exit(0)  # threads of torch's that outlive the group may abort an interpreter that is being taken down
