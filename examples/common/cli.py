"""The command line of a reproduction: arguments, and what is wrong in one line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch

from examples.common.files import Problem
from examples import several
from examples.machine import device


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        raise Problem(message)


Command = Callable[[argparse.Namespace, float], int]
"""The arguments and when the program began, in ``time.monotonic()``'s seconds, to an exit code."""


def parser(program: str, description: str | None, commands: Mapping[str, Command], rows: str) -> Parser:
    """A parser for what all reproductions take."""
    made = Parser(prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("command", choices=list(commands))
    made.add_argument("row", nargs="?", help=rows)
    made.add_argument("--data", type=Path, default=Path("runs/cifar10"), help="CIFAR-10; downloaded to a new folder")
    made.add_argument("--out", type=Path, help=f"where results go (runs/{program})")
    made.add_argument("--width", type=width, help="base width of the networks (16)")
    made.add_argument("--seed", type=seed, default=0, help="(0)")
    made.add_argument("--budget", type=minutes, help="stop after so many minutes; the same command then goes on")
    made.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ... (cpu)")
    made.add_argument("--quick", action="store_true", help="a few images of the shipped sample, to see that it runs")
    return made


def parsed(
    made: Parser, argv: list[str] | None, rows: Mapping[str, Mapping[str, object]], *, quick_width: int = 8
) -> argparse.Namespace:
    """The arguments; ``rows`` says which rows each command takes that takes any.

    Raises:
        Problem: one is wrong.
    """
    args = made.parse_args(argv)
    args.out = args.out or Path(f"runs/{made.prog}-quick" if args.quick else f"runs/{made.prog}")
    args.width = args.width or (quick_width if args.quick else 16)
    known = rows.get(args.command)
    if known is None and args.row is not None:
        raise Problem(f"{args.command} takes no row, got {args.row!r}")
    if known is not None and args.row not in known:
        given = "no row given" if args.row is None else f"unknown row {args.row!r}"
        raise Problem(f"{given}: {args.command} takes one of {', '.join(known)}")
    return args


def whole(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
    return int(text)


def width(text: str) -> int:
    return whole(text, 1, 1024)


def seed(text: str) -> int:
    return whole(text, 0, 2**32 - 1)


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return value


def run(
    program: str,
    commands: Mapping[str, Command],
    arguments: Callable[[list[str] | None], argparse.Namespace],
    argv: list[str] | None,
) -> int:
    """Runs a command, and returns the exit code: 2, with one line, where something is wrong."""
    began = time.monotonic()
    try:
        args = arguments(argv)
        with several.joined(args.device) as args.device:
            return commands[args.command](args, began)
    except Problem as problem:
        said = str(problem)
    except ModuleNotFoundError as error:
        said = f'{error.name} is not installed: pip install -e ".[examples]"'
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: error: {said}", file=sys.stderr)
    return 2
