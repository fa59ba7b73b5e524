"""Several processes that work on one run: the same as one where mathematics says so, and never for ever."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

import together
from bnsurgery import BNSurgeryError, LostProcessError, processes
from bnsurgery import _states as states
from bnsurgery._ranks import talking

TESTS = Path(__file__).parent
SCRIPT = str(TESTS / "together.py")


def start(job: str, world: int, out: str, folder: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "PYTHONPATH": str(TESTS)}
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, job, out, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finished(job: str, world: int, folder: Path) -> list[Any]:
    """What each of so many processes has come to."""
    out = str(folder / f"{job}{world}")
    started = start(job, world, out, folder)
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(world)]


@cache
def results(job: str, world: int) -> list[Any]:
    return finished(job, world, Path(mkdtemp()))


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=tolerance, atol=tolerance), name


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def alike(one: Any, other: Any, tolerance: float) -> None:
    """Two records, their floating point numbers to a tolerance."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            alike(one[key], other[key], tolerance)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            alike(a, b, tolerance)
    else:
        assert one == (pytest.approx(other, rel=tolerance, abs=tolerance) if isinstance(one, float) else other)


@pytest.mark.parametrize("world", [2, 4])
def test_with_batch_statistics_of_all_they_end_as_one_process_does(world: int) -> None:
    alone, *_ = results("whole", 1)
    together_ = results("whole", world)
    assert len(alone) == 16
    for case, expected in alone.items():
        tolerance = 1e-5 if case == "float32" else 1e-9
        for found in together_:
            close(found[case]["state"], expected["state"], tolerance)
            alike(found[case]["record"], expected["record"], tolerance)
            assert equal(found[case]["state"], together_[0][case]["state"]), case


@pytest.mark.parametrize("world", [2, 4])
def test_what_each_does_by_itself_is_the_same_in_all(world: int) -> None:
    found = results("shares", world)
    for case in ("buffers", "sampler", "own", "wrapped", "other weights"):
        assert all(equal(found[0][case]["state"], other[case]["state"]) for other in found), case
        assert all(found[0][case]["record"] == other[case]["record"] for other in found), case
    # Running statistics of its own in each, and one set of parameters.
    for name in found[0]["none"]["state"]:
        same = torch.equal(found[0]["none"]["state"][name], found[1]["none"]["state"][name])
        assert same == ("running" not in name), name
    assert found[0]["masks"] != found[1]["masks"]  # each draws its own dropout
    # A callback of one process ends the run of all.
    assert [other["ended"] for other in found] == [("callback", 4)] * world
    assert [other["ended by one"] for other in found] == ["callback"] * world
    assert [other["ended at a step"] for other in found] == [("callback", [0, 1, 2])] * world
    assert equal(found[0]["recalibrated"], found[-1]["recalibrated"])


