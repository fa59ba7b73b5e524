"""One of several processes of test_processes: works on a run with the others, and writes what came of it.

Started by torchrun's environment: ``python together.py JOB OUT [FOLDER]``; each process writes ``OUT.RANK``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bnsurgery import (
    PGD,
    BNSurgeryError,
    CheckpointError,
    NonFiniteError,
    Processes,
    adv_finetune,
    bn_layers,
    evaluate,
    processes,
    recalibrate_bn,
    split_bn,
)
from networks import SHARED, SMALL

DTYPE = torch.float64
ATTACK = PGD(8 / 255, 2, 4 / 255)
BATCHES = (12, 9, 16, 5)
"""Of sizes that two and four processes cannot always share evenly; the last is too small for four."""


def batches(dtype: torch.dtype = DTYPE) -> list[tuple[Tensor, Tensor]]:
    count = sum(BATCHES)
    return list(zip(SMALL.example(count, dtype).split(BATCHES), SMALL.labels(count).split(BATCHES), strict=True))


def network(kind: str = "small", dtype: torch.dtype = DTYPE) -> nn.Module:
    if kind == "dense":  # BN over examples alone: one value per channel and example
        torch.manual_seed(3)
        layers = [nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)]
        return nn.Sequential(*layers).to(dtype)
    return {"small": SMALL, "shared": SHARED}[kind].build(dtype)


def tuned(model: nn.Module, **options: Any) -> dict[str, Any]:
    chosen = {"epochs": 2, "attack": ATTACK, "schedule": "cosine", "progress": False, **options}
    data = chosen.pop("data", None) or batches(next(model.parameters()).dtype)
    run = adv_finetune(model, data, **chosen)
    record = run.record()
    for epoch in record["history"]:
        epoch.pop("seconds")
    return {"state": dict(model.state_dict()), "record": record}


def once(marker: Path) -> bool:
    """Whether this has not been asked before."""
    if marker.exists():
        return False
    marker.touch()
    return True


def refusal(task: Callable[[], object]) -> str:
    try:
        task()
    except (ValueError, OSError, CheckpointError) as error:
        return str(error)
    return "none"


JOBS: dict[str, Callable[[Processes, Path], Any]] = {}


def job(function: Callable[[Processes, Path], Any]) -> Callable[[Processes, Path], Any]:
    JOBS[function.__name__] = function
    return function


class Recomputed(nn.Module):
    """A network whose BN layer is passed once more in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.reentrant = reentrant
        self.to(DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        z = checkpoint(lambda z: self.norm(z).relu(), self.first(x.flatten(1)), use_reentrant=self.reentrant)
        return self.last(z)


@job
def whole(_: Processes, __: Path) -> Any:
    """What is the same as in one process, by mathematics."""
    found = {}
    for train, kind in (
        ("bn", "small"),
        ("bn-params", "shared"),
        ("bn-stats", "dense"),
        ("all", "dense"),
        ("all", "shared"),
    ):
        found[train, kind] = tuned(network(kind), train=train, sync="batch")
    found["frozen statistics"] = tuned(network(), train="bn-params", sync="buffers")
    found["clean"] = tuned(network(), train="all", sync="batch", attack=None)
    found["mixed"] = tuned(network("dense"), train="all", sync="batch", clean_fraction=0.3)
    found["branches"] = tuned(split_bn(network()), train="all", sync="batch", clean_fraction=0.5)
    found["consistent"] = tuned(network(), train="all", sync="batch", consistent_bn_after=1)
    found["recomputed"] = tuned(Recomputed(reentrant=False), train="all", sync="batch")
    found["reentrant"] = tuned(Recomputed(reentrant=True), train="all", sync="batch", attack=None)  # takes none
    found["L2"] = tuned(network(), sync="batch", attack=PGD(0.5, 2, 0.3, norm="l2", best=True))
    found["normalised"] = tuned(
        network(), sync="batch", attack=PGD(0.03, 2, 0.02, bounds=(0.0, 2.0), mean=[0.5] * 3, std=[0.5] * 3)
    )
    found["float32"] = tuned(network(dtype=torch.float32), train="all", sync="batch", precision="float32")
    found["Adam"] = tuned(network(), sync="batch", optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3))
    return found


