"""Checkpoints of adv_finetune: a run that is stopped, killed or broken goes on, to the same bits."""

from __future__ import annotations

import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from bnsurgery import (
    BNSurgeryWarning,
    CheckpointError,
    EpochRecord,
    StepRecord,
)
from bnsurgery import _states as states
from bnsurgery._checkpoints import load_optimizer
from networks import SHARED, SMALL
from test_attacks import World, lived_in
from test_finetuning import (
    PARAMETERS,
    STATISTICS,
    Stop,
    Untouchable,
    augmented,
    batches,
    bn_names,
    noisy_model,
    shuffled,
    tune,
    values,
)


def read(path: Path) -> dict[str, object]:
    return states.load(path, "adv_finetune")


def plain(result: object) -> list[EpochRecord]:
    return [replace(record, seconds=0) for record in result.history]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.mark.parametrize("killed", [1, 2])
@pytest.mark.parametrize("optimizer", [None, sgd, adam], ids=["default", "SGD", "Adam"])
@pytest.mark.parametrize("train", ["bn", "all", "bn-stats"])
def test_a_run_killed_and_resumed_equals_one_in_one_go(
    tmp_path: Path, killed: int, optimizer: object, train: str
) -> None:
    options = {"epochs": 3, "train": train, "optimizer": optimizer, "schedule": "cosine", "seed": 4}
    whole = noisy_model()
    expected = tune(whole, augmented(), **options)

    def kill(record: EpochRecord, _: nn.Module) -> None:
        if record.epoch == killed:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        tune(noisy_model(), augmented(), checkpoint=path, callbacks=[kill], **options)
    epochs = []
    torch.manual_seed(77)
    model = noisy_model()
    result = tune(
        model, augmented(), checkpoint=path, callbacks=[lambda record, _: epochs.append(record.epoch)], **options
    )
    assert epochs == list(range(killed, 3))
    assert values(model) == values(whole)
    assert [replace(r, seconds=0) for r in result.history] == [replace(r, seconds=0) for r in expected.history]
    assert replace(result, history=()) == replace(expected, history=())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]


def test_a_run_broken_in_the_middle_of_an_epoch_resumes_at_its_start(tmp_path: Path) -> None:
    whole = noisy_model()
    tune(whole, shuffled(), epochs=2)

    def kill(record: StepRecord, _: nn.Module) -> None:
        if record.step == 4:
            raise Stop

    with pytest.raises(Stop):
        tune(noisy_model(), shuffled(), epochs=2, checkpoint=tmp_path / "c", on_step=kill)
    model = noisy_model()
    tune(model, shuffled(), epochs=2, checkpoint=tmp_path / "c")
    assert values(model) == values(whole)


@pytest.mark.parametrize("ended", ["epochs", "max_steps", "callback"])
def test_a_finished_checkpoint_returns_at_once(tmp_path: Path, ended: str) -> None:
    options: dict[str, object] = {"epochs": 2, "checkpoint": str(tmp_path / "c")}
    if ended == "max_steps":
        options["max_steps"] = 3
    callbacks = [lambda *_: True] if ended == "callback" else []
    first = SMALL.build()
    expected = tune(first, batches(4, 4), callbacks=callbacks, **options)
    assert expected.ended == ended
    written = (tmp_path / "c").read_bytes()
    model = SMALL.build()
    result = tune(model, Untouchable(), **options)
    assert result == expected
    assert values(model) == values(first)
    assert (tmp_path / "c").read_bytes() == written


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"epochs": 3}, "epochs was 2, is 3"),
        ({"clean_fraction": 0.5}, "clean_fraction was 0.0, is 0.5"),
        ({"schedule": "cosine"}, "schedule was 'step', is 'cosine'"),
        ({"schedule": lambda t: 1.0}, "schedule was 'step', is 'function'"),
        ({"attack": None}, "attack was \"PGD(eps=0.0313725, steps=2, step_size=0.0156863, norm='linf')\", is"),
        (
            {"eps_warmup": 1},
            "norm='linf')\", is \"PGD(eps=0.0313725, steps=2, step_size=0.0156863, norm='linf'), eps_w",
        ),
        ({"max_steps": 3}, "max_steps was None, is 3"),
        ({"optimizer": adam}, "optimizer was 'SGD', is 'Adam'"),
        ({"train": "bn-params"}, "train was 'bn', is 'bn-params'"),
        ({"also": "0"}, "trainable: nothing else before, ['0.weight', 8, 3, 3, 3] now"),
        ({"lr": 0.5}, "0.05"),
        ({"momentum": 0.5}, "0.9"),
        ({"weight_decay": 0.5}, "0.0005"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    tmp_path: Path, options: dict[str, object], difference: str
) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4, 4), checkpoint=path, callbacks=[lambda record, _: True], epochs=2)
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        tune(model, batches(4, 4), checkpoint=path, **{"epochs": 2, **options})
    assert difference in str(caught.value)
    assert "use another path, or remove the file" in str(caught.value)
    assert world.unchanged()


