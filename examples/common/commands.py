"""The commands that reproductions made of a :class:`examples.common.lab.Lab` have alike."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.common import cli, data, scales
from examples.common.checks import Check, made, markdown
from examples.common.files import Folder, Problem, discard, kept, label, write, write_json
from examples.common.lab import Lab
from examples.common.records import Diverged, finite
from examples.common.work import float32, tune

PENDING = "pending"


@dataclass(frozen=True)
class Paper:
    """A reproduction: its rows, and what is made of their results.

    Attributes:
        lab: the class that does the work.
        description: for ``--help``.
        tables: results to text.
        findings: results to what is to be checked.
        figures: results to figures, by the names of their files.
    """

    lab: type[Lab]
    description: str | None
    tables: Callable[[Lab], str]
    findings: Callable[[Lab], Iterable[tuple[str, Callable[[str], Check]]]]
    figures: Callable[[Lab], dict[str, Any]]

    @property
    def program(self) -> str:
        """Its name."""
        return self.lab.program

    def main(self, argv: list[str] | None = None) -> int:
        """Runs a command; returns the exit code."""
        return cli.run(self.program, self.commands, self.arguments, argv)

    @property
    def commands(self) -> dict[str, cli.Command]:
        """By name."""
        return {
            "all": self.everything,
            "train": self.train,
            "evaluate": self.evaluate,
            "table": self.table,
            "figures": self.draw,
            "check": self.check,
            "choose": self.choose,
        }

    def arguments(self, argv: list[str] | None) -> argparse.Namespace:
        """What the command line says."""
        rows, choices = self.lab.rows, self.lab.choices
        made = cli.parser(self.program, self.description, self.commands, f"one of {', '.join(rows)}")
        if networks := self.lab.networks:
            made.add_argument("--network", choices=networks, default=networks[0], help=f"({networks[0]})")
        args = cli.parsed(made, argv, {"train": rows, "evaluate": self.lab.networks_of(), "choose": choices})
        args.scale = scales.QUICK if args.quick else scales.FULL
        return args

    def opened(self, args: argparse.Namespace, began: float, *, there: bool = False) -> Lab:
        """The lab that the arguments say; where results are to be ``there``, :class:`Problem` if none are."""
        usual = not self.lab.networks or args.network == self.lab.networks[0]
        folder = Folder(args.out, args.width, args.seed, "" if usual else args.network)
        if there and not folder.path.is_dir():
            raise Problem(f"there are no results in {folder.path}")
        return self.lab(
            folder=folder,
            read=lambda: data.read(None if args.quick else args.data),
            scale=args.scale,
            device=args.device,
            deadline=None if args.budget is None else began + 60 * args.budget,
            bars=sys.stderr.isatty(),
        )

    def everything(self, args: argparse.Namespace, began: float) -> int:
        now = self.opened(args, began)
        diverged: dict[str, Problem] = {}
        for number, key in enumerate(now.rows, start=1):
            print(f"[{number} of {len(now.rows)}] {now.rows[key].name}", flush=True)
            if without := diverged.keys() & set(now.needed([key])):
                print(f"    left out: {', '.join(sorted(without))} has diverged", flush=True)
                continue
            try:
                if not (now.make(key) and now.test(key)):
                    return stopped(key)
            except Diverged as problem:
                diverged[key] = problem
                print(f"    {problem}", flush=True)
        self.table(args, began)
        self.draw(args, began)
        if diverged:
            raise next(iter(diverged.values()))
        return 0

    def train(self, args: argparse.Namespace, began: float) -> int:
        now = self.opened(args, began)
        for key in now.needed([args.row]):
            if not now.make(key):
                return stopped(key)
            print(f"{key}: finished", flush=True)
        return 0

    def evaluate(self, args: argparse.Namespace, began: float) -> int:
        now = self.opened(args, began)
        if not now.test(args.row):
            return stopped(args.row)
        print(f"{args.row}: finished")
        return 0

    def table(self, args: argparse.Namespace, began: float) -> int:
        now = self.opened(args, began, there=True)
        text = self.tables(now) + chosen(now)
        write(now.folder.path / "table.md", lambda partial: partial.write_text(text, encoding="utf-8"))
        print(text)
        return 0

    def draw(self, args: argparse.Namespace, began: float) -> int:
        now = self.opened(args, began, there=True)
        for name, figure in self.figures(now).items():
            path: Path = now.folder.path / f"{name}.png"
            write(path, lambda partial, figure=figure: figure.savefig(partial, dpi=200, format="png"))  # type: ignore[misc]
            print(f"wrote {path}")
        return 0

    def check(self, args: argparse.Namespace, began: float) -> int:
        done, pending = made(self.findings(self.opened(args, began, there=True)))
        print("\n".join([*map(str, done), *pending]))
        if not all(one.holds for one in done):
            return 1
        return 3 if pending else 0

    def choose(self, args: argparse.Namespace, began: float) -> int:
        now, longest = self.opened(args, began), 0.0
        with now.folder.locked(f"{args.row}-choose"):
            for settings in now.choices[args.row]:
                record = choice(now, args.row, settings)
                if record is None:
                    record = compared(now, args.row, settings) if now.fits(longest) else None
                if record is None:
                    return stopped(args.row)
                longest = max(longest, record["seconds"])
        print(chosen(now, args.row))
        return 0


def stopped(key: str) -> int:
    print(f"stopped at the budget in {key}; the same command goes on from there")
    return 0


def brief(now: Lab, key: str, settings: dict[str, Any]) -> Any:
    """A row with settings that are compared with others, trained briefly."""
    return replace(now.rows[key], **{"epochs": now.scale.compared_epochs} | settings)


def choice(now: Lab, key: str, settings: Any) -> dict[str, Any] | None:
    """What was found of one of several settings of a row; None where it is not compared yet."""

    def look(record: dict[str, Any]) -> None:
        _ = float(record["seconds"]), dict(record["measures"])

    return kept(
        now.folder.record(f"{key}-{label(settings)}", "choose"), look, now.choice_settings(brief(now, key, settings))
    )


def compared(now: Lab, key: str, settings: Any) -> dict[str, Any] | None:
    """Trains and measures one setting, or goes on with it; None where the budget ends before that."""
    now.worked = True
    row, folder, name = brief(now, key, settings), now.folder, f"{key}-{label(settings)}.choose"
    images = now.images.held_out(now.scale.held_out, now.scale.compared_training)
    checkpoint, log = folder.interim(f"{name}.checkpoint"), folder.interim(f"{name}.calls.json")
    calls = now.note_call(log, goes_on=checkpoint.exists())
    model = now.initial(row)
    epochs = now.scale.epochs(row.epochs)
    run = tune(now, row.name, model, now.batches(row, images), checkpoint, epochs=epochs, **now.options(row))
    if run.ended != "epochs":
        return None
    x, y = images.tests(now.scale.held_out)
    with float32():
        measures = finite(now.measures(row, model, x[-now.scale.measured :], y[-now.scale.measured :]))
    record = {
        "row": row.name,
        "configuration": now.choice_settings(row),
        "loss": run.record()["history"][-1]["loss"],
        "skipped": run.skipped,
        "measures": measures,
        "seconds": round(sum(epoch.seconds for epoch in run.history), 1),
        "history": run.record()["history"],
        "calls": calls,
        **calls[-1],
    }
    write_json(folder.record(f"{key}-{label(settings)}", "choose"), record)
    discard(checkpoint, log)
    return record


def chosen(now: Lab, *keys: str) -> str:
    """A table of settings that were compared; "" where none were."""
    rows = []
    for key in keys or now.choices:
        found = [(settings, choice(now, key, settings)) for settings in now.choices[key]]
        for settings, record in found if any(record is not None for _, record in found) else ():
            values = ", ".join(f"{name} {value}" for name, value in settings.items())
            own = all(getattr(now.rows[key], name) == value for name, value in settings.items() if name != "epochs")
            cells = [PENDING] * 2 if record is None else [_loss(record), _error(record["measures"].get("clean"))]
            rows.append([now.rows[key].name, values, *cells, "yes" if own else ""])
    if not rows:
        return ""
    head = [
        "row",
        "setting",
        "loss in training",
        f"clean error, {now.scale.measured:,} left-out images",
        "as in the row",
    ]
    return f"\n## Settings compared by `choose`\n\n{markdown(head, rows)}"


def _loss(record: dict[str, Any]) -> str:
    loss = record["loss"]
    return "diverged" if loss is None or not math.isfinite(loss) or record["skipped"] else f"{loss:.2f}"


def _error(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}"