@job
def shares(own: Processes, _: Path) -> Any:
    """What is another thing than in one process, and the same in all."""
    found = {sync: tuned(network("dense"), train="bn", sync=sync) for sync in ("buffers", "none")}
    data = TensorDataset(SMALL.example(40, DTYPE), SMALL.labels(40))
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=5))
    found["sampler"] = tuned(network(), data=loader, epochs=1)
    mine = (
        SMALL.example(8 * own.world, DTYPE)[own.rank :: own.world],
        SMALL.labels(8 * own.world)[own.rank :: own.world],
    )
    found["own"] = tuned(network(), data=[mine], epochs=1, shard="none", attack=None, train="bn-params")
    wrapped = nn.parallel.DistributedDataParallel(network())
    run = adv_finetune(wrapped, [mine], epochs=1, train="bn-params", attack=None, progress=False)
    found["wrapped"] = {"state": dict(wrapped.module.state_dict()), "record": run.steps}
    torch.manual_seed(own.rank)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.BatchNorm1d(10))
    found["other weights"] = tuned(model, data=batches(torch.float32))
    statistics = network()
    recalibrate_bn(statistics, [x[own.rank :: own.world] for x, _ in batches()[:3]])
    found["recalibrated"] = {name: layer.running_var for name, layer in bn_layers(statistics).items()}
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10), nn.BatchNorm1d(10)).to(DTYPE)
    masks = []
    dropping[1].register_forward_hook(lambda _, __, out: masks.append((out != 0).sum().item()))
    tuned(dropping, attack=None, epochs=1)
    found["masks"] = masks
    at_epoch = [lambda record, _: own.rank == 1 and record.epoch == 0]
    found["ended"] = tuned(network(), callbacks=at_epoch)["record"]["ended"], len(BATCHES)
    steps: list[int] = []

    def at_step(record: Any, _: nn.Module) -> bool:
        steps.append(record.step)
        return own.rank == 1 and record.step == 2

    # Callbacks of one process alone, and not of the others.
    alone = {"callbacks": at_epoch, "on_step": at_step} if own.rank == 1 else {}
    found["ended by one"] = tuned(network(), **alone)["record"]["ended"]
    steps.clear()
    found["ended at a step"] = tuned(network(), on_step=at_step)["record"]["ended"], steps
    return found


@job
def one_batch(_: Processes, __: Path) -> Any:
    return tuned(network("dense"), data=batches()[:1], epochs=1, attack=None, train="bn-stats")


@job
def evaluated(own: Processes, folder: Path) -> Any:
    x, model = SMALL.example(30), SMALL.build().eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 10
    attacks = ["pgd-2", "apgd-ce", lambda model, x, y: (x + 0.15 * torch.randn_like(x).sign()).clamp(0, 1), "pgd-1"]
    options = {"eps": 0.15, "batch_size": 4, "progress": False}
    result = evaluate(model, (x, y), attacks=attacks, keep_adversarial=True, checkpoint=folder / "e", **options)
    again = evaluate(model, (x, y), attacks=attacks, keep_adversarial=True, checkpoint=folder / "e", **options)
    rows = [{**row, "seconds": 0} for row in result.record()["rows"]]
    assert again.rows == result.rows
    return {"rows": rows, "robust": result.robust, "correct": result.correct, "adversarial": result.adversarial}


@job
def differing(own: Processes, folder: Path) -> Any:
    """What is refused by all of them."""
    said = {}
    first, *rest = batches()
    tasks = {
        "data": lambda: tuned(network(), data=[first, *rest] if own.rank else [*rest, first]),
        "arguments": lambda: tuned(network(), epochs=2 + own.rank, seed=own.rank),
        "checkpoint": lambda: tuned(network(), checkpoint=None if own.rank else folder / "c"),
        "evaluate arguments": lambda: evaluate(
            SMALL.build(), (SMALL.example(4), SMALL.labels(4)), attacks=["pgd-2"], eps=0.1 * (1 + own.rank)
        ),
        "lengths": lambda: tuned(network(), data=batches()[own.rank :], shard="none"),
        "evaluate data": lambda: evaluate(SMALL.build(), (SMALL.example(4 + own.rank), SMALL.labels(4 + own.rank))),
        "evaluate model": lambda: evaluate(
            SMALL.build() if own.rank else nn.Sequential(nn.Flatten(), nn.Linear(192, 10)),
            (SMALL.example(4), SMALL.labels(4)),
        ),
    }
    for name, task in tasks.items():
        said[name] = refusal(task)
    return said


