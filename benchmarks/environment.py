"""What a measurement was made with: command, versions, hardware."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("bnsurgery", "torch", "torchvision", "torchattacks", "pyautoattack", "adversarial-robustness-toolbox")
PACKAGES += ("foolbox", "numpy")


def environment(script: str) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    versions = {package: installed[package] for package in PACKAGES if package in installed}
    versions["python"] = platform.python_version()
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
        "versions": versions,
        "hardware": hardware(),
    }


def hardware() -> str:
    """The processor, and the accelerator where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    text = f"{name}, {torch.get_num_threads()} threads{', ' if extras else ''}{' '.join(extras)}"
    return f"{text}; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text
