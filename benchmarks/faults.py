"""Runs that are killed, and what comes of them when they go on.

    python benchmarks/faults.py

Each of these is done over and over, and what comes of it in the end is compared, bit for bit, with what comes of a run
that nothing happens to:

- ``tune``: a fine-tuning run is killed (SIGKILL) at a random moment, in every third case in the middle of a
  checkpoint's write; up to three times, until it is let go on to its end.
- ``evaluate``: an evaluation likewise.
- ``processes``: of two processes of one fine-tuning run one is killed; the other must end by itself.
- ``full disk``: the disk that the checkpoints are on is filled at a random moment; then the run is killed, and room
  made again; or it comes to its end first. The disk is a small tmpfs, which only root can mount.
"""

from __future__ import annotations

import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faulty import PLACES
from measuring import SEED, opened, parsed, parser_of

WORKER = str(Path(__file__).parent / "faulty.py")
COUNTS = {"tune": 50, "evaluate": 20, "processes": 10, "full disk": 10}
LONGEST = 300.0
"""Seconds after which a process counts as hanging."""


class Process:
    """A worker, and what it has printed."""

    def __init__(
        self, kind: str, folder: Path, *, stop: tuple[int, str] | None = None, rank: Mapping[str, str] = {}
    ) -> None:
        options = [] if stop is None else ["--stop-in-write", str(stop[0]), stop[1]]
        self._process = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, WORKER, kind, str(folder), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **rank},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.steps: list[int] = []
        self.hash: str | None = None
        self._said: list[str] = []
        for stream, take in ((self._process.stdout, self._printed), (self._process.stderr, self._said.append)):
            threading.Thread(
                target=lambda stream=stream, take=take: [take(line) for line in stream], daemon=True
            ).start()

    def _printed(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if word == "step":
            self.steps.append(int(rest))
        if word == "hash":
            self.hash = rest
        self._lines.put(line.strip())

    def until(self, text: str) -> bool:
        """Waits for a line; False where the process ends before it."""
        end = time.monotonic() + LONGEST
        while time.monotonic() < end:
            if self._lines.empty():
                if self.ended and self._lines.empty():
                    return False
                time.sleep(0.01)
            elif self._lines.get() == text:
                return True
        raise TimeoutError(f"waited for {text!r}")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        time.sleep(0.05)

    def end(self) -> int:
        """Waits for its end, and returns its exit code."""
        code = self._process.wait(timeout=LONGEST)
        time.sleep(0.1)
        return code

    @property
    def said(self) -> str:
        """What it wrote to standard error."""
        return "".join(self._said)

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None


@dataclass
class Outcome:
    """What came of one run.

    Attributes:
        same: the same bits as without faults.
        kills: so many times it was killed.
        in_write: so many of these in the middle of a checkpoint's write.
        lost: for each, the steps that were done and had to be done again.
        seconds: for each process that lost another, until it had ended.
        said: it ended with the error that says so.
    """

    same: bool = False
    kills: int = 0
    in_write: int = 0
    lost: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    said: bool = True


def whole(kind: str, folder: Path) -> tuple[str, float]:
    """The hash of a run that nothing happens to, and the seconds that its work took."""
    process = Process(kind, folder)
    process.until("begins")
    began = time.monotonic()
    code = process.end()
    if code or process.hash is None:
        raise RuntimeError(f"{kind} failed without a fault: {process.said}")
    return process.hash, time.monotonic() - began


def killed(kind: str, folder: Path, expected: str, seconds: float, *, in_write: bool, draw: random.Random) -> Outcome:
    """A run that is killed one to three times, and then let go on."""
    outcome = Outcome()
    done = -1
    for number in range(draw.randint(1, 3)):
        stop = (draw.randint(1, 12), draw.choice(PLACES)) if in_write and number == 0 else None
        process = Process(kind, folder, stop=stop)
        if stop is not None:
            caught = process.until("in the write")
            outcome.in_write += caught
        else:
            process.until("begins")
            time.sleep(draw.uniform(0, seconds))
            caught = not process.ended
        process.kill()
        if number == 0 and not caught:  # it was quicker: another one, so that each run is killed
            return killed(kind, _another(folder), expected, seconds, in_write=in_write, draw=draw)
        outcome.kills += caught
        outcome.lost += _lost(kind, done, process.steps)
        done = max([done, *process.steps])
    process = Process(kind, folder)
    code = process.end()
    outcome.lost += _lost(kind, done, process.steps)
    outcome.same = code == 0 and process.hash == expected
    if not outcome.same:
        print(process.said)
    return outcome


def _another(folder: Path) -> Path:
    """An empty folder beside this one."""
    return Path(tempfile.mkdtemp(dir=folder.parent))


def _lost(kind: str, done: int, steps: list[int]) -> list[int]:
    """Of a run that goes on: the steps behind it that it does again."""
    return [max(0, done + 1 - steps[0])] if kind == "tune" and done >= 0 and steps else []


def pair(folder: Path, stop: tuple[int, str] | None = None) -> list[Process]:
    """Two processes of one run."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        Process("tune", folder, rank={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stop=stop)
        for rank in range(2)
    ]


def whole_pair(folder: Path) -> tuple[list[str | None], float]:
    """The hashes of two processes that nothing happens to, and the seconds that their work took."""
    both = pair(folder)
    both[0].until("begins")
    began = time.monotonic()
    codes = [process.end() for process in both]
    if any(codes):
        raise RuntimeError(f"two processes failed without a fault: {both[0].said}")
    return [process.hash for process in both], time.monotonic() - began


def one_killed(folder: Path, expected: list[str | None], seconds: float, draw: random.Random) -> Outcome:
    """Two processes of which one is killed; then both are started again."""
    outcome, both = Outcome(), pair(folder)
    for process in both:
        process.until("begins")
    time.sleep(draw.uniform(0, 0.8 * seconds))
    victim = draw.randrange(2)
    if any(process.ended for process in both):
        return one_killed(_another(folder), expected, seconds, draw)
    both[victim].kill()
    outcome.kills = 1
    began = time.monotonic()
    both[1 - victim].end()
    outcome.seconds.append(time.monotonic() - began)
    outcome.said = "LostProcessError" in both[1 - victim].said
    done = max([-1, *both[0].steps, *both[1].steps])
    again = pair(folder)
    codes = [process.end() for process in again]
    outcome.lost = _lost("tune", done, again[0].steps)
    outcome.same = codes == [0, 0] and [process.hash for process in again] == expected
    if not outcome.same:
        print(again[0].said)
    return outcome


@contextmanager
def small_disk() -> Iterator[tuple[Path, str]]:
    """A folder on a disk of one megabyte, and what kind of disk it is."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "disk"
        folder.mkdir()
        mount, unmount = shutil.which("mount"), shutil.which("umount")
        command = [mount or "", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:  # noqa: S603
            raise OSError("a tmpfs cannot be mounted here: run this as root")
        try:
            yield folder, "tmpfs of 1 MiB"
        finally:
            subprocess.run([unmount or "", str(folder)], check=False)  # noqa: S603


def disk_filled(expected: str, seconds: float, draw: random.Random) -> Outcome:
    """A run whose disk is filled, that is killed or comes to its end, and goes on when there is room."""
    outcome = Outcome()
    with small_disk() as (folder, _):
        process = Process("tune", folder)
        process.until("step 0")  # a disk that is full from the beginning is an error, before any work
        time.sleep(draw.uniform(0, 0.5) * seconds)
        filler = folder / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0.1, 0.4) * seconds)
            outcome.kills = int(not process.ended)
            process.kill()
            ended_well = True
        else:  # it comes to its end without a checkpoint of that
            ended_well = process.end() == 0 and process.hash == expected
        filler.unlink()
        again = Process("tune", folder)
        code = again.end()
        outcome.lost = _lost("tune", max([-1, *process.steps]), again.steps)
        outcome.same = code == 0 and again.hash == expected and ended_well
        if not outcome.same:
            print(process.said, again.said)
    return outcome