def test_statistics_that_are_averaged_are_those_of_the_shares() -> None:
    """By hand: the mean of all examples, and the mean of the shares' unbiased variances."""
    model = together.network("dense")
    x, _ = together.batches()[0]
    z = model[1](x.flatten(1)).detach()
    expected = model[2].running_mean * 0.9 + 0.1 * z.mean(0)
    variance = model[2].running_var * 0.9 + 0.1 * torch.stack([z[0::2].var(0), z[1::2].var(0)]).mean(0)
    folder = Path(mkdtemp())
    found = finished("one_batch", 2, folder)
    assert torch.allclose(found[0]["state"]["2.running_mean"], expected, rtol=1e-12)
    assert torch.allclose(found[0]["state"]["2.running_var"], variance, rtol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_what_each_was_given_adds_up_to_one_batch(world: int) -> None:
    for case in ("own", "wrapped"):
        model = together.network()
        data = together.SMALL.example(8 * world, together.DTYPE), together.SMALL.labels(8 * world)
        expected = together.tuned(model, data=[data], epochs=1, attack=None, train="bn-params", schedule="step")
        close(results("shares", world)[0][case]["state"], expected["state"], 1e-9)


@pytest.mark.parametrize("world", [2, 4])
def test_statistics_are_merged_exactly(world: int) -> None:
    model = together.network()
    together.recalibrate_bn(model, [x for x, _ in together.batches()[:3]])
    first = next(iter(together.bn_layers(model)))
    # What the first layer sees does not hang on how the batches were shared.
    found = results("shares", world)[0]["recalibrated"][first]
    assert torch.allclose(found, together.bn_layers(model)[first].running_var, rtol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_an_evaluation_is_that_of_one_process(world: int) -> None:
    (alone,) = results("evaluated", 1)
    for found in results("evaluated", world):
        assert found["rows"] == alone["rows"]
        for name in ("robust", "correct", "adversarial"):
            assert torch.equal(found[name], alone[name]), name
    assert 0 < int(alone["robust"].sum()) < int(alone["correct"].sum())


def test_what_does_not_go_together_is_refused_by_all() -> None:
    for said in results("differing", 2):
        assert re.search(r"given different batches, of which each was to take its rows.*shard=\"none\"", said["data"])
        assert "must have the same (epochs: 2, 3; seed: 0, 1)" in said["arguments"]
        assert "checkpoint= must be given to all processes, or to none; the first alone writes" in said["checkpoint"]
        assert "where all must have the same (attacks: " in said["evaluate arguments"]
        assert "; eps: 0.1, 0.2)" in said["evaluate arguments"]
        assert re.search(r"must be given equally many batches, got 4, 3: see DistributedSampler", said["lengths"])
        assert re.search(r"given different data: evaluate shares the work", said["evaluate data"])
        assert re.search(r"given different model: evaluate shares the work", said["evaluate model"])


def test_a_number_that_goes_wrong_in_one_is_skipped_by_all() -> None:
    first, second = results("troubled", 2)
    for found in (first, second):
        assert found["skipped"]["record"]["history"][0]["skipped"] == 1
        assert equal(found["skipped"]["state"], found["without"]["state"])
        assert found["left out"]["record"]["history"][0]["left_out"] == 1
        assert equal(found["left out"]["state"], found["left out without"]["state"])
    assert "a number in another process is not finite" in first["said"][0]
    assert "what the data gives as inputs is not finite" in second["said"][0]
    assert "a BN layer of another process was given one value per channel" in first["left out said"][0]
    assert "a BN layer was given one value per channel" in second["left out said"][0]


def test_a_number_that_goes_wrong_where_layers_wait_for_one_another_is_skipped_by_all() -> None:
    first, second = results("waiting", 2)
    for found in (first, second):
        assert found["skipped"]["record"]["history"][0]["skipped"] == 1
        assert equal(found["skipped"]["state"], found["without"]["state"])
        assert found["both"]["record"]["history"][0]["skipped"] == 1
        assert found["both"]["record"]["history"][0]["left_out"] == 0
        assert found["both"]["record"]["steps"] == 2
        assert "is not finite; the model is as after the last whole step" in found["both raised"]
    assert "a number in another process is not finite" in first["said"][0]
    assert "what the data gives as inputs is not finite" in second["said"][0]
    assert "what the data gives as inputs is not finite" in first["both said"][0]
    assert "a number in another process is not finite" in second["both said"][0]


def test_one_example_in_a_process_is_enough_where_all_normalise_together() -> None:
    x, y = together.batches()[1]
    rows = [0, 1, 1, 2, 3]  # four of the first process, and one of the second, in any order
    model = together.network("dense")
    expected = together.tuned(model, data=[(x[rows], y[rows])], epochs=1, attack=None, train="all")
    for found in results("waiting", 2):
        close(found["one and four"]["state"], expected["state"], 1e-9)


def test_statistics_that_no_step_moves_keep_their_bits() -> None:
    for found in results("still", 2):
        for name, before in found["before"].items():
            after = found["after"][name]
            kept = [key for key in before if "running" in key and (name != "branch" or ".clean." in key)]
            assert len(kept) >= 4, name
            assert all(torch.equal(before[key], after[key]) for key in kept), name
        moved = found["after"]["branch"]
        adversarial = [key for key in moved if "running" in key and ".adv." in key]
        assert not all(torch.equal(found["before"]["branch"][key], moved[key]) for key in adversarial)


@pytest.mark.parametrize("sync", ["buffers", "batch"])
def test_where_the_data_of_one_ends_first_all_say_so_after_the_last_whole_step(sync: str) -> None:
    for found in results("unequal", 2):
        assert "the data of 1 of 2 processes has ended before that of the others" in found[sync]
        assert equal(*found[sync, "states"])


def test_data_that_differs_later_in_an_epoch_is_refused() -> None:
    for found in results("unequal", 2):
        for case in ("later", "cut short"):
            assert "the processes were given different batches in this epoch" in found[case], case


def test_runs_that_are_broken_off_go_on_with_what_each_process_has_of_its_own(tmp_path: Path) -> None:
    for found in finished("going_on", 2, tmp_path):
        refused = found.pop("shard")
        assert "each process was given batches of its own, and now it is rows of each batch (shard=)" in refused
        assert found.keys() == {"unequal", "instance norm", "none", "buffer", "length", "copies"}
        for name, (expected, again) in found.items():
            assert equal(expected["state"], again["state"]), name
            assert expected["record"] == again["record"], name


def test_statistics_that_a_sum_over_examples_would_overflow_are_averaged(tmp_path: Path) -> None:
    for found in finished("limits", 2, tmp_path):
        for train in ("bn-stats", "bn"):
            variance, skipped = found[train]
            assert skipped == 0
            assert torch.allclose(variance, torch.full((12,), 5.4e18**2 * 8 / 7))
        assert "of 2 processes 1 have clean examples in a batch, and 2 have adversarial ones" in found["parts"]
        assert "the data of 1 of 2 processes has no batch, and that of the others has" in found["empty"]


def test_parameters_that_become_different_end_the_run_in_all(tmp_path: Path) -> None:
    for found in finished("apart", 2, tmp_path):
        assert all(
            said.startswith("the parameters or statistics of the processes have become different")
            for said, _ in found.values()
        )
        # Of three epochs of four steps; the callback changes one in the first, the optimizers in the second.
        assert {name: epochs for name, (_, epochs) in found.items()} == {
            "callback": [],
            "callback of the last epoch": [0, 1, 2],
            "statistics": [0],
            "noise": [0],
            "nan": [0],
            "nan, with a callback of each step": [0],
            "kept": [0],
        }
    assert states.load(tmp_path / "apart", "adv_finetune")["tuning"]["step"] == 4


def test_what_the_first_process_cannot_write_is_said_by_all(tmp_path: Path) -> None:
    for found in finished("unwritable", 2, tmp_path):
        assert re.search("the folder .*none' does not exist", found["folder"])
        for name in ("tune", "evaluate"):
            assert re.search(r"cannot read the checkpoint .*c': Is a directory", found[name])


# When a process is lost.


def test_a_lost_process_ends_the_others_soon_and_starting_all_again_goes_on(tmp_path: Path) -> None:
    began = time.monotonic()
    lost = start("dying", 2, str(tmp_path / "out"), tmp_path)
    said = [process.communicate(timeout=120)[1] for process in lost]
    assert time.monotonic() - began < 60
    assert lost[1].returncode == 9
    assert lost[0].returncode not in (0, 9)
    assert "LostProcessError: another process of this run is gone, or has not answered in time" in said[0]
    assert "torchrun --max-restarts" in said[0]
    again, expected = finished("dying", 2, tmp_path), finished("uninterrupted", 2, tmp_path)
    for found, whole in zip(again, expected, strict=True):
        assert equal(found["state"], whole["state"])
        assert found["record"] == whole["record"]


def test_a_process_that_does_not_answer_is_taken_for_lost(tmp_path: Path) -> None:
    first, second = start("hanging", 2, str(tmp_path / "out"), tmp_path)
    said = first.communicate(timeout=55)[1]
    second.kill()
    second.communicate()
    assert first.returncode != 0
    assert "LostProcessError" in said


def test_where_one_is_told_to_end_all_save_and_end(tmp_path: Path) -> None:
    first, second = start("told", 2, str(tmp_path / "out"), tmp_path)
    said = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert second.returncode == -15
    assert first.returncode == 1
    assert "a process of this run has been told to end; starting all of them again goes on" in said[0]
    assert finished("told", 2, tmp_path)[0]["record"]["steps"] == 8


def test_one_that_is_told_to_end_late_in_a_step_ends_with_the_others(tmp_path: Path) -> None:
    first, second = start("late", 2, str(tmp_path / "out"), tmp_path)
    said = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert second.returncode == -15, said[1]
    assert first.returncode == 1
    assert "a process of this run has been told to end; starting all of them again goes on" in said[0]
    steps = states.load(tmp_path / "t", "adv_finetune")["tuning"]["step"]
    assert steps == 3
    assert finished("late", 2, tmp_path)[0]["record"]["steps"] == 8


def test_torchrun_starts_a_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    done = subprocess.run(
        [*command, "--master-port", str(port), SCRIPT, "dying", str(tmp_path / "out"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    expected = finished("uninterrupted", 2, tmp_path)
    found_ = torch.load(tmp_path / "out.0", weights_only=True)
    assert equal(found_["state"], expected[0]["state"])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_goes_on_where_mathematics_allows(tmp_path: Path, before: int, after: int) -> None:
    expected = alone_without_a_break()
    (tmp_path / "stop").write_text("3")
    for found in finished("another_number", before, tmp_path):
        assert found == {"state": None, "said": []}
    state = states.load(tmp_path / "n", "adv_finetune")
    assert state["tuning"]["step"] == 3
    assert [bool(own["buffers"]) for own in state["processes"]] == [before > 1] * before
    (tmp_path / "stop").unlink()
    first, *others = finished("another_number", after, tmp_path)
    for found in (first, *others):
        close(found["state"], expected, 1e-9)
        assert found["record"]["steps"] == 8
    assert len(first["said"]) == 1
    assert (
        f"is of {before} processes, and these are {after}: the run goes on, and may not end with the same bits"
        in first["said"][0]
    )
    assert all(found["said"] == [] for found in others)


@cache
def alone_without_a_break() -> dict[str, Tensor]:
    found = results("another_number", 1)[0]
    assert found["said"] == []
    state: dict[str, Tensor] = found["state"]
    return state


# The context.


def test_alone_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with processes(device="cpu") as own:
        assert (own.world, own.rank, own.first, own.device) == (1, 0, True, torch.device("cpu"))
        assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("process_group")
def test_a_group_that_is_there_is_used_and_stays() -> None:
    with processes(device="cpu") as own:
        assert (own.world, own.rank) == (1, 0)
    assert torch.distributed.is_initialized()


def test_an_environment_that_lacks_something_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(BNSurgeryError, match="WORLD_SIZE is 2, and RANK, MASTER_PORT not set: start the script with"):
        processes().__enter__()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BNSurgeryError, match=r"this is process 2 of its machine, from 0, which has 2 GPUs: start no"):
        processes().__enter__()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9"), True),
        (torch.distributed.DistBackendError("anything"), True),
        (RuntimeError("Tensors must be contiguous"), False),
        (torch.OutOfMemoryError("CUDA out of memory while making a connection"), False),
    ],
)
def test_only_what_others_are_gone_for_is_a_lost_process(error: RuntimeError, lost: bool) -> None:
    with pytest.raises(LostProcessError if lost else type(error)) as caught, talking():
        raise error
    assert lost != (caught.value is error)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_above_zero(timeout: float) -> None:
    with pytest.raises(ValueError, match=f"timeout must be above 0, got {timeout}"):
        processes(timeout=timeout).__enter__()