def test_all_differences_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4), checkpoint=path)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        tune(SMALL.build(), batches(4), checkpoint=path, epochs=2, seed=9, train="all")
    for difference in ("epochs was 1, is 2", "seed was 0, is 9", "train was 'bn', is 'all'"):
        assert difference in str(caught.value)
    assert "clean_fraction" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4), checkpoint=path)
    model = SHARED.build()
    world = World(model)
    with pytest.raises(CheckpointError, match=r"trainable: \['1.weight', 8\] and \d+ more before, \['"):
        tune(model, batches(4), checkpoint=path)
    assert world.unchanged()


def test_a_checkpoint_of_the_same_parameters_but_other_statistics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4), checkpoint=path)
    model = SMALL.build()
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    world = World(model)
    with pytest.raises(CheckpointError, match=r"tensors do not fit the model: 1\.num_batches_tracked, 1\.running_mean"):
        tune(model, batches(4), checkpoint=path)
    assert world.unchanged()


def test_a_checkpoint_of_an_optimizer_with_other_groups_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4), checkpoint=path, optimizer=sgd)
    model = SMALL.build()
    world = World(model)

    def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.05)

    with pytest.raises(CheckpointError, match=re.escape(repr(str(path)))):
        tune(model, batches(4), checkpoint=path, optimizer=two_groups)
    assert world.unchanged()


class Bombs:
    """What runs as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def signed(state: dict[str, object], path: Path) -> None:
    """Writes a state that nobody would, under a checksum that is right."""
    path.write_bytes(states.dumped("adv_finetune", state))


def damage(kind: str, path: Path) -> None:
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "nearly whole":
        path.write_bytes(whole[:-10])
    elif kind == "one bit":
        path.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(bytes(range(256)) * 8)
    elif kind == "text":
        path.write_text("epochs: 3\n")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bombs(path.with_name("executed"))))
    elif kind == "pickle in zip":
        torch.save({"configuration": Bombs(path.with_name("executed"))}, path)
    elif kind == "directory":
        path.unlink()
        path.mkdir()
    elif kind == "another kind":
        path.write_bytes(states.dumped("evaluate", read(path)))
    elif kind == "hollow":
        signed({}, path)
    elif kind == "without tensors":
        signed({key: value for key, value in read(path).items() if key != "tensors"}, path)
    elif kind == "wrong history":
        signed({**read(path), "history": [{"epoch": 0}]}, path)
    elif kind == "without processes":
        signed({**read(path), "processes": []}, path)
    elif kind == "wrong dtype":
        tensors = {name: tensor.double() for name, tensor in read(path)["tensors"].items()}
        signed({**read(path), "tensors": tensors}, path)
    elif kind == "wrong tally":
        signed({**read(path), "tuning": {"epoch": 0, "step": 2, "tally": {"stairs": 1}}}, path)


CUT_SHORT = ("truncated", "nearly whole", "one bit", "empty", "garbage", "text", "pickle", "pickle in zip")
MADE_UP = (
    "another kind",
    "hollow",
    "without tensors",
    "wrong history",
    "without processes",
    "wrong dtype",
    "wrong tally",
)


@pytest.mark.parametrize("kind", [*CUT_SHORT, *MADE_UP])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_executed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4, 4), checkpoint=path, epochs=2)
    damage(kind, path)
    states.previous(path).unlink()
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(CheckpointError, match=re.escape(repr(str(path)))):
        tune(model, batches(4, 4), checkpoint=path, epochs=2)
    assert world.unchanged()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", CUT_SHORT)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    whole = noisy_model()
    expected = tune(whole, augmented(), checkpoint=tmp_path / "whole", epochs=3)
    tune(noisy_model(), augmented(), checkpoint=path, epochs=3)
    damage(kind, path)
    epochs = []
    model = noisy_model()
    with pytest.warns(BNSurgeryWarning, match=r"the one before it is used, '.*c\.previous'") as caught:
        result = tune(model, augmented(), checkpoint=path, epochs=3, callbacks=lambda r, _: epochs.append(r.epoch))
    assert len(caught) == 1
    assert epochs == [2]
    assert values(model) == values(whole)
    assert plain(result) == plain(expected)


def test_where_both_checkpoints_are_damaged_both_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4, 4), checkpoint=path, epochs=2)
    damage("truncated", path)
    damage("truncated", states.previous(path))
    with pytest.raises(CheckpointError, match=r"'.*/c': the checksum .*; nor the one before it: .*'.*c\.previous'"):
        tune(SMALL.build(), batches(4, 4), checkpoint=path, epochs=2)


def test_without_the_newest_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(4, 4), checkpoint=path, epochs=2)
    path.unlink()
    epochs = []
    tune(SMALL.build(), batches(4, 4), checkpoint=path, epochs=2, callbacks=lambda r, _: epochs.append(r.epoch))
    assert epochs == [0, 1]


def test_a_bomb_does_go_off_where_pickles_are_executed(tmp_path: Path) -> None:
    # Else the test above would prove nothing.
    pickle.loads(pickle.dumps(Bombs(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


class FullDisk:
    """A disk on which so many writes find room, and then half of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        write, self.written = Path.write_bytes, []

        def full(path: Path, data: bytes) -> int:
            if len(self.written) >= room:
                write(path, data[: len(data) // 2])
                raise OSError(28, "No space left on device")
            self.written.append(data)
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", full)


def test_where_the_disk_is_full_the_run_goes_on_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    whole, model = noisy_model(), noisy_model()
    expected = tune(whole, augmented(), epochs=3)
    with monkeypatch.context() as context:
        disk = FullDisk(context, room=2)
        with pytest.warns(
            BNSurgeryWarning, match=r"after step \d \(No space left on device\): the run goes on"
        ) as caught:
            result = tune(model, augmented(), checkpoint=path, epochs=3)
    assert len(caught) == 2
    assert values(model) == values(whole)
    assert plain(result) == plain(expected)
    assert path.read_bytes() == disk.written[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "c.previous"]
    again = noisy_model()
    assert plain(tune(again, augmented(), checkpoint=path, epochs=3)) == plain(expected)
    assert values(again) == values(whole)


def test_a_disk_that_is_full_from_the_beginning_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, room=0)
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(OSError, match="No space left"):
        tune(model, batches(4, 4), checkpoint=tmp_path / "c")
    assert world.unchanged()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, alive = tmp_path / f".c.{gone.pid}.partial", tmp_path / f".c.{os.getppid()}.partial"
    other = tmp_path / f".d.{gone.pid}.partial"
    for path in (left, alive, other):
        path.write_bytes(b"half")
    tune(SMALL.build(), batches(4), checkpoint=tmp_path / "c")
    assert not left.exists()
    assert alive.exists()
    assert other.exists()


def test_a_checkpoint_holds_what_changes_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "c"
    model = SMALL.build()
    tune(model, batches(4), checkpoint=path)
    tensors = read(path)["tensors"]
    assert tensors.keys() == bn_names(model, *PARAMETERS, *STATISTICS)
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in tensors)


