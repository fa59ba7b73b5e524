"""The result files as Markdown tables, for the documentation.

    python benchmarks/tables.py [FOLDER]

Reads the JSON files in a folder, writes a table next to each, and, for ``benchmarks/results``, README's table of steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).parents[1] / "README.md"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def made_with(environment: Mapping[str, Any], commands: Sequence[str] = ()) -> str:
    """The line under a table."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment["versions"].items()))
    made = " and ".join(f"`{command}`" for command in dict.fromkeys(commands or [environment["command"]]))
    return f"\n{made} on {environment['hardware']}; {versions}.\n"


def spread(ratio: Mapping[str, float] | None) -> str:
    """A ratio with its range over the rounds."""
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def bounds(found: Mapping[str, Any]) -> str:
    """The sentence of them."""
    own, share = found.get("bounds", {}), found.get("share_of_limit_by_operations")
    text = ""
    if "operations" in own:
        text += (
            f" With nothing but the network's operations, each by itself, the ratio to torchattacks would be "
            f"{own['operations']:.2f}, and the attack would reach {100 * share:.0f}% of the limit."
        )
    if "convolutions" in own:
        text += f" With nothing but its convolutions the ratio would be {own['convolutions']:.2f}."
    return text


def throughput(record: Mapping[str, Any]) -> str:
    """Fine-tuning steps of each model, and the limit."""
    parts = []
    for name, measured in record["models"].items():
        found = measured["summary"]
        rows = []
        for contender, row in found["contenders"].items():
            peak, ratio, tensors = (
                row.get(key) for key in ("peak_mebibytes", "memory_ratio", "peak_mebibytes_of_tensors")
            )
            rows.append(
                [
                    contender,
                    f"{row['images_per_second']:.1f}",
                    spread(row["ratio"]),
                    f"{row['set_up_seconds_cold']:.1f}",
                    "" if peak is None else f"{peak:,.0f}",
                    "" if ratio is None else f"{ratio:.2f}",
                    "" if tensors is None else f"{tensors:,.0f}",
                ]
            )
        case = measured["case"]
        share = f"{found['attack_flop_per_second'] / 1e9:,.0f} of {found['limit_flop_per_second'] / 1e9:,.0f} GFLOP/s"
        head = ("", "images/s", "ratio to torchattacks", "set-up, s", "peak memory, MiB", "ratio", "tensors, MiB")
        parts.append(
            f"**{name}**, batch {case['batch']}, {case['size']} x {case['size']}\n\n{table(head, rows)}\n"
            f"Against the careful loop ({found['careful']}): {spread(found['ratio_to_careful'])}. The attack alone, in "
            f"{measured['precision']}: {share}, {100 * found['share_of_limit']:.0f}% of the limit."
            f"{bounds(found)}\n"
        )
    commands = [own[key] for own in record["models"].values() for key in ("command", "memory_command") if key in own]
    return "\n".join(parts) + made_with(record["environment"], commands)


def in_short(record: Mapping[str, Any]) -> str:
    """README's: a step of each model."""
    rows = []
    for name, measured in record["models"].items():
        found, case = measured["summary"], measured["case"]
        own = found["contenders"]["bnsurgery"]
        size = f"{case['batch']} x {case['size']} x {case['size']}"
        memory = "" if own["memory_ratio"] is None else f"{own['memory_ratio']:.2f}"
        ratios = spread(own["ratio"]), spread(found["ratio_to_careful"])
        single = f"{found['contenders']['bnsurgery float32']['ratio']['median']:.2f}"
        rows.append([name, size, f"{own['images_per_second']:.1f}", ratios[0], single, ratios[1], memory])
    head = (
        "",
        "batch",
        "images/s",
        "times as fast as torchattacks",
        "in float32",
        "as the careful loop",
        "peak memory, of torchattacks'",
    )
    return table(head, rows)


def scaling(record: Mapping[str, Any]) -> str:
    """Time and memory of a step against each factor."""
    parts = []
    for factor, points in record["factors"].items():
        rows = []
        for value, point in points.items():
            peaks = ["" if peak is None else f"{peak:,.0f}" for peak in point["peak_mebibytes"].values()]
            times = [f"{1000 * seconds:,.0f}" for seconds in point["seconds"].values()]
            rows.append([value, *times, spread(point["ratio"]), *peaks])
        names = list(next(iter(points.values()))["seconds"])
        head = (
            factor.replace("_", " "),
            *(f"{name}, ms" for name in names),
            "ratio",
            *(f"{name}, MiB" for name in names),
        )
        parts.append(table(head, rows))
    return "\n".join(parts) + made_with(record["environment"], list(record.get("commands", {}).values()))


def autoattack(record: Mapping[str, Any]) -> str:
    """AutoAttack both ways, and the bounds."""
    rows, inside = [], []
    for name, own in record["networks"].items():
        seconds, robust, bounds = own["seconds"], own["robust"], own["bounds"]
        times = [f"{seconds[which]:.1f}" for which in ("bnsurgery", "by hand")]
        found = f"{robust['bnsurgery']}, {robust['by hand']}"
        both = (f"{bounds[which]:.2f}" for which in ("bnsurgery", "by hand"))
        rows.append([name, str(own["examples"]), *times, f"{own['ratio']:.2f}", *both, found])
        for which in ("by hand", "bnsurgery"):
            spent = (f"{own[kind][which]:.1f}" for kind in ("passes_seconds", "convolutions_seconds"))
            inside.append([f"{name}, {which}", *spent])
    head = (
        "AutoAttack",
        "examples",
        "`evaluate`, s",
        "by hand, s",
        "ratio",
        "bound of the ratio",
        "bound with as many passes as by hand",
        "robust examples, both",
    )
    heads = ("passes through the network", "all, s", "their convolutions alone, s")
    return table(head, rows) + "\n" + table(heads, inside) + made_with(record["environment"])


