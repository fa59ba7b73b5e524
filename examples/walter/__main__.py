"""Reproduces Walter, Stutz and Schiele: the rows of Table 2, Figures 1 to 3, and the remarks of the text.

    python -m examples.walter all --data DIR             train and evaluate every row, print the table, draw the figures
    python -m examples.walter train ROW | evaluate ROW   one row, after those that it starts from
    python -m examples.walter table | figures | check    from what is finished
    python -m examples.walter choose ROW                 compare settings on left-out training images

Whatever is finished is kept, and what was interrupted goes on where it was, to the epoch at least.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from bnsurgery import MissingExtraError
from examples.walter import checks, choosing, data, evaluating, figures, planning, tables, training
from examples.walter.files import Folder, Problem, read_json, write
from examples.walter.results import Results
from examples.walter.rows import CHOICES, ROWS, needed


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        raise Problem(message)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="walter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("row", nargs="?", help=f"for train and evaluate: {', '.join(ROWS)}")
    parser.add_argument("--data", type=Path, default=Path("runs/cifar10"), help="CIFAR-10; downloaded to a new folder")
    parser.add_argument("--out", type=Path, help="where results go (runs/walter)")
    parser.add_argument("--width", type=positive, help="base width of the ResNet-20; the paper's is 64 (16)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--budget", type=minutes, help="stop after so many minutes; the same command then goes on")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument("--quick", action="store_true", help="a few images of the shipped sample, to see that it runs")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/walter-quick" if args.quick else "runs/walter")
    args.width = args.width or (8 if args.quick else 16)
    if args.command in ("train", "evaluate", "choose"):
        known = CHOICES if args.command == "choose" else ROWS
        if args.row not in known:
            given = "no row given" if args.row is None else f"unknown row {args.row!r}"
            raise Problem(f"{given}: {args.command} takes one of {', '.join(known)}")
    elif args.row is not None:
        raise Problem(f"{args.command} takes no row, got {args.row!r}")
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return value


def device(text: str) -> torch.device:
    try:
        chosen = torch.device(text)
        torch.ones(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not available here: {reason}") from None
    return chosen


def session(args: argparse.Namespace, began: float) -> training.Session:
    """What the arguments say, with the images read."""
    return training.Session(
        folder=Folder(args.out, args.width, args.seed),
        images=data.read(None if args.quick else args.data),
        scale=training.QUICK if args.quick else training.FULL,
        device=args.device,
        deadline=None if args.budget is None else began + 60 * args.budget,
        progress=sys.stderr.isatty(),
    )


def train(args: argparse.Namespace, began: float) -> int:
    now = session(args, began)
    for key in needed([args.row]):
        if not training.train(now, key):
            return stopped(key)
        print(f"{key}: trained, {now.folder.record(key, 'train')}", flush=True)
    return 0


def evaluate(args: argparse.Namespace, began: float) -> int:
    now = session(args, began)
    if not evaluating.evaluate_row(now, args.row):
        return stopped(args.row)
    path = now.folder.record(args.row, "evaluate")
    print(f"{args.row}: {short(read_json(path))}, {path}")
    return 0


def everything(args: argparse.Namespace, began: float) -> int:
    now = session(args, began)
    for number, key in enumerate(ROWS, start=1):
        print(f"[{number} of {len(ROWS)}] {ROWS[key].name}; {planning.remaining(now)}", flush=True)
        if not (training.train(now, key) and evaluating.evaluate_row(now, key)):
            return stopped(key)
        print(f"    {short(read_json(now.folder.record(key, 'evaluate')))}", flush=True)
    return table(args, began) or draw(args, began)


def stopped(key: str) -> int:
    print(f"stopped at the budget in {key}; the same command goes on from there")
    return 0


def short(record: dict[str, Any]) -> str:
    count = max(record["clean_error"], key=int)
    robust = record["autoattack"]
    return (
        f"clean error {record['clean_error'][count]:.2f}% of {int(count):,}, AutoAttack "
        f"{robust['robust_error']:.1f} ± {robust['standard_error']:.1f}% of {robust['examples']:,}"
    )


def table(args: argparse.Namespace, began: float) -> int:  # noqa: ARG001 - as all commands
    found = results(args)
    text = tables.everything(found)
    write(found.folder.path / "table.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    print(text)
    return 0


def draw(args: argparse.Namespace, began: float) -> int:  # noqa: ARG001
    for path in figures.draw(results(args)):
        print(f"wrote {path}")
    return 0


def check(args: argparse.Namespace, began: float) -> int:  # noqa: ARG001
    found = results(args)
    made = [*checks.checks(found), checks.settled(found)]
    print("\n".join(map(str, made)))
    return 0 if all(one.holds for one in made) else 1


def results(args: argparse.Namespace) -> Results:
    """What is finished; :class:`Problem` where nothing is."""
    folder = Folder(args.out, args.width, args.seed)
    if not folder.path.is_dir():
        raise Problem(f"there are no results in {folder.path}")
    return Results(folder)


def choose(args: argparse.Namespace, began: float) -> int:
    print(choosing.choose(session(args, began), args.row))
    return 0


COMMANDS = {
    "all": everything,
    "train": train,
    "evaluate": evaluate,
    "table": table,
    "figures": draw,
    "check": check,
    "choose": choose,
}


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    try:
        args = arguments(argv)
        return COMMANDS[args.command](args, began)
    except (Problem, MissingExtraError) as problem:
        print(f"walter: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("walter: interrupted; the same command goes on from the last epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
