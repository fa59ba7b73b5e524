"""Checkpoints of evaluate: an evaluation that is stopped or killed goes on, to the same result."""

from __future__ import annotations

import math
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsurgery import PGD, BNSurgeryWarning, CheckpointError, Evaluation, evaluate
from bnsurgery import _states as states
from networks import SMALL
from test_attacks import World, lived_in
from test_finetuning import values
from test_resuming import Bombs, FullDisk

EPS = 0.1
COUNT, SIZE = 24, 4


class Stop(BaseException):
    """As if the process had gone."""


class Half:
    """Breaks what it is told to, by noise of its own; stops at a call, and counts them."""

    def __init__(self, stop: int | None = None, strength: float = EPS) -> None:
        self.stop, self.strength, self.calls = stop, strength, 0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise Stop
        return (x + self.strength * torch.randn_like(x).sign()).clamp(0, 1)


class Other(Half):
    """Known by another name."""


def data() -> tuple[Tensor, Tensor]:
    model = SMALL.build().eval()
    x = SMALL.example(COUNT)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 10  # some are wrong clean
    return x, y


def measure(*attacks: object, model: nn.Module | None = None, **options: object) -> Evaluation:
    chosen = {"eps": EPS, "batch_size": SIZE, "progress": False, "checkpoint_every": 0, **options}
    return evaluate(model or SMALL.build(), chosen.pop("data", data()), attacks=attacks, **chosen)


def plain(result: Evaluation) -> tuple[object, ...]:
    rows = [replace(row, seconds=0) for row in result.rows]
    kept = None if result.adversarial is None else result.adversarial.tolist()
    return rows, result.correct.tolist(), result.robust.tolist(), kept, replace(result, rows=())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stop", range(1, 9))
def test_an_evaluation_killed_anywhere_gives_the_same(tmp_path: Path, stop: int, keep: bool) -> None:
    pgd = PGD(EPS, 2, EPS / 2)
    expected = measure(pgd, Half(), Half(strength=EPS / 2), "pgd-3", keep_adversarial=keep)
    first, second = Half(stop), Half(stop - 5 if stop > 5 else None, EPS / 2)
    options = {"checkpoint": tmp_path / "c", "keep_adversarial": keep}
    try:
        measure(pgd, first, second, "pgd-3", **options)
    except Stop:
        pass
    else:
        pytest.fail("was not stopped")
    before = first.calls + second.calls
    first, second = Half(), Half(strength=EPS / 2)
    torch.manual_seed(stop)
    assert plain(measure(pgd, first, second, "pgd-3", **options)) == plain(expected)
    total = Half(), Half(strength=EPS / 2)
    measure(pgd, *total, "pgd-3")
    assert first.calls + second.calls == sum(half.calls for half in total) - (before - 1)


def test_a_finished_evaluation_is_read_without_an_attack(tmp_path: Path) -> None:
    expected = measure(Half(), checkpoint=tmp_path / "c", keep_adversarial=True)
    again = Half(stop=1)
    result = measure(again, checkpoint=tmp_path / "c", keep_adversarial=True)
    assert again.calls == 0
    assert plain(result) == plain(expected)
    assert result.rows == expected.rows  # the seconds too


def test_parts_of_autoattack_go_on_from_the_part_that_was_under_way(tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack")
    expected = measure("apgd-ce", "square")

    with pytest.raises(Stop):
        measure("apgd-ce", Half(stop=2), "square", checkpoint=tmp_path / "c")
    state = states.load(tmp_path / "c", "evaluate")
    assert [row["attack"] for row in state["rows"]] == ["apgd-ce"]
    assert state["under_way"]["batches"] == 1
    result = measure("apgd-ce", Half(), "square", checkpoint=tmp_path / "c")
    assert replace(result.rows[0], seconds=0) == replace(expected.rows[0], seconds=0)


def other_model() -> nn.Module:
    model = SMALL.build()
    with torch.no_grad():
        model[1].running_var.mul_(1.001)
    return model


def other_data() -> tuple[Tensor, Tensor]:
    x, y = data()
    return x.flip(0), y


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"eps": 0.2}, "eps was 0.1, is 0.2"),
        ({"batch_size": 5}, "batch_size was 4, is 5"),
        ({"engine": "plain"}, "engine was"),
        ({"keep_adversarial": True}, "keep_adversarial was False, is True"),
        ({"max_examples": 10}, "data was"),
        ({"data": other_data()}, "data was"),
        ({"model": other_model()}, "model was"),
        ({"attacks": (Other(),)}, "attacks was ['Half'], is ['Other']"),
        ({"attacks": (PGD(EPS, 3),)}, "attacks was ['Half'], is [\"PGD(eps=0.1, steps=3,"),
        ({"attacks": ("pgd-3",)}, "attacks was ['Half'], is [\"pgd-3: PGD(eps=0.1, steps=3,"),
        ({"mean": [0.0], "std": [1.0]}, "mean was None, is [0.0]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_evaluation_is_refused_with_what_differs(
    tmp_path: Path, options: dict[str, object], difference: str
) -> None:
    measure(Half(), checkpoint=tmp_path / "c")
    attacks = options.pop("attacks", (Half(stop=1),))
    with pytest.raises(CheckpointError, match=re.escape(difference)) as caught:
        measure(*attacks, checkpoint=tmp_path / "c", **options)
    assert "use another path, or remove the file" in str(caught.value)