def test_a_checkpoint_is_written_after_each_epoch_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "c"
    seen = []

    class Watching:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            seen.append(len(read(path)["history"]))
            return iter(batches(4))

    tune(SMALL.build(), Watching(), epochs=3, checkpoint=path)
    assert seen == [0, 1, 2]


# Within an epoch.


class Killed(BaseException):
    """As if the process had gone."""


def killed_at(step: int) -> Callable[[StepRecord, nn.Module], None]:
    def kill(record: StepRecord, _: nn.Module) -> None:
        if record.step == step:
            raise Killed

    return kill


@pytest.mark.parametrize("step", range(1, 6))
@pytest.mark.parametrize("train", ["bn", "all"])
def test_a_run_killed_anywhere_ends_with_the_same_bits(tmp_path: Path, step: int, train: str) -> None:
    options = {"epochs": 2, "train": train, "schedule": "cosine", "clean_fraction": 0.5, "checkpoint_every": 0}
    whole = noisy_model()
    expected = tune(whole, augmented(), **options)
    path = tmp_path / "c"
    with pytest.raises(Killed):
        tune(noisy_model(), augmented(), checkpoint=path, on_step=killed_at(step), **options)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    steps: list[int] = []
    model = noisy_model()
    result = tune(model, augmented(), checkpoint=path, on_step=lambda record, _: steps.append(record.step), **options)
    assert steps == list(range(step, 6))
    assert values(model) == values(whole)
    assert plain(result) == plain(expected)