def main() -> int:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=COUNTS, nargs="+", default=list(COUNTS))
    args = parsed(parser, "faults")
    record, write = opened(args, __file__, {"faults": {}})
    for kind in args.only:
        count = 1 if args.quick else COUNTS[kind]
        outcomes: list[Outcome] = []
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent)
            expected_pair: list[str | None] = []
            expected = ""
            (folder / "whole").mkdir()
            if kind == "processes":
                expected_pair, seconds = whole_pair(folder / "whole")
            else:
                expected, seconds = whole("evaluate" if kind == "evaluate" else "tune", folder / "whole")
            for number in range(count):
                draw = random.Random(f"{SEED} {kind} {number}")  # noqa: S311 - moments, not secrets
                own = folder / str(number)
                own.mkdir()
                if kind == "processes":
                    outcome = one_killed(own, expected_pair, seconds, draw)
                elif kind == "full disk":
                    outcome = disk_filled(expected, seconds, draw)
                else:
                    outcome = killed(kind, own, expected, seconds, in_write=number % 3 == 0, draw=draw)
                outcomes.append(outcome)
                print(f"{kind} {number + 1} of {count}: {outcome}", flush=True)
        record["faults"][kind] = summary(outcomes)
        write()
    wrong = sum(found["runs"] - found["same"] for found in record["faults"].values())
    return 1 if wrong else 0


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts over the runs, and the largest of what was lost."""
    lost = [steps for outcome in outcomes for steps in outcome.lost]
    seconds = [value for outcome in outcomes for value in outcome.seconds]
    return {
        "runs": len(outcomes),
        "same": sum(outcome.same and outcome.said for outcome in outcomes),
        "kills": sum(outcome.kills for outcome in outcomes),
        "in_write": sum(outcome.in_write for outcome in outcomes),
        "most_steps_lost": max(lost) if lost else None,
        "longest_until_ended": round(max(seconds), 1) if seconds else None,
    }


if __name__ == "__main__":
    sys.exit(main())
