"""What a result is made on and with: device, versions, hardware, commit."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist

PACKAGES: tuple[str, ...] = (
    "bnsurgery",
    "torch",
    "torchvision",
    "torchattacks",
    "pyautoattack",
    "adversarial-robustness-toolbox",
    "foolbox",
    "numpy",
)


def versions() -> dict[str, str]:
    """Of the packages that are installed, and of Python."""
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed} | {
        "python": platform.python_version()
    }


def hardware(device: torch.device | None = None) -> str:
    """The processor, and the accelerator: that of ``device``, or by default the one that there is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    processes = f"{world} processes of " if world > 1 else ""
    text = f"{name}, {processes}{torch.get_num_threads()} threads{', ' if extras else ''}{' '.join(extras)}"
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return f"{text}; {torch.cuda.get_device_name(device)}" if cuda else text


def device(text: str) -> torch.device:
    """What ``--device`` says; for :mod:`argparse`, which turns the error into its own message."""
    try:
        chosen = torch.device(text)
        torch.ones(1, device=chosen).item()
    except Exception as error:  # whatever a backend raises
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not available here: {reason}") from None
    return chosen


def commit() -> str | None:
    """The commit that is checked out, ``+`` where code differs from it; outside a repository ``GIT_COMMIT``, if set."""
    root = Path(__file__).parents[1]
    try:
        asked = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603, S607
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "*.py"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
    return asked[0] + ("+" if asked[1] else "")
