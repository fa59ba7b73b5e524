"""Memory of fine-tuning steps: what a process holds, and what of it are tensors."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import Case, contender
from torch.profiler import ProfilerActivity, profile


def peak_memory(
    name: str, case: Case, device: torch.device, seed: int, *, steps: int = 2, done: Callable[[], None] = lambda: None
) -> float | None:
    """MiB by which so many steps raise what this process holds, at the peak; None where the system does not say.

    On a CPU the resident size; on CUDA what torch has allocated on the device. Steps on a tiny network come first, so
    that what libraries take once for all is not counted. ``done`` is called after each step.
    """
    tiny = Case(batch=2, depth=8, width=8, attack_steps=1)
    contender(name, tiny)(tiny.model(device, seed), tiny.batches(2, device, seed), lambda: None)
    model, batches = case.model(device, seed), case.batches(steps, device, seed)
    run = contender(name, case)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(model, batches, done)
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def kibibytes(field: str) -> int:
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    with contextlib.suppress(OSError):  # where it is refused, the peak so far counts if the steps do not exceed it
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far becomes the size now
    resident = kibibytes("VmRSS")
    run(model, batches, done)
    return (kibibytes("VmHWM") - resident) / 1024


def peak_of_tensors(name: str, case: Case, device: torch.device, seed: int) -> float:
    """MiB of the tensors that two steps have alive at once, at the peak: what torch asks of the C library on a CPU.

    The rest of what the process holds is in pieces that the C library keeps, and in libraries of their own.
    """
    if device.type != "cpu":
        raise ValueError(f"on {device.type} peak_memory counts tensors alone already")
    model, batches = case.model(device, seed), case.batches(2, device, seed)
    run = contender(name, case)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(model, batches, lambda: None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak / 2**20


def in_subprocess(script: str, option: str, name: str, *options: str) -> Any:
    """The JSON that ``script option name`` prints last, in a process of its own; None, said in a line, if it fails."""
    command = [sys.executable, script, option, name, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own scripts
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  {option} {name}: not measured ({reason})", flush=True)
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])
