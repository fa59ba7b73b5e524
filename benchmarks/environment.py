"""What a measurement was made with: command, versions, hardware."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from machine import hardware, versions


def environment(script: str) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(),
    }