def overheads(record: Mapping[str, Any]) -> str:
    """What BN operations cost."""
    names = list(record["milliseconds"])
    operations = dict.fromkeys(which for own in record["milliseconds"].values() for which in own)
    rows = []
    for which in operations:
        found = [record["milliseconds"][name].get(which) for name in names]
        cells = ["" if own is None else f"{own['median']:.2f} ({own['min']:.2f} to {own['max']:.2f})" for own in found]
        rows.append([which, *cells])
    return table(["milliseconds", *names], rows) + made_with(record["environment"])


def mixture(record: Mapping[str, Any]) -> str:
    """A step through mixture BN, each way."""
    names = list(record["models"])
    rows = []
    for which in next(iter(record["models"].values()))["contenders"]:
        cells = []
        for name in names:
            own = record["models"][name]["contenders"][which]
            cells += [f"{own['images_per_second']:.1f}", spread(own["ratio"]), spread(own["set_up_seconds"])]
        rows.append([which, *cells])
    head = [cell for name in names for cell in (f"{name}, images/s", "ratio", "set-up, s")]
    commands = [own["command"] for own in record["models"].values()]
    return table(["", *head], rows) + made_with(record["environment"], commands)


def precision(record: Mapping[str, Any]) -> str:
    """What fine-tuning ends with in both precisions."""
    rows = [
        [
            run["precision"],
            str(run["seed"]),
            f"{run['clean_error']:.2f}",
            f"{run['robust_error']:.2f}",
        ]
        for run in sorted(record["runs"], key=lambda run: (run["precision"], run["seed"]))
    ]
    text = table(("precision", "seed", "clean error, %", "robust error (PGD-20), %"), rows)
    lines = []
    for figure, own in record.get("summary", {}).items():
        mean, error = own["mean"], own["standard_error"]
        lines.append(
            [
                figure.replace("_", " "),
                *(f"{mean[which]:.2f} ± {error[which]:.2f}" for which in ("auto", "float32")),
                f"{own['difference']:+.2f}",
            ]
        )
    if lines:
        text += "\n" + table(("mean ± standard error of the mean", "auto", "float32", "difference"), lines)
    return text + made_with(record["environment"])


FAULTS = {
    "tune": "a fine-tuning run is killed",
    "evaluate": "an evaluation is killed",
    "processes": "of two processes of a fine-tuning run one is killed",
    "full disk": "the disk of a fine-tuning run is full",
}


def faults(record: Mapping[str, Any]) -> str:
    """What came of runs that were killed."""
    rows = []
    for kind, found in record["faults"].items():
        lost, waited = found["most_steps_lost"], found["longest_until_ended"]
        rows.append(
            [
                FAULTS[kind],
                str(found["runs"]),
                str(found["kills"]),
                str(found["in_write"]) if kind in ("tune", "evaluate") else "",
                f"{found['same']} of {found['runs']}",
                str(lost) if kind in ("tune", "processes") else "",
                "" if waited is None else f"{waited:.1f}",
            ]
        )
    head = ("what happens", "runs", "kills", "of these in a write", "identical bits", "steps lost at most")
    return table((*head, "seconds until the other had ended, at most"), rows) + made_with(record["environment"])


def growth(record: Mapping[str, Any]) -> str:
    """Resident sizes over long runs."""
    rows = [
        [name, *(f"{found[key]:.1f}" for key in ("begin", "end", "largest")), f"{found['end'] - found['begin']:+.1f}"]
        for name, found in record["growth"].items()
    ]
    steps = record["steps"]
    what = f"MiB, over {steps:,} steps, {steps // 4:,} calls, or {steps:,} calls that raise"
    head = (what, "half-way", "at the end", "largest since half-way", "growth")
    return table(head, rows) + made_with(record["environment"])


def zoo(record: Mapping[str, Any]) -> str:
    """What came of each operation on each architecture."""
    import zoo_table  # it needs this module

    return zoo_table.zoo(record)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "throughput": throughput,
    "scaling": scaling,
    "autoattack": autoattack,
    "overheads": overheads,
    "mixture": mixture,
    "precision": precision,
    "faults": faults,
    "growth": growth,
    "zoo": zoo,
}
"""By the name of the result file."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="default: benchmarks/results")
    folder = parser.parse_args().folder
    for name, render in TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            text = render(json.loads(path.read_text(encoding="utf-8")))
            path.with_suffix(".md").write_text(text, encoding="utf-8")
            print(f"wrote {path.with_suffix('.md')}")
    path = folder / "throughput.json"
    if path.exists() and folder.resolve() == RESULTS:
        begin, end = "<!-- steps -->\n", "<!-- end of steps -->"
        before, rest = README.read_text(encoding="utf-8").split(begin)
        _, after = rest.split(end)
        steps = in_short(json.loads(path.read_text(encoding="utf-8")))
        README.write_text(f"{before}{begin}{steps}{end}{after}", encoding="utf-8")
        print("wrote README's table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