class Held(nn.Module):
    """Multiplies by a parameter of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits * self.temperature, y, reduction="none")


def decayed() -> dict[str, object]:
    """Weight decay that begins in the middle, as a whole number."""
    made: list[torch.optim.Optimizer] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=np.float64(0.05), momentum=0))
        return made[-1]

    def decay(record: EpochRecord, _: nn.Module) -> None:
        made[-1].param_groups[0]["weight_decay"] = 2

    return {"optimizer": make, "callbacks": [decay]}


def with_temperature() -> dict[str, object]:
    loss = Held()
    loss.temperature.grad = torch.tensor(3.0)  # of something else
    return {"loss": loss, "optimizer": lambda own: torch.optim.SGD([*own, *loss.parameters()], lr=0.5, momentum=0.9)}


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"lr": 1},
        decayed,
        with_temperature,
        lambda: {"schedule": lambda progress: torch.tensor(1 - progress)},
        lambda: {"optimizer": lambda own: torch.optim.SGD(own, lr=torch.tensor(0.05))},
    ],
    ids=["a whole number", "moved", "temperature", "schedule of tensors", "rate in a tensor"],
)
@pytest.mark.parametrize("step", [2, 4])
def test_options_and_parameters_of_an_optimizer_of_ones_own_go_on(
    tmp_path: Path, options: Callable[[], dict[str, object]], step: int
) -> None:
    whole, model = noisy_model(), noisy_model()
    expected = tune(whole, augmented(), epochs=2, **options())
    kept = {"epochs": 2, "checkpoint": tmp_path / "c", "checkpoint_every": 0}
    with pytest.raises(Killed):
        tune(noisy_model(), augmented(), on_step=killed_at(step), **kept, **options())
    given = options()
    result = tune(model, augmented(), **kept, **given)
    assert values(model) == values(whole)
    assert plain(result) == plain(expected)
    if isinstance(given.get("loss"), Held):
        again = with_temperature()
        tune(noisy_model(), augmented(), epochs=2, **again)
        assert given["loss"].temperature.item() == again["loss"].temperature.item() != 1


def test_gradients_of_ones_own_do_not_count_and_are_as_before() -> None:
    given, fresh = with_temperature(), with_temperature()
    held: Held = fresh["loss"]  # type: ignore[assignment]
    held.temperature.grad = None
    for options in (given, fresh):
        tune(noisy_model(), batches(4, 4), **options)
    assert given["loss"].temperature.item() == held.temperature.item() != 1
    assert given["loss"].temperature.grad.item() == 3
    assert held.temperature.grad is None


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
@pytest.mark.parametrize("number", [float, np.float32, torch.tensor], ids=["Python", "NumPy", "torch"])
def test_numbers_of_any_kind_are_compared_by_their_values(
    tmp_path: Path, number: Callable[[float], object], option: str
) -> None:
    def options(value: object) -> dict[str, object]:
        made = lambda own: torch.optim.SGD(own, **{"lr": 0.05, option: value})  # noqa: E731
        return {"epochs": 2, "checkpoint": tmp_path / "c", "optimizer": made}

    with pytest.raises(Killed):
        tune(noisy_model(), batches(4, 4), on_step=killed_at(2), **options(number(0.5)))
    with pytest.raises(CheckpointError, match=rf"options was \[\{{.*'{option}': 0\.5.*'{option}': 0\.25"):
        tune(noisy_model(), batches(4, 4), **options(number(0.25)))
    assert tune(noisy_model(), batches(4, 4), **options(0.5)).steps == 4


def test_hooks_of_an_optimizer_are_called_for_the_steps_of_the_run_alone(tmp_path: Path) -> None:
    calls: list[str] = []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.05)
        made.register_step_pre_hook(lambda *_: calls.append("before"))
        made.register_step_post_hook(lambda *_: calls.append("after"))
        return made

    options = {"optimizer": optimizer, "checkpoint": tmp_path / "c", "checkpoint_every": 0}
    with pytest.raises(Killed):
        tune(noisy_model(), batches(4, 4, 4), on_step=killed_at(1), **options)
    assert calls == ["before", "after"] * 2
    tune(noisy_model(), batches(4, 4, 4), **options)
    assert calls == ["before", "after"] * 4  # the second step was made twice


def test_a_run_without_copies_goes_on_without(tmp_path: Path) -> None:
    def lock(step: int | None = None) -> Callable[[StepRecord, nn.Module], None]:
        def change(record: StepRecord, model: nn.Module) -> None:
            model.lock = threading.Lock()  # what holds it cannot be copied
            if record.step == step:
                raise Killed

        return change

    options = {"train": "all", "checkpoint_every": 0}
    whole, model = two_convolutions(), two_convolutions()
    with pytest.warns(BNSurgeryWarning, match="attacks run on the live model"):
        tune(whole, batches(*[8] * 6), on_step=lock(), **options)
    with pytest.warns(BNSurgeryWarning, match="attacks run on the live model"), pytest.raises(Killed):
        tune(two_convolutions(), batches(*[8] * 6), on_step=lock(3), checkpoint=tmp_path / "c", **options)
    with pytest.warns(BNSurgeryWarning, match="attacks run on the live model"):
        tune(model, batches(*[8] * 6), on_step=lock(), checkpoint=tmp_path / "c", **options)
    assert values(model) == values(whole)


def two_convolutions() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize("attack", [{}, {"attack": None}], ids=["PGD", "clean"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_goes_on_with_a_batch_of_one_ends_with_the_same_bits(
    tmp_path: Path, attack: dict[str, object], step: int
) -> None:
    options = {"epochs": 2, "train": "all", **attack}
    whole, model = two_convolutions(), two_convolutions()
    tune(whole, batches(8, 8, 1), **options)
    kept = {"checkpoint": tmp_path / "c", "checkpoint_every": 0, **options}
    with pytest.raises(Killed):
        tune(two_convolutions(), batches(8, 8, 1), on_step=killed_at(step), **kept)
    tune(model, batches(8, 8, 1), **kept)
    assert values(model) == values(whole)


@pytest.mark.parametrize("step", [3, 7])
@pytest.mark.parametrize("sizes", [[8], [8, 6]], ids=str)
def test_a_run_in_which_the_model_changes_with_each_step_goes_on_with_the_same_bits(
    tmp_path: Path, step: int, sizes: list[int]
) -> None:
    """After five copies that were of no use the run makes no more: so it is after going on."""

    def changing(also: Callable[[StepRecord, nn.Module], None] | None = None) -> dict[str, object]:
        def change(record: StepRecord, model: nn.Module) -> None:
            model.step = record.step
            if also is not None:
                also(record, model)

        return {"train": "all", "on_step": change}

    data = batches(*sizes * (12 // len(sizes)))
    whole, model = two_convolutions(), two_convolutions()
    with pytest.warns(BNSurgeryWarning, match="change with each batch"):
        tune(whole, data, **changing())
    kept = {"checkpoint": tmp_path / "c", "checkpoint_every": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BNSurgeryWarning)
        with pytest.raises(Killed):
            tune(two_convolutions(), data, **kept, **changing(killed_at(step)))
        tune(model, data, **kept, **changing())
    assert values(model) == values(whole)


def test_a_run_killed_at_every_step_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = noisy_model()
    expected = tune(whole, augmented(), epochs=2)
    for step in range(1, 6):
        with pytest.raises(Killed):
            tune(
                noisy_model(),
                augmented(),
                epochs=2,
                checkpoint=tmp_path / "c",
                checkpoint_every=0,
                on_step=killed_at(step),
            )
    model = noisy_model()
    assert plain(tune(model, augmented(), epochs=2, checkpoint=tmp_path / "c")) == plain(expected)
    assert values(model) == values(whole)


def test_a_checkpoint_changes_nothing_in_a_run(tmp_path: Path) -> None:
    without, kept = noisy_model(), noisy_model()
    expected = tune(without, augmented(), epochs=2)
    result = tune(kept, augmented(), epochs=2, checkpoint=tmp_path / "c", checkpoint_every=0)
    assert values(kept) == values(without)
    assert plain(result) == plain(expected)


def test_between_checkpoints_lie_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written, save = [0.0], [], states.save

    def watched(path: Path, kind: str, state: dict[str, object]) -> None:
        written.append(state["tuning"]["step"])
        save(path, kind, state)

    def pass_time(_: StepRecord, __: nn.Module) -> None:
        now[0] += 10

    monkeypatch.setattr(states, "save", watched)
    monkeypatch.setattr("bnsurgery._keeping.time.monotonic", lambda: now[0])
    tune(SMALL.build(), batches(*[2] * 8), checkpoint=tmp_path / "c", checkpoint_every=25, on_step=pass_time)
    assert written == [0, 3, 6, 8]


class Own(TensorDataset):
    """Draws from generators of its own."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.rules = {"torch": torch.Generator().manual_seed(1), "others": [np.random.default_rng(2), random.Random(3)]}
        self.legacy = np.random.RandomState(4)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        fresh, python = self.rules["others"]
        noise = torch.rand(1, generator=self.rules["torch"]) + fresh.random() + python.random() + self.legacy.rand()
        return (x + 0.01 * noise.float()).clamp(0, 1), y


