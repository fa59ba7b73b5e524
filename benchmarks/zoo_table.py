"""The zoo's result file as Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tables import made_with, table


def zoo(record: Mapping[str, Any]) -> str:
    """Counts, a table for each library, and why an operation is refused or a BN layer is not fused."""
    found = record["architectures"]
    operations = list(dict.fromkeys(name for own in found.values() for name in own["operations"]))
    counts: dict[str, Counter[str]] = {name: Counter() for name in operations}
    reasons: dict[str, int] = {}
    sections = []
    for library in dict.fromkeys(name.partition("/")[0] for name in found):
        rows = []
        for name, own in found.items():
            if name.partition("/")[0] != library:
                continue
            cells = []
            for operation in operations:
                entry = own["operations"].get(operation)
                if entry is None:
                    cells.append("")
                    continue
                counts[operation][entry["verdict"]] += 1
                cells.append(_cell(operation, entry, reasons))
            size = " x ".join(map(str, own.get("input", [])))
            rows.append([name.partition("/")[2], own.get("family", ""), size, str(own.get("bn_layers", "")), *cells])
        head = ("architecture", "family", "input", "BN layers", *operations)
        sections.append(f"**{library}**: {len(rows)} architectures\n\n{table(head, rows)}")
    total = [[name, *(str(counts[name][verdict]) for verdict in ("right", "refused", "wrong"))] for name in operations]
    listed = "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    return (
        f"{table(('operation', 'right', 'refused', 'wrong'), total)}\n"
        "Below, `+` is right; of fusing, how many of the BN layers were fused, each other one with a reason in the "
        "result file; a number is that of the reason why the operation was refused; an empty cell was not tried (the "
        "exact estimator passes once for each layer).\n\n" + "\n".join(sections) + f"\n**Refused**\n\n{listed}"
        f"{made_with(record['environment'])}\nSeed {record['seed']}.\n"
    )


def _cell(operation: str, entry: Mapping[str, str], reasons: dict[str, int]) -> str:
    if entry["verdict"] == "wrong":
        return "**wrong**"
    if entry["verdict"] == "refused":
        return str(reasons.setdefault(_general(entry["note"]), len(reasons) + 1))
    return entry["note"].partition(";")[0].replace(" of ", "/") if operation.startswith("fuse") else "+"


def _general(note: str) -> str:
    """A reason without the names of layers and models, so that it is listed once."""
    note = re.sub(r"'[\w.]+' \((\w+)\)", r"a layer (\1)", note)
    note = re.sub(r"FusionError: \w+ cannot", "FusionError: the model cannot", note)
    note = re.sub(r"a relative error of [\d.e+-]+", "a large relative error", note)
    note = re.sub(r"torch\.Size\(\[[\d, ]+\]\)", "(N, C, 1, 1)", note)
    note = re.sub(r"\(N, \d+, \.\.\.\)", "(N, C, ...)", re.sub(r"got \(\d+, \d+\)", "got (N, C)", note))
    return re.sub(r"\(\d[\d, ]*,? classes\)", "(N, classes)", note)