def test_what_happens_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measure(Half())
    with monkeypatch.context() as context:
        FullDisk(context, room=0)
        with pytest.raises(OSError, match="No space left"):
            measure(Half(stop=1), checkpoint=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as context:
        FullDisk(context, room=3)
        with pytest.warns(BNSurgeryWarning, match="No space left on device.: the evaluation goes on"):
            assert plain(measure(Half(), checkpoint=tmp_path / "c")) == plain(expected)
    rest = Half()
    assert plain(measure(rest, checkpoint=tmp_path / "c")) == plain(expected)
    assert rest.calls == len(range(0, int(expected.correct.sum()), SIZE)) - 2


def test_where_the_newest_is_damaged_the_one_before_it_is_used(tmp_path: Path) -> None:
    expected = measure(Half(), checkpoint=tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[:-1])
    rest = Half()
    with pytest.warns(BNSurgeryWarning, match="the checksum does not match.*the one before it is used"):
        assert plain(measure(rest, checkpoint=tmp_path / "c")) == plain(expected)
    assert rest.calls == 0  # the last batch was done, the row not yet written


MADE_UP: dict[str, Callable[[dict[str, object]], object]] = {
    "hollow": lambda state: {},
    "other lengths": lambda state: {**state, "robust": torch.ones(3, dtype=torch.bool)},
    "numbers for masks": lambda state: {**state, "correct": torch.ones(COUNT)},
    "robust and wrong": lambda state: {**state, "robust": torch.ones(COUNT, dtype=torch.bool)},
    "other rows": lambda state: {**state, "rows": [{"attack": "x"}]},
    "a row too many": lambda state: {**state, "rows": [*state["rows"], *state["rows"]]},
    "an attack after the last": lambda state: {**state, "under_way": {"number": 1, "left": torch.arange(2)}},
    "an example that is none": lambda state: {
        **state,
        "rows": [],
        "under_way": {"number": 0, "left": torch.tensor([COUNT])},
    },
    "masks that are lists": lambda state: {**state, "correct": [True] * COUNT},
}


@pytest.mark.parametrize("kind", MADE_UP)
def test_a_state_that_nobody_wrote_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    measure(Half(), checkpoint=path)
    path.write_bytes(states.dumped("evaluate", MADE_UP[kind](states.load(path, "evaluate"))))
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(CheckpointError, match="is damaged"):
        measure(Half(stop=1), checkpoint=path, model=model)
    assert world.unchanged()


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(pickle.dumps(Bombs(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match="this is no state of bnsurgery"):
        measure(Half(stop=1), checkpoint=tmp_path / "c")
    assert not (tmp_path / "executed").exists()


def test_an_interrupt_saves_what_is_done_and_comes_at_once(
    tmp_path: Path, handlers: dict[int, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted, calls = Half(), Half.__call__

    def call(self: Half, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self is interrupted and self.calls == 2:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("went on")
        return calls(self, model, x, y)

    monkeypatch.setattr(Half, "__call__", call)
    expected = measure(Half())
    with pytest.raises(KeyboardInterrupt):
        measure(interrupted, checkpoint=tmp_path / "c", checkpoint_every=math.inf)
    assert states.load(tmp_path / "c", "evaluate")["under_way"]["batches"] == 2
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert plain(measure(Half(), checkpoint=tmp_path / "c")) == plain(expected)


def test_a_process_that_is_told_to_terminate_saves_and_does(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import signal, torch
torch.set_num_threads(1)
from test_evaluating_again import Half, measure

class Told(Half):
    def __call__(self, model, x, y):
        if self.calls == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(model, x, y)

measure(Told(), checkpoint={str(tmp_path / "c")!r}, checkpoint_every=1e9)
print("finished")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "finished" not in done.stdout
    assert states.load(tmp_path / "c", "evaluate")["under_way"]["batches"] == 2


@pytest.mark.parametrize("every", [-1, math.nan])
def test_seconds_below_zero_are_refused(every: float) -> None:
    with pytest.raises(ValueError, match=f"checkpoint_every must be at least 0, got {every}"):
        measure(Half(), checkpoint_every=every)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder .* does not exist"):
        measure(Half(stop=1), checkpoint=tmp_path / "nowhere" / "c")


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(0, 3))
def test_what_comes_of_a_batch_hangs_on_its_number_alone(size: int, seed: int) -> None:
    # Else processes that share the batches could not come to the same.
    one = measure(PGD(EPS, 1, EPS), batch_size=size, seed=seed, keep_adversarial=True)
    model = SMALL.build()
    before = values(model)
    two = measure(PGD(EPS, 1, EPS), batch_size=size, seed=seed, keep_adversarial=True, model=model)
    assert plain(one) == plain(two)
    assert values(model) == before