def own() -> DataLoader[tuple[Tensor, ...]]:
    data = Own(SMALL.example(12), SMALL.labels(12))
    order = torch.Generator().manual_seed(9)
    return DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=order))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_generators_that_the_data_holds_go_on_too(tmp_path: Path, step: int) -> None:
    whole, model = SMALL.build(), SMALL.build()
    expected = tune(whole, own(), epochs=2)
    options = {"checkpoint": tmp_path / "c", "checkpoint_every": 0, "on_step": killed_at(step)}
    with pytest.raises(Killed):
        tune(SMALL.build(), own(), epochs=2, **options)
    assert plain(tune(model, own(), epochs=2, checkpoint=tmp_path / "c")) == plain(expected)
    assert values(model) == values(whole)


class Last:
    """Draws random numbers to say that there are no more batches, as a RandomSampler with its own generator does."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches(4, 4):
            yield 0.9 * x + 0.1 * torch.rand(x.shape, generator=self.generator) * torch.rand(()), y
        torch.rand(3)
        torch.rand(3, generator=self.generator)


def sampled() -> DataLoader[tuple[Tensor, ...]]:
    data = TensorDataset(SMALL.example(12), SMALL.labels(12))
    return DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("data", [Last, sampled])
def test_a_run_killed_between_the_last_batch_and_the_next_epoch_ends_with_the_same_bits(
    tmp_path: Path, data: Callable[[], object]
) -> None:
    def killed(record: EpochRecord, _: nn.Module) -> None:
        if record.epoch == 1:
            raise Killed

    whole, model = noisy_model(), noisy_model()
    expected = tune(whole, data(), epochs=3, train="all")
    with pytest.raises(Killed):
        tune(noisy_model(), data(), epochs=3, train="all", checkpoint=tmp_path / "c", callbacks=killed)
    assert plain(tune(model, data(), epochs=3, train="all", checkpoint=tmp_path / "c")) == plain(expected)
    assert values(model) == values(whole)


def test_loaders_with_workers_go_on_within_an_epoch(tmp_path: Path) -> None:
    def loader() -> DataLoader[tuple[Tensor, ...]]:
        data = augmented().dataset
        return DataLoader(data, batch_size=4, shuffle=True, num_workers=1)

    whole, model = SMALL.build(), SMALL.build()
    expected = tune(whole, loader(), epochs=2)
    options = {"checkpoint": tmp_path / "c", "checkpoint_every": 0, "on_step": killed_at(4)}
    with pytest.raises(Killed):
        tune(SMALL.build(), loader(), epochs=2, **options)
    assert plain(tune(model, loader(), epochs=2, checkpoint=tmp_path / "c")) == plain(expected)
    assert values(model) == values(whole)


class Told:
    def __init__(self) -> None:
        self.epoch: int | None = None
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(8, generator=torch.Generator().manual_seed(self.told[-1])).tolist())

    def __len__(self) -> int:
        return 8


def test_samplers_are_told_the_epoch(tmp_path: Path) -> None:
    def loader() -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(SMALL.example(8), SMALL.labels(8)), batch_size=4, sampler=Told())

    data, whole, model = loader(), SMALL.build(), SMALL.build()
    tune(whole, data, epochs=3)
    assert data.sampler.told == [0, 1, 2]
    options = {"checkpoint": tmp_path / "c", "checkpoint_every": 0, "on_step": killed_at(3)}
    with pytest.raises(Killed):
        tune(SMALL.build(), loader(), epochs=3, **options)
    data = loader()
    tune(model, data, epochs=3, checkpoint=tmp_path / "c")
    assert data.sampler.told == [1, 2]
    assert values(model) == values(whole)


def stopped_within(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "c"
    with pytest.raises(Killed):
        tune(SMALL.build(), data, epochs=2, checkpoint=path, checkpoint_every=0, on_step=killed_at(2))
    return path


def reordered(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    first, second, *rest = batches(*sizes)
    return [second, first, *rest]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (reordered(4, 4, 4), "others now"),
        ([(x, y.flip(0)) for x, y in batches(4, 4, 4)], "others now"),
        ([((x + 0.001).clamp(0, 1), y) for x, y in batches(4, 4, 4)], "others now"),
    ],
    ids=["another order", "other labels", "other inputs"],
)
def test_a_checkpoint_of_another_order_of_the_data_is_refused(tmp_path: Path, data: object, what: str) -> None:
    path = stopped_within(tmp_path, batches(4, 4, 4))
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(CheckpointError, match=f"after 2 batches of epoch 0, and the data gives {what}: give the same"):
        tune(model, data, epochs=2, checkpoint=path)
    assert world.unchanged()
    result = tune(model, data, epochs=2, checkpoint=path, data_order="any")
    assert (result.steps, result.ended) == (6, "epochs")


class Stream(IterableDataset):
    def __init__(self, data: list[tuple[Tensor, Tensor]]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.data)


def test_data_that_has_become_shorter_is_refused(tmp_path: Path) -> None:
    path = stopped_within(tmp_path, Stream(batches(4, 4, 4)))
    with pytest.raises(CheckpointError, match="after 2 batches of epoch 0, and the data gives 1 alone now"):
        tune(SMALL.build(), Stream(batches(4)), epochs=2, checkpoint=path)


def test_data_with_other_generators_is_refused(tmp_path: Path) -> None:
    path = stopped_within(tmp_path, own())
    with pytest.raises(CheckpointError, match="holds 5 random generators, and this data holds 0"):
        tune(SMALL.build(), shuffled(), epochs=2, checkpoint=path)


@pytest.mark.parametrize(
    ("data", "difference"),
    [
        (batches(4, 4), "'batches': 3"),
        (DataLoader(TensorDataset(SMALL.example(12), SMALL.labels(12)), batch_size=5), "'batch_size': 4"),
        (DataLoader(TensorDataset(SMALL.example(11), SMALL.labels(11)), batch_size=4), "'examples': 12"),
    ],
    ids=["batches", "batch_size", "examples"],
)
def test_a_checkpoint_of_data_of_another_size_is_refused(tmp_path: Path, data: object, difference: str) -> None:
    path = stopped_within(tmp_path, shuffled())
    with pytest.raises(CheckpointError, match=f"data was .*{difference}"):
        tune(SMALL.build(), data, epochs=2, checkpoint=path)


# Signals.


def sends(number: int, during: str, seen: list[object] | None = None) -> dict[str, object]:
    """Sends this process a signal: while a step is made, or in a callback."""
    sent: list[int] = []

    def once(*_: object) -> None:
        if not sent and (seen is None or len(seen) >= 2):
            sent.append(number)
            signal.raise_signal(number)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        once()
        return nn.functional.cross_entropy(logits, y, reduction="none")

    return {"loss": loss} if during == "step" else {"callbacks": once}


def keep_loss(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


keep_loss.__name__ = "loss"


def test_an_interrupt_waits_for_the_step_and_the_checkpoint(tmp_path: Path, handlers: dict[int, object]) -> None:
    path, steps = tmp_path / "c", []
    whole, model = noisy_model(), noisy_model()
    options = {"epochs": 2, "checkpoint_every": math.inf}
    expected = tune(whole, augmented(), loss=keep_loss, **options)
    with pytest.raises(KeyboardInterrupt):
        tune(
            noisy_model(),
            augmented(),
            checkpoint=path,
            on_step=lambda record, _: steps.append(record.step),
            **sends(signal.SIGINT, "step", steps),
            **options,
        )
    assert steps == [0, 1, 2]
    assert read(path)["tuning"]["step"] == 3
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert plain(tune(model, augmented(), checkpoint=path, loss=keep_loss, **options)) == plain(expected)
    assert values(model) == values(whole)


@pytest.mark.usefixtures("handlers")
def test_a_second_interrupt_ends_the_step_at_once(tmp_path: Path) -> None:
    model = SMALL.build()
    before = values(model)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        tune(model, batches(4, 4), checkpoint=tmp_path / "c", loss=loss)
    assert values(model) == before


def test_an_interrupt_in_a_callback_comes_at_once_and_nothing_is_lost(
    tmp_path: Path, handlers: dict[int, object]
) -> None:
    path, whole, model = tmp_path / "c", noisy_model(), noisy_model()
    options = {"epochs": 2, "checkpoint_every": math.inf}
    expected = tune(whole, augmented(), **options)
    with pytest.raises(KeyboardInterrupt):
        tune(noisy_model(), augmented(), checkpoint=path, **sends(signal.SIGINT, "callback"), **options)
    state = read(path)
    assert (state["tuning"]["step"], state["tuning"]["epoch"], state["history"]) == (3, 0, [])
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    epochs: list[int] = []
    result = tune(model, augmented(), checkpoint=path, callbacks=lambda own, _: epochs.append(own.epoch), **options)
    assert epochs == [0, 1]
    assert plain(result) == plain(expected)
    assert values(model) == values(whole)


@pytest.mark.parametrize("ended", ["max_steps", "callback"])
def test_a_run_killed_in_the_callbacks_of_its_last_epoch_makes_no_further_step(tmp_path: Path, ended: str) -> None:
    path, whole, model = tmp_path / "c", noisy_model(), noisy_model()
    options = {"epochs": 3, "max_steps": 5} if ended == "max_steps" else {"epochs": 3}

    def at_step(record: StepRecord, _: nn.Module) -> bool:
        return ended == "callback" and record.step == 4

    def killed(record: EpochRecord, _: nn.Module) -> None:
        if record.epoch == 1:
            raise Killed

    expected = tune(whole, augmented(), on_step=at_step, **options)
    assert (expected.steps, expected.ended) == (5, ended)
    with pytest.raises(Killed):
        tune(noisy_model(), augmented(), checkpoint=path, callbacks=killed, on_step=at_step, **options)
    assert plain(tune(model, augmented(), checkpoint=path, on_step=at_step, **options)) == plain(expected)
    assert values(model) == values(whole)


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_between_two_steps_waits_for_the_checkpoint_too(tmp_path: Path) -> None:
    def interrupted(record: StepRecord, _: nn.Module) -> None:
        if record.step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(noisy_model(), augmented(), checkpoint=tmp_path / "c", checkpoint_every=math.inf, on_step=interrupted)
    assert read(tmp_path / "c")["tuning"]["step"] == 2


def test_where_a_hook_takes_no_other_layout_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The first step of a call finds that out in the middle, after dropout has drawn."""

    def network() -> nn.Module:
        model = noisy_model()
        model[2] = nn.Sequential(nn.Dropout(0.3), nn.ReLU())
        model[2][1].register_forward_hook(look)
        return model

    def look(_: nn.Module, __: object, out: Tensor) -> None:
        seen.append(out.view(len(out), -1).shape)

    seen: list[torch.Size] = []

    options = {"epochs": 2, "train": "all", "checkpoint_every": 0}
    whole, model = network(), network()
    expected = tune(whole, augmented(), **options)
    with pytest.raises(Killed):
        tune(network(), augmented(), checkpoint=tmp_path / "c", on_step=killed_at(3), **options)
    assert plain(tune(model, augmented(), checkpoint=tmp_path / "c", **options)) == plain(expected)
    assert values(model) == values(whole)