@job
def troubled(own: Processes, _: Path) -> Any:
    """A number that goes wrong in one process, and a batch that one cannot use."""
    import warnings

    data = batches()
    x, y = data[1]
    x = x.clone()
    x[1] = float("nan")  # a row of the second process
    found = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["skipped"] = tuned(network(), data=[data[0], (x, y), data[2]], epochs=1, schedule="constant")
    found["said"] = [str(warning.message) for warning in caught]
    found["without"] = tuned(network(), data=[data[0], data[2]], epochs=1, schedule="constant")
    mine = [
        (x[: 1 if own.rank == 1 and number == 1 else 4], y[: 1 if own.rank == 1 and number == 1 else 4])
        for number, (x, y) in enumerate(batches()[:3])
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["left out"] = tuned(network("dense"), data=mine, shard="none", epochs=1, schedule="constant", attack=None)
    found["left out said"] = [str(warning.message) for warning in caught]
    found["left out without"] = tuned(
        network("dense"), data=[mine[0], mine[2]], shard="none", epochs=1, schedule="constant", attack=None
    )
    return found


@job
def waiting(own: Processes, _: Path) -> Any:
    """As troubled, where each layer of a pass waits for the other processes; what differs is decided alike."""
    import warnings

    x, y = batches()[1]
    bad = x.clone()
    bad[1] = float("nan")  # a row of the second process
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = [batches()[0], (bad, y), batches()[2]]
        found["skipped"] = tuned(network(), data=data, epochs=1, schedule="constant", sync="batch")
    found["said"] = [str(warning.message) for warning in caught]
    data = [batches()[0], batches()[2]]
    found["without"] = tuned(network(), data=data, epochs=1, schedule="constant", sync="batch")
    # One example in one process: together they are enough.
    count = 1 if own.rank else 4
    mine = [(x[own.rank : own.rank + count], y[own.rank : own.rank + count])]
    options = {"shard": "none", "epochs": 1, "attack": None, "sync": "batch", "train": "all"}
    found["one and four"] = tuned(network("dense"), data=mine, **options)
    # Of two troubles one is decided for.
    bad = x[:4].clone()
    bad[0] = float("nan")
    mine = [(x[:4], y[:4]), (x[:1], y[:1]) if own.rank else (bad, y[:4])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"shard": "none", "epochs": 1, "attack": None}
        found["both"] = tuned(network("dense"), data=mine, **options)
    found["both said"] = [str(warning.message) for warning in caught]
    try:
        tuned(network("dense"), data=mine, on_nonfinite="raise", **options)
    except NonFiniteError as error:
        found["both raised"] = str(error)
    return found


@job
def still(_: Processes, __: Path) -> Any:
    """Statistics that no step moves, in float32."""
    data = batches(torch.float32)
    models = {name: network(dtype=torch.float32) for name in ("frozen", "consistent")}
    models["branch"] = split_bn(network(dtype=torch.float32))
    before = {name: {key: value.clone() for key, value in own.state_dict().items()} for name, own in models.items()}
    tuned(models["frozen"], data=data, train="bn-params")
    tuned(models["consistent"], data=data, train="all", consistent_bn_after=0)
    tuned(models["branch"], data=data, train="all")
    after = {name: dict(own.state_dict()) for name, own in models.items()}
    return {"before": before, "after": after}


@job
def unequal(own: Processes, _: Path) -> Any:
    """Data that does not say how long it is, and is not as long in each."""
    found: dict[str, Any] = {}
    for sync in ("buffers", "batch"):
        model, same = network("dense"), network("dense")
        data = batches()[:3]
        options = {"shard": "none", "epochs": 1, "attack": None, "sync": sync, "schedule": "constant"}
        found[sync] = refusal(lambda: tuned(model, data=Stream(data[: 3 - own.rank]), **options))  # noqa: B023
        tuned(same, data=Stream(data[:2]), **options)
        found[sync, "states"] = [dict(model.state_dict()), dict(same.state_dict())]
    first, second, third = batches()[:3]
    other = (third[0].flip(0), third[1].flip(0))
    rows = [first, second, other if own.rank else third]
    found["later"] = refusal(lambda: tuned(network("dense"), data=Stream(rows), epochs=1))
    rows.append(batches()[3])
    found["cut short"] = refusal(lambda: tuned(network("dense"), data=Stream(rows), epochs=1, max_steps=3))
    return found


class Seen(nn.Module):
    """Takes away a mean that it keeps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(192))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.lerp_(x.detach().mean(0), 0.1)
        return x - self.seen


@job
def going_on(own: Processes, folder: Path) -> Any:
    """Runs that are broken off and go on, with what may differ from process to process; and those that are not."""

    def lock(record: Any, model: nn.Module) -> None:
        """Of the model of the first process there are no copies any more."""
        if own.rank == 0 and name == "copies":
            model.lock = threading.Lock()

    def stop(record: Any, model: nn.Module) -> None:
        lock(record, model)
        if record.step == 3:
            raise RuntimeError("stop")

    def build(kind: str) -> nn.Module:
        torch.manual_seed(4)
        if kind == "copies":
            layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)]
            return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        if kind == "instance norm":
            norm = nn.InstanceNorm2d(4, track_running_stats=True, affine=True)
            return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 10)).to(
                DTYPE
            )
        own = [Seen()] if kind == "buffer" else []
        return nn.Sequential(nn.Flatten(), *own, network("dense"), nn.Dropout(0.3)).to(DTYPE)

    found: dict[str, Any] = {}
    sizes = {"unequal": 8 - 3 * own.rank, "instance norm": 8, "none": 8, "buffer": 8, "copies": 8, "length": 8}
    for name, size in sizes.items():
        mine = [(x[own.rank : own.rank + size], y[own.rank : own.rank + size]) for x, y in [batches()[0], batches()[2]]]
        options = {
            "data": mine,
            "shard": "none",
            "epochs": 3,
            "train": "all",
            "sync": "none" if name == "none" else "buffers",
        }
        if name == "length":  # of as many batches, and not as many examples
            count = 16 - 2 * own.rank
            rows = TensorDataset(SMALL.example(count, DTYPE), SMALL.labels(count))
            options["data"] = DataLoader(rows, batch_size=8)
        if name == "copies":
            options["data"] = [(x.float(), y) for x, y in mine]
        whole, model = build(name), build(name)
        expected = tuned(whole, on_step=lock, **options)
        path = folder / name.replace(" ", "")
        with suppress(RuntimeError):
            tuned(build(name), checkpoint=path, checkpoint_every=0, on_step=stop, **options)
        found[name] = [expected, tuned(model, checkpoint=path, on_step=lock, **options)]
    found["shard"] = refusal(lambda: tuned(build(name), checkpoint=path, **{**options, "shard": "split"}))
    return found


@job
def limits(own: Processes, _: Path) -> Any:
    """Statistics near the largest float32, which a sum over examples would overflow; parts that one process lacks."""
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4).view(16, 1, 1, 1)
    data = [((sign * 5.4e18).expand(16, 3, 2, 2), SMALL.labels(16))] * 2
    found: dict[str, Any] = {}
    for train in ("bn-stats", "bn"):
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12, momentum=1.0))
        options = {"attack": None, "train": train, "epochs": 1}
        run = tuned(model, data=data, **options)
        found[train] = [model[1].running_var, run["record"]["history"][0]["skipped"]]
    x, y = batches()[0]
    own_rows = 1 if own.rank else 4
    options = {"shard": "none", "sync": "batch", "clean_fraction": 0.5}
    found["parts"] = refusal(lambda: tuned(split_bn(network()), data=[(x[:own_rows], y[:own_rows])], **options))
    empty: list[tuple[Tensor, Tensor]] = [] if own.rank else [(x, y)]
    found["empty"] = refusal(lambda: tuned(network(), data=Stream(empty), shard="none"))
    return found


class Uneven(torch.optim.SGD):
    """An optimizer that in the second process makes one step otherwise: ``spoil`` is given the parameters after it."""

    def __init__(self, parameters: Any, turn: int, spoil: Callable[[Tensor], object]) -> None:
        super().__init__(parameters, lr=0.05)
        self.turn, self.spoil = turn, spoil

    def step(self, closure: Any = None) -> Any:
        self.turn -= 1
        super().step(closure)
        if self.turn == 0 and os.environ["RANK"] == "1":
            self.spoil(self.param_groups[0]["params"][0].data)


@job
def apart(own: Processes, folder: Path) -> Any:
    """Updates that one process makes otherwise than the other."""
    import warnings

    def change(record: Any, model: nn.Module) -> None:
        if record.step == 1 and own.rank == 1:
            model[2].bias.data[0] += 1e-12

    def changed_last(record: Any, model: nn.Module) -> None:
        if record.epoch == 2 and own.rank == 1:
            model[2].bias.data[0] += 1e-12

    def pass_of_its_own(record: Any, model: nn.Module) -> None:
        model.train()
        model(SMALL.example(4, DTYPE) + own.rank)

    def noisy(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return Uneven(parameters, 5, lambda value: value.add_(1e-9 * torch.randn_like(value)))

    def nan(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return Uneven(parameters, 5, lambda value: value.fill_(float("nan")))

    cases: dict[str, dict[str, Any]] = {
        "callback": {"on_step": change},
        "callback of the last epoch": {"callbacks": [changed_last]},
        "statistics": {"callbacks": [pass_of_its_own]},
        "noise": {"optimizer": noisy},
        "nan": {"optimizer": nan},
        "nan, with a callback of each step": {"optimizer": nan, "on_step": lambda *_: None},
        "kept": {"optimizer": nan, "checkpoint": folder / "apart", "checkpoint_every": 0},
    }
    found: dict[str, Any] = {}
    for name, options in cases.items():
        seen: list[int] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it is NaN
            calls = [lambda record, _: seen.append(record.epoch), *options.pop("callbacks", [])]  # noqa: B023
            try:
                tuned(network("dense"), epochs=3, callbacks=calls, **options)
            except BNSurgeryError as error:
                found[name] = [str(error), seen]
    return found


class Stream:
    """Data without a length."""

    def __init__(self, rows: list[tuple[Tensor, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.rows)


@job
def late(own: Processes, folder: Path) -> Any:
    """The second process is told to end when the others have been asked already: all end a step later."""
    import signal

    def at(record: Any, _: nn.Module) -> None:
        if record.step == 1 and own.rank == 1 and once(folder / "told"):
            signal.raise_signal(signal.SIGTERM)

    return tuned(network("dense"), on_step=at, checkpoint=folder / "t", checkpoint_every=1e9)


@job
def unwritable(own: Processes, folder: Path) -> Any:
    """Folders and files that the first process alone looks at."""
    found = {"folder": refusal(lambda: tuned(network(), checkpoint=folder / "none" / "c"))}
    place = folder / "c"
    if own.first:
        place.mkdir(exist_ok=True)  # where a file is to be
    own_path = place if own.first else folder / "elsewhere"
    for name, task in (
        ("tune", lambda: tuned(network(), checkpoint=own_path)),
        ("evaluate", lambda: evaluate(SMALL.build(), (SMALL.example(4), SMALL.labels(4)), checkpoint=own_path)),
    ):
        found[name] = refusal(task)
    return found


@job
def uninterrupted(_: Processes, folder: Path) -> Any:
    return tuned(network("dense"), train="all", epochs=3, checkpoint=folder / "whole", checkpoint_every=0)


@job
def dying(own: Processes, folder: Path) -> Any:
    """The second process is gone in the middle; started again, the run goes on."""

    def at(record: Any, _: nn.Module) -> None:
        if record.step == 5 and own.rank == 1 and once(folder / "died"):
            os._exit(9)

    return tuned(network("dense"), train="all", epochs=3, checkpoint=folder / "c", checkpoint_every=0, on_step=at)


@job
def hanging(own: Processes, folder: Path) -> Any:
    """The second process does not answer."""

    def at(record: Any, _: nn.Module) -> None:
        if record.step == 1 and own.rank == 1:
            time.sleep(60)

    return tuned(network("dense"), on_step=at)


@job
def told(own: Processes, folder: Path) -> Any:
    """The second process alone is told to end."""
    import signal

    def at(logits: Tensor, y: Tensor) -> Tensor:
        at.calls += 1
        if at.calls == 3 and own.rank == 1 and once(folder / "told"):
            signal.raise_signal(signal.SIGTERM)
        return nn.functional.cross_entropy(logits, y, reduction="none")

    at.calls = 0
    return tuned(network("dense"), loss=at, checkpoint=folder / "t", checkpoint_every=1e9)


@job
def another_number(_: Processes, folder: Path) -> Any:
    """Stops in the callback of a step, or goes on with a checkpoint of another number of processes."""
    import warnings

    last = int((folder / "stop").read_text()) if (folder / "stop").exists() else None

    def stop(record: Any, _: nn.Module) -> None:
        if record.step == last:
            raise RuntimeError("stopped")

    found: dict[str, Any] = {"state": None}
    with warnings.catch_warnings(record=True) as caught, suppress(RuntimeError):
        warnings.simplefilter("always")
        found = tuned(network(), sync="batch", checkpoint=folder / "n", checkpoint_every=0, on_step=stop)
    return {**found, "said": [str(warning.message) for warning in caught]}


def main(name: str, out: str, folder: str) -> None:
    torch.set_num_threads(1)
    with processes(timeout=5 if name == "hanging" else 60, device="cpu") as own:
        found = JOBS[name](own, Path(folder))
    torch.save(found, f"{out}.{os.environ.get('RANK', '0')}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
    sys.stderr.flush()
    os._exit(0)  # threads of torch's that outlive the group may abort an interpreter that is being taken down
