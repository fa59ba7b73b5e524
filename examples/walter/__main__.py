"""Reproduces Walter, Stutz and Schiele: the rows of Table 2, Figures 1 to 3, and the remarks of the text.

    python -m examples.walter all --data DIR             train and evaluate every row, print the table, draw the figures
    python -m examples.walter train ROW                  one row, after those that it starts from
    python -m examples.walter evaluate ROW               one row that is trained
    python -m examples.walter table | figures | check    from what is finished
    python -m examples.walter choose ROW                 compare settings on left-out training images

In the root of the repository. Whatever is finished is kept, and what was interrupted goes on where it was, to the epoch
at least. Exit code 0: well, or stopped at the budget; 1: a check fails; 2: one line says what is wrong; 3: no check
fails, and some wait for results.
"""

from __future__ import annotations

import argparse
import sys

from examples.common import cli, data
from examples.common.files import Folder, Problem, write
from examples.walter import checks, choosing, evaluating, figures, planning, tables, training
from examples.walter.results import Results
from examples.walter.rows import CHOICES, ROWS, needed
from examples.walter.scales import FULL, QUICK


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    made = cli.parser("walter", __doc__, COMMANDS, f"for train, evaluate and choose: {', '.join(ROWS)}")
    args = cli.parsed(made, argv, {"train": ROWS, "evaluate": ROWS, "choose": CHOICES})
    args.scale = QUICK if args.quick else FULL
    return args


def context(args: argparse.Namespace, began: float) -> training.Context:
    """What the arguments say."""
    return training.Context(
        folder=Folder(args.out, args.width, args.seed),
        read=lambda: data.read(None if args.quick else args.data),
        scale=args.scale,
        device=args.device,
        deadline=None if args.budget is None else began + 60 * args.budget,
        bars=sys.stderr.isatty(),
    )


def results(args: argparse.Namespace) -> Results:
    """What is finished; :class:`Problem` where nothing is."""
    folder = Folder(args.out, args.width, args.seed)
    if not folder.path.is_dir():
        raise Problem(f"there are no results in {folder.path}")
    return Results(folder, args.scale)


def train(args: argparse.Namespace, began: float) -> int:
    now = context(args, began)
    for key in needed([args.row]):
        if not training.train(now, key):
            return stopped(key)
        print(f"{key}: trained, {now.folder.record(key, 'train')}", flush=True)
    return 0


def evaluate(args: argparse.Namespace, began: float) -> int:
    now = context(args, began)
    if not evaluating.evaluate_row(now, args.row):
        return stopped(args.row)
    print(f"{args.row}: {short(now, args.row)}, {now.folder.record(args.row, 'evaluate')}")
    return 0


def everything(args: argparse.Namespace, began: float) -> int:
    now = context(args, began)
    diverged: dict[str, evaluating.Diverged] = {}
    for number, key in enumerate(ROWS, start=1):
        print(f"[{number} of {len(ROWS)}] {ROWS[key].name}; {planning.remaining(now)}", flush=True)
        if without := diverged.keys() & set(needed([key])):
            print(f"    left out: {', '.join(sorted(without))} has diverged", flush=True)
            continue
        try:
            if not (training.train(now, key) and evaluating.evaluate_row(now, key)):
                return stopped(key)
        except evaluating.Diverged as problem:
            diverged[key] = problem
            print(f"    {problem}", flush=True)
            continue
        print(f"    {short(now, key)}", flush=True)
    table(args, began)
    if all(now.results.evaluation(key) is not None for key in figures.SHOWN):
        draw(args, began)
    if diverged:
        raise next(iter(diverged.values()))
    return 0


def stopped(key: str) -> int:
    print(f"stopped at the budget in {key}; the same command goes on from there")
    return 0


def short(now: training.Context, key: str) -> str:
    """The errors of a row."""
    record = now.results.evaluated(key)
    count = max(now.scale.clean)
    robust = record["autoattack"]
    return (
        f"clean error {record['clean_error'][str(count)]:.2f}% of {count:,}, AutoAttack "
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
    made, pending = checks.checks(results(args))
    print("\n".join([*map(str, made), *pending]))
    if not all(one.holds for one in made):
        return 1
    return 3 if pending else 0


def choose(args: argparse.Namespace, began: float) -> int:
    now = context(args, began)
    start = ROWS[args.row].start
    for key in [] if start is None else needed([start]):
        if not training.train(now, key):
            return stopped(key)
    text, whole = choosing.choose(now, args.row)
    print(text)
    return 0 if whole else stopped(args.row)


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
    return cli.run("walter", COMMANDS, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