class Wide(torch.optim.SGD):
    """Keeps what it adds up in float64, whatever the parameters are."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                total = state.setdefault("sum", torch.zeros_like(parameter, dtype=torch.float64))
                total.add_(parameter.grad.double(), alpha=1 / 3)
                parameter.data.sub_(0.1 * total.to(parameter.dtype))


def test_an_optimizers_state_keeps_its_dtypes(tmp_path: Path) -> None:
    options = {"epochs": 2, "checkpoint_every": 0, "optimizer": lambda parameters: Wide(parameters, lr=0.1)}
    whole, model = noisy_model(), noisy_model()
    tune(whole, augmented(), **options)
    with pytest.raises(Killed):
        tune(noisy_model(), augmented(), checkpoint=tmp_path / "c", on_step=killed_at(3), **options)
    assert {value.dtype for own in read(tmp_path / "c")["optimizer"]["state"].values() for value in own.values()} == {
        torch.float64
    }
    tune(model, augmented(), checkpoint=tmp_path / "c", **options)
    assert values(model) == values(whole)


def test_the_state_of_an_optimizer_for_sparse_gradients_is_taken() -> None:
    layer = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(layer.parameters())
    layer(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    again = torch.optim.SparseAdam(layer.parameters())
    load_optimizer(again, optimizer.state_dict())
    assert str(again.state_dict()) == str(optimizer.state_dict())


def test_a_state_that_cannot_be_kept_warns_once_it_is_there_and_the_run_goes_on(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                self.state[group["params"][0]]["odd"] = object()

    model = noisy_model()
    with pytest.warns(BNSurgeryWarning, match=r"after step 3 \(the state of the run cannot be kept .* got a object\)"):
        result = tune(model, augmented(), checkpoint=tmp_path / "c", optimizer=lambda own: Odd(own, lr=0.1))
    assert result.steps == 3
    assert read(tmp_path / "c")["tuning"]["step"] == 0


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int32(3), np.bool_(True)])
def test_numbers_of_numpy_are_kept(number: np.generic) -> None:
    found = states.loaded(states.dumped("kind", {"own": number}), "kind")["own"]
    assert found == number.item()
    assert type(found) is type(number.item())


def test_a_handler_of_the_callers_own_is_called_after_the_checkpoint_and_may_let_the_run_go_on(
    tmp_path: Path, handlers: dict[int, object]
) -> None:
    path, told = tmp_path / "c", []
    signal.signal(signal.SIGTERM, lambda number, _: told.append((number, read(path)["tuning"]["step"])))
    mine = signal.getsignal(signal.SIGTERM)
    result = tune(SMALL.build(), batches(4, 4, 4), checkpoint=path, **sends(signal.SIGTERM, "step"))
    assert told == [(signal.SIGTERM, 1)]
    assert result.steps == 3
    assert signal.getsignal(signal.SIGTERM) is mine


def test_signals_that_the_caller_ignores_stay_ignored(tmp_path: Path, handlers: dict[int, object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = tune(SMALL.build(), batches(4, 4, 4), checkpoint=tmp_path / "c", **sends(signal.SIGINT, "step"))
    assert result.steps == 3
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_without_a_checkpoint_signals_are_left_alone() -> None:
    held = []

    def look(*_: object) -> None:
        held.append(signal.getsignal(signal.SIGINT))

    tune(SMALL.build(), batches(4), on_step=look)
    assert held == [signal.getsignal(signal.SIGINT)]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import signal, torch
torch.set_num_threads(1)
from test_finetuning import augmented, noisy_model, tune

def after(record, model):
    if record.step == 1:
        signal.raise_signal(signal.SIGTERM) if {at_once} else None

def loss(logits, y):
    if not {at_once} and loss.calls == 2:
        signal.raise_signal(signal.SIGTERM)
    loss.calls += 1
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")

loss.calls = 0
tune(noisy_model(), augmented(), epochs=2, checkpoint={path!r}, checkpoint_every=1e9, on_step=after, loss=loss)
print("finished")
"""


