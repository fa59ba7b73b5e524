"""Does every operation of the library come out right, or refused by name, on the architectures of torchvision and timm?

    python benchmarks/zoo.py
    python benchmarks/zoo.py --only "torchvision/regnet*" --again

The architectures are all of torchvision that have BN layers, and of timm the three smallest of each module and then the
smallest of all (``tests/zoo.py`` has the rule), with random weights and small inputs. ``tests/zoo_checks.py`` has what
each operation is compared with. Each architecture runs in a process of its own, which is ended where it takes too much
time or memory; the result file is written after each, and what is in it is not run again.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import timm
import torch
import torch._dynamo  # once for all processes: they are forked from this one
import torchvision

from environment import environment
from tables import RESULTS, TABLES
from zoo import SEED, Architecture, case_of, timm_architectures, torchvision_architectures
from zoo_checks import OPERATIONS, bn_of, check, suits

SECONDS = 1200.0
GIBIBYTES = 20.0
PATIENCE = 0.25
"""Seconds between two looks at a process."""
UNDER_WAY = {"verdict": "wrong", "note": "under way"}


def run(architecture: Architecture, operations: list[str], answer: Connection) -> None:
    """Operations on one architecture; each is sent as soon as it is known."""
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):  # glibc: what is freed goes back, so that the largest networks have room
        ctypes.CDLL(None).mallopt(-3, 1 << 20)
    case = case_of(architecture)
    about = {
        "family": architecture.family,
        "task": architecture.task,
        "input": [case.batch, *(case.x[0].shape if architecture.task == "detection" else case.x.shape[1:])],
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "bn_layers": len(bn_of(case.model)),
    }
    answer.send(("", about))
    for operation in operations:
        if suits(operation, case):
            answer.send((operation, UNDER_WAY))
            answer.send((operation, check(operation, case)))
    answer.close()


def guarded(architecture: Architecture, operations: list[str]) -> dict[str, Any]:
    """The same in a process of its own; what it did not come to is wrong."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(architecture, operations, theirs), daemon=True)
    process.start()
    theirs.close()
    found: dict[str, Any] = {}
    deadline, ended = time.monotonic() + SECONDS, ""
    while True:
        try:
            while ours.poll(PATIENCE):
                operation, value = ours.recv()
                found.update({"operations": {}, **value} if not operation else {})
                if operation:
                    found["operations"][operation] = value
        except EOFError:
            break
        if time.monotonic() > deadline:
            ended = f"took more than {SECONDS:.0f} s"
        elif resident(process.pid) > GIBIBYTES * 2**30:
            ended = f"took more than {GIBIBYTES:.0f} GiB"
        if ended:
            process.kill()
            break
    process.join()
    if ended or process.exitcode:
        reason = ended or f"the process ended with {process.exitcode}"
        done = found.setdefault("operations", {})
        last = next((operation for operation, entry in done.items() if entry == UNDER_WAY), "build")
        done[last] = {"verdict": "wrong", "note": reason}
    return found


def resident(process: int | None) -> int:
    """Bytes in memory."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def opened(path: Path) -> dict[str, Any]:
    """The result file, or a new one."""
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    made = environment(__file__)
    made["versions"]["timm"] = timm.__version__
    made["command"] = "python benchmarks/zoo.py"
    chosen = [*torchvision_architectures(), *timm_architectures()]
    listed = {str(own): {"family": own.family, "task": own.task} for own in chosen}
    without = [name for name in torchvision.models.list_models() if f"torchvision/{name}" not in listed]
    return {"environment": made, "seed": SEED, "listed": listed, "without_bn": without, "architectures": {}}


def written(record: dict[str, Any], path: Path) -> None:
    """The result file, whole at any time, and its table."""
    order = list(record["listed"])
    record["architectures"] = dict(sorted(record["architectures"].items(), key=lambda item: order.index(item[0])))
    for target, text in (
        (path, json.dumps(record, indent=1) + "\n"),
        (path.with_suffix(".md"), TABLES["zoo"](record)),
    ):
        part = target.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(target)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a pattern of names, such as 'timm/resnet*'")
    parser.add_argument("--again", action="store_true", help="run what is in the result file too")
    parser.add_argument("--operation", choices=OPERATIONS, help="this one alone; the others stay in the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "zoo.json"
    record = opened(path)
    for name, about in record["listed"].items():
        if not fnmatch.fnmatchcase(name, options.only) or (name in record["architectures"] and not options.again):
            continue
        library, _, local = name.partition("/")
        began = time.monotonic()
        architecture = Architecture(library, local, about["family"], about["task"])  # type: ignore[arg-type]
        found = guarded(architecture, [options.operation] if options.operation else list(OPERATIONS))
        if options.operation:
            before = record["architectures"].get(name, {}).get("operations", {})
            found["operations"] = {**before, **found["operations"]}
        record["architectures"][name] = found
        written(record, path)
        verdicts = Counter(own["verdict"] for own in found["operations"].values())
        wrong = [f"{key}: {own['note']}" for key, own in found["operations"].items() if own["verdict"] == "wrong"]
        print(f"{name} {dict(verdicts)} {time.monotonic() - began:.0f} s", *wrong, sep="\n  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