def test_a_process_that_is_told_to_terminate_saves_and_does(tmp_path: Path) -> None:
    path = tmp_path / "c"
    code = SCRIPT.format(tests=str(Path(__file__).parent), path=str(path), at_once=False)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "finished" not in done.stdout
    assert read(path)["tuning"]["step"] == 3


def test_buffers_that_a_process_cannot_have_of_its_own_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tune(SMALL.build(), batches(2), checkpoint=path)
    state = read(path)
    state["processes"][0]["buffers"] = {"1.running_mean": torch.ones(1)}
    path.write_bytes(states.dumped("adv_finetune", state))
    model = SMALL.build()
    before = values(model)
    with pytest.raises(CheckpointError, match=r"its tensors do not fit the model: 1\.running_mean"):
        tune(model, batches(2), checkpoint=path)
    assert values(model) == before


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    tune(SMALL.build(), batches(2), checkpoint=tmp_path / "c")
    other = SMALL.build()
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(CheckpointError, match=r"frozen was '\w{16}', is '\w{16}'"):
        tune(other, batches(2), checkpoint=tmp_path / "c")


def test_a_checkpoint_in_a_missing_folder_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder .* does not exist"):
        tune(SMALL.build(), batches(2), checkpoint=tmp_path / "nowhere" / "c")
