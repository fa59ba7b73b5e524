"""The reproductions of Benz et al. and of Xie and Yuille: rows, commands, what is kept, checks, and bad input."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.benz import checks as benz_checks
from examples.benz import rows as benz_rows
from examples.benz import sets as benz_sets
from examples.benz import work as benz_work
from examples.benz.__main__ import PAPER as BENZ
from examples.benz.work import Benz
from examples.common import checks, commands, data, files, records, scales, training, work
from examples.common.files import Folder, Problem
from examples.common.lab import Lab
from examples.common.scales import FULL, QUICK, Scale
from examples.xie import rows as xie_rows
from examples.xie.__main__ import PAPER as XIE
from examples.xie.work import Doubled, Xie
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery import PGD, adv_finetune, bn_layers
from bnsurgery.analysis import TransferMatrix

PAPERS = {"benz": BENZ, "xie": XIE}
TINY = Scale(
    batch_size=16, most_epochs=2, training=32, measured=8, tested=12, attacked=2, held_out=16, compared_training=32,
    compared_epochs=1, rate=0.02, deepest=26,
)  # fmt: skip


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.read(None)


def opened(images: data.Images, root: Path, program: str, **options: Any) -> Lab:
    given: dict[str, Any] = {"scale": TINY, "device": torch.device("cpu"), "bars": True}
    return PAPERS[program].lab(Folder(root, 2, 0), lambda: images, **given | options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, images: data.Images) -> dict[str, Lab]:
    """All rows of both, in small."""
    root = tmp_path_factory.mktemp("labs")
    labs = {program: opened(images, root / program, program) for program in PAPERS}
    for now in labs.values():
        for key in now.rows:
            assert now.make(key)
            assert now.test(key)
    return labs


def copied(finished: dict[str, Lab], images: data.Images, tmp_path: Path, program: str) -> Lab:
    """The finished results in a folder of their own, which may be harmed."""
    shutil.copytree(finished[program].folder.root, tmp_path / program)
    return opened(images, tmp_path / program, program)


# The rows.


@pytest.mark.parametrize("program", PAPERS)
def test_every_row_comes_after_what_it_needs(program: str) -> None:
    rows = PAPERS[program].lab.rows
    for number, row in enumerate(rows.values()):
        assert set(row.needs) <= set(list(rows)[:number])
    assert set(PAPERS[program].lab.choices) <= set(rows)


def test_what_a_row_of_benz_is_made_of_is_what_it_needs() -> None:
    for row in benz_rows.ROWS.values():
        if isinstance(row, benz_rows.Row):
            assert row.needs == (() if row.data is None else (row.data,))
        elif isinstance(row, benz_rows.SetRow):
            assert row.needs == (row.model, *(() if row.source is None else (row.source,)))
        else:
            assert row.needs == tuple(dict.fromkeys(key for key, _ in row.networks))
            kept = {key: benz_rows.ROWS[key].snapshots for key, _ in row.networks}
            assert all(epoch == 0 or epoch in kept[key] for key, epoch in row.networks)


def test_what_is_needed_comes_first_and_once(images: data.Images, tmp_path: Path) -> None:
    now = opened(images, tmp_path, "benz")
    assert now.needed(["conflicting-bn"]) == ["bn", "adv-bn", "robust", "conflicting", "conflicting-bn"]
    assert now.needed(["bn", "none"]) == ["bn", "none"]


@pytest.mark.parametrize("key", [key for key, row in benz_rows.ROWS.items() if isinstance(row, benz_rows.Row)])
def test_networks_of_benz_are_normalised_as_they_say_and_alike_otherwise(
    key: str, images: data.Images, tmp_path: Path
) -> None:
    now, row = opened(images, tmp_path, "benz"), benz_rows.ROWS[key]
    model, other = now.initial(row), now.initial(benz_rows.ROWS["bn"])
    kinds = {
        "batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.GroupNorm, "instance": nn.InstanceNorm2d,
        "none": nn.Identity,
    }  # fmt: skip
    norms = [module for name, module in model.named_modules() if re.search(r"norm\d$|shortcut\.1$", name)]
    assert len(norms) == 21
    assert all(isinstance(module, kinds[row.norm]) for module in norms)
    if row.norm in ("group", "layer"):
        assert {module.num_groups for module in norms} == {1}  # at width 2 the half of it is 1
    convolutions = [[m.weight for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (model, other)]
    assert all(torch.equal(a, b) for a, b in zip(*convolutions, strict=True))
    bound = 1 / math.sqrt(3 * 9)  # torch's own: U(-1/sqrt(fan in), 1/sqrt(fan in))
    assert 0.8 * bound < float(convolutions[0][0].detach().abs().max()) <= bound


@pytest.mark.parametrize("key", xie_rows.ROWS)
def test_networks_of_xie_have_their_depth_and_their_branches(key: str, images: data.Images, tmp_path: Path) -> None:
    now, row = opened(images, tmp_path, "xie"), xie_rows.ROWS[key]
    options = now.options(row)
    now.scale = FULL
    model = now.initial(row)
    names = list(bn_layers(model))
    count = row.depth + 1
    assert len(names) == (2 if row.bn == "mixture" else 1) * count
    assert {name.rsplit(".", 1)[-1] for name in names} & {"clean", "adv"} == set(row.branches)
    assert options["clean_fraction"] == (0.5 if row.images == "mix" else 0.0)
    assert options["consistent_bn_after"] == (1 if "consistent" in key else None)  # of two epochs
    assert options["attack"].eps == 8 / 255


def test_the_consistent_epochs_are_the_last_fifth(images: data.Images, tmp_path: Path) -> None:
    now = opened(images, tmp_path, "xie", scale=FULL)
    row = xie_rows.ROWS["adv-20-consistent"]
    assert now.options(row)["consistent_bn_after"] == row.consistent == 12
    assert row.epochs == 15
    assert now.begins_as(row) == ("adv-20", 12)
    assert now.forks("adv-20") == {12}
    assert not now.forks("adv-20-consistent")


def test_rates_fall_where_the_papers_do() -> None:
    assert [benz_work.thirds(epoch / 150) for epoch in (49, 50, 99, 100)] == pytest.approx([1, 0.1, 0.1, 0.01])
    from examples.xie.work import parts

    assert [parts(epoch / 110) for epoch in (34, 35, 70, 95)] == pytest.approx([1, 0.1, 0.01, 0.001])


def test_a_mix_has_each_image_twice(images: data.Images, tmp_path: Path) -> None:
    now = opened(images, tmp_path, "xie")
    batches = now.batches(xie_rows.ROWS["mix-20"], images.first(32))
    assert isinstance(batches, Doubled)
    assert len(batches) == 2
    for x, y in batches:
        assert x.shape == (32, 3, 32, 32)
        assert torch.equal(x[:16], x[16:])
        assert torch.equal(y[:16], y[16:])
    (x, _), *_ = now.batches(xie_rows.ROWS["adv-20"], images.first(32))
    assert len(x) == 16


def test_the_attacks_of_benz_are_the_papers() -> None:
    attacks = benz_work.attacks()
    assert [(a.eps, a.steps, a.step_size, a.norm, a.random_start) for a in attacks.values()] == [
        (0.25, 10, 0.1, "l2", False), (1 / 255, 10, 0.001, "linf", False),
    ]  # fmt: skip


# What is kept.


def networks(now: Lab) -> list[str]:
    return [key for key, row in now.rows.items() if not isinstance(row, (benz_rows.SetRow, benz_rows.TransferRow))]


@pytest.mark.parametrize("program", PAPERS)
def test_records_say_what_they_were_made_with_and_of(program: str, finished: dict[str, Lab]) -> None:
    now = finished[program]
    for key in networks(now):
        record = json.loads(now.folder.record(key, "train").read_text("utf-8"))
        assert record["command"].startswith(f"python -m examples.{program}")
        assert {"commit", "versions", "hardware", "started", "calls", "seconds"} <= record.keys()
        assert record["configuration"]["width"] == 2
        assert [found["epoch"] for found in record["measures"]] == [0, 1, 2]
        assert len(record["history"]) == 2
        data = now.folder.weights(key).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record["sha256"]
        tested = json.loads(now.folder.record(key, "evaluate").read_text("utf-8"))
        assert tested["sha256"] == record["sha256"]
        assert tested["command"] == record["command"]
        assert not list(now.folder.interim("").glob(f"{key}.*json"))
        assert not now.folder.interim(f"{key}.checkpoint").exists()


def test_snapshots_are_the_network_after_those_epochs(finished: dict[str, Lab]) -> None:
    now = finished["benz"]
    record = now.trained("bn")
    assert record["snapshots"].keys() == {"1", "2"}  # the later one, and the last of the two epochs
    first, last, end = (now.network("bn", epoch).state_dict() for epoch in (1, 2, None))
    assert all(torch.equal(last[name], end[name]) for name in end)
    assert not all(torch.equal(first[name], end[name]) for name in end)


def test_measures_are_those_of_the_network(finished: dict[str, Lab], images: data.Images) -> None:
    for program, now in finished.items():
        key = next(iter(now.rows))
        x, y = images.tests(TINY.measured)
        model = now.network(key).eval()
        with torch.no_grad():
            wrong = 100 * float((model(x).argmax(1) != y).double().mean())
        assert now.trained(key)["measures"][-1]["clean"] == pytest.approx(wrong), program


@pytest.mark.parametrize("program", PAPERS)
def test_tests_are_those_of_the_network_through_each_branch(
    program: str, finished: dict[str, Lab], images: data.Images
) -> None:
    now = finished[program]
    x, y = images.tests(TINY.tested)
    for key in networks(now):
        tests, model = now.tested(key)["tests"], now.network(key).eval()
        for branch in getattr(now.rows[key], "branches", ()) or ("",):
            if branch:
                from bnsurgery import keep_branch

                alone = keep_branch(model, branch)
            else:
                alone = model
            with torch.no_grad():
                right = alone(x).argmax(1) == y
            found = tests[f"{branch}: clean" if branch else "clean"]
            assert found["held"] == "".join(str(int(flag)) for flag in right)
            assert found["error"] == pytest.approx(100 * float((~right).double().mean()))
        for name, found in tests.items():
            if "held" in found and "clean" not in name.split(": ")[-1]:
                prefix = f"{name.split(': ')[0]}: " if ": " in name else ""
                clean = tests[f"{prefix}clean"]["held"]
                assert all(a <= b for a, b in zip(found["held"], clean, strict=False)), name  # wrong clean is wrong


def test_a_set_holds_images_near_their_source_with_the_labels_it_says(
    finished: dict[str, Lab], images: data.Images
) -> None:
    now = finished["benz"]
    assert isinstance(now, Benz)
    x, y = images.train[0][: TINY.training], images.train[1][: TINY.training]
    random, labels = now.images_of("random")
    assert random.dtype == torch.uint8
    assert random.shape == x.shape
    distance = ((random.float() - x.float()) / 255).flatten(1).norm(dim=1)
    assert float(distance.max()) <= 0.5 + 0.12  # what rounding to 8 bits may add
    assert len(set(labels.tolist())) > 3
    matched, same = now.images_of("robust")
    assert torch.equal(same, y)
    conflicting, after = now.images_of("conflicting")
    assert torch.equal(after, (y + 1) % 10)
    assert float(((conflicting.float() - matched.float()) / 255).flatten(1).norm(dim=1).max()) <= 0.5 + 0.12
    record = now.training("conflicting")
    assert record is not None
    assert record["needs"].keys() == {"bn", "robust"}
    assert record["examples"] == TINY.training


def test_a_network_is_trained_on_its_set(finished: dict[str, Lab], images: data.Images) -> None:
    now = finished["benz"]
    row = now.rows["conflicting-bn"]
    batches = now.batches(row, images)
    assert torch.equal(batches.images, now.images_of("conflicting")[0])
    assert torch.equal(batches.labels, now.images_of("conflicting")[1])


def a_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may begin, and do one thing; when it asks once more, the time is up."""
    left = itertools.cycle([1.0, 1.0, -1.0])
    monkeypatch.setattr(Lab, "left", property(lambda _: next(left)))


def test_a_set_in_parts_is_the_same_set(
    finished: dict[str, Lab], images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benz_sets, "CHUNK", 12)
    now = copied(finished, images, tmp_path, "benz")
    whole = {key: now.images_of(key) for key in ("robust",)}
    now.folder.record("robust", "set").unlink()
    a_little_time(monkeypatch)
    calls = 0
    while now.training("robust") is None:
        calls += 1
        assert now.make("robust") == (calls == 3)  # 12, 12 and 8 images
    record = now.training("robust")
    assert record is not None
    assert len(record["calls"]) == calls
    assert record["examples"] == 32
    images_now, labels = now.images_of("robust")
    assert torch.equal(labels, whole["robust"][1])
    difference = (images_now.int() - whole["robust"][0].int()).abs()
    assert float(difference.double().mean()) < 1  # rounding: other batches
    assert not list(now.folder.interim("").glob("robust.part*"))


def test_the_matrix_is_of_the_networks_it_names(finished: dict[str, Lab], images: data.Images) -> None:
    now = finished["benz"]
    found = now.matrix()
    assert isinstance(found, TransferMatrix)
    assert found.models[0] == "BN, epoch 1"
    assert found.models[-2:] == ("GN, end", "IN, end")
    x, y = images.tests(TINY.measured)
    with torch.no_grad():
        wrong = int((now.network("gn").eval()(x).argmax(1) != y).sum())
    assert found.clean_wrong[-2] == wrong
    assert found.examples == TINY.measured


@pytest.mark.parametrize("kind", ["adv", "mix", "mbn"])
def test_a_consistent_row_is_what_training_from_the_beginning_makes_of_it(
    kind: str, finished: dict[str, Lab], images: data.Images
) -> None:
    now, key = finished["xie"], f"{kind}-20-consistent"
    row, record, before = now.rows[key], now.trained(key), now.trained(f"{kind}-20")
    model = now.initial(row)
    adv_finetune(
        model,
        now.batches(row, images.first(TINY.training)),
        epochs=2,
        step_precision="auto",
        progress=False,
        **now.options(row),
    )
    ours = now.network(key).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    assert record["sha256"] != before["sha256"]
    assert record["history"][0] == before["history"][0]  # seconds too: it was not made again
    assert record["measures"][:2] == before["measures"][:2]
    assert record["history"][1]["loss"] != before["history"][1]["loss"]
    assert record["calls"][:-1] == before["calls"]
    assert before["forks"].keys() == {"1"}
    assert "forks" not in record


def test_a_row_that_begins_as_another_needs_its_checkpoint_as_it_was(
    finished: dict[str, Lab], images: data.Images, tmp_path: Path
) -> None:
    now = copied(finished, images, tmp_path, "xie")
    record, fork = now.folder.record("adv-20-consistent", "train"), now.folder.interim("adv-20.epoch1.checkpoint")
    record.unlink()
    fork.write_bytes(now.folder.interim("mix-20.epoch1.checkpoint").read_bytes())
    message = r"adv-20.epoch1.checkpoint is not the checkpoint of .*adv-20.train.json: remove it, and its epochs are"
    with pytest.raises(Problem, match=message):
        now.make("adv-20-consistent")
    assert not list(now.folder.interim("").glob("adv-20-consistent.*json"))
    now.folder.record("adv-20", "train").unlink()
    with pytest.raises(Problem, match=r"adv-20 is not trained yet in .*, and adv-20-consistent needs it"):
        now.make("adv-20-consistent")


@pytest.mark.parametrize("missing", ["file", "record"])
def test_where_that_checkpoint_is_not_here_the_row_is_trained_from_the_beginning(
    missing: str, finished: dict[str, Lab], images: data.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = copied(finished, images, tmp_path, "xie")
    whole, base = now.trained("adv-20-consistent"), now.folder.record("adv-20", "train")
    now.folder.record("adv-20-consistent", "train").unlink()
    if missing == "file":
        now.folder.interim("adv-20.epoch1.checkpoint").unlink()
    else:
        base.write_text(json.dumps({k: v for k, v in now.trained("adv-20").items() if k != "forks"}), "utf-8")
    assert now.make("adv-20-consistent")
    assert "adv-20.epoch1.checkpoint is not here: its 1 epochs are trained again" in capsys.readouterr().out
    record = now.trained("adv-20-consistent")
    assert record["sha256"] == whole["sha256"]
    assert record["history"][0]["seconds"] != whole["history"][0]["seconds"]
    assert len(record["calls"]) == 1


def test_a_checkpoint_that_goes_missing_on_the_way_is_not_asked_for(
    finished: dict[str, Lab], images: data.Images, tmp_path: Path
) -> None:
    now = copied(finished, images, tmp_path, "xie")
    whole, fork = now.trained("adv-20"), now.folder.interim("adv-20.epoch1.checkpoint")
    now.folder.record("adv-20", "train").unlink()
    measure = now.measures

    def harmful(*given: Any) -> dict[str, Any]:
        fork.unlink(missing_ok=True)  # after the second epoch it has just been made
        return measure(*given)

    now.measures = harmful  # type: ignore[method-assign]
    assert now.make("adv-20")
    assert "forks" not in now.trained("adv-20")
    assert now.trained("adv-20")["sha256"] == whole["sha256"]


@pytest.mark.parametrize("where", ["measures", "calls", "checkpoint"])
def test_a_row_that_begins_as_another_and_is_stopped_there_begins_again(
    where: str, finished: dict[str, Lab], images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = copied(finished, images, tmp_path, "xie")
    whole = now.trained("mbn-20-consistent")
    now.folder.record("mbn-20-consistent", "train").unlink()
    writes = files.write

    def full(path: Path, put: Callable[[Path], object]) -> None:
        if path.name.startswith("mbn-20-consistent.") and where in path.name:
            raise Problem(f"cannot write {path}: no space left")
        writes(path, put)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        patch.setattr(training, "write", full)
        with pytest.raises(Problem, match="no space left"):
            now.make("mbn-20-consistent")
    assert now.make("mbn-20-consistent")
    assert now.trained("mbn-20-consistent")["sha256"] == whole["sha256"]
    assert now.trained("mbn-20-consistent")["history"][0] == whole["history"][0]  # seconds too


@pytest.mark.parametrize(("program", "key"), [("benz", "adv-bn"), ("xie", "mbn-20")])
def test_what_a_budget_cuts_short_ends_with_the_same_bits(
    program: str,
    key: str,
    images: data.Images,
    tmp_path: Path,
    finished: dict[str, Lab],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = opened(images, tmp_path, program)
    calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(Lab, "left", property(lambda _: 1e-3))
        while now.training(key) is None:
            calls += 1
            now.make(key)
    assert calls == 2
    record, whole = now.trained(key), finished[program].trained(key)
    assert record["sha256"] == whole["sha256"]
    assert record["measures"] == whole["measures"]
    assert len(record["calls"]) == 2
    tests = 0
    a_little_time(monkeypatch)
    while now.evaluation(key) is None:
        tests += 1
        now.test(key)
    assert tests > 1
    strip = lambda found: {name: {k: v for k, v in one.items() if k != "seconds"} for name, one in found.items()}  # noqa: E731
    assert strip(now.tested(key)["tests"]) == strip(finished[program].tested(key)["tests"])
    assert len(now.tested(key)["calls"]) == tests


@pytest.mark.parametrize("program", PAPERS)
def test_what_is_finished_is_not_made_again(
    program: str, finished: dict[str, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "adv_finetune", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(benz_sets, "feature_dataset", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(benz_work, "transfer_matrix", lambda *_, **__: pytest.fail("attacked again"))
    now = finished[program]
    assert all(now.make(key) and now.test(key) for key in now.rows)


def test_an_interrupted_epoch_leaves_no_measure_behind(
    images: data.Images, tmp_path: Path, finished: dict[str, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = opened(images, tmp_path, "xie")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the second epoch's measure, before its checkpoint
        patch.setattr("bnsurgery._keeping.Keeper.epoch_done", killed)
        with pytest.raises(KeyboardInterrupt):
            now.make("adv-20")
    assert [
        found["epoch"] for found in json.loads(now.folder.interim("adv-20.measures.json").read_text())["measures"]
    ] == [0, 1]
    assert now.make("adv-20")
    assert now.trained("adv-20")["measures"] == finished["xie"].trained("adv-20")["measures"]


# The commands.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scales, "QUICK", TINY)
    return tmp_path


@pytest.mark.parametrize("program", PAPERS)
def test_table_figures_and_check_go_by_what_is_finished(
    program: str, here: Path, finished: dict[str, Lab], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[program].folder.root, here / "runs" / f"{program}-quick")
    main = PAPERS[program].main
    options = ["--quick", "--width", "2"]
    assert main(["all", *options]) == 0  # nothing is left to be done
    capsys.readouterr()
    folder = here / "runs" / f"{program}-quick" / "w2-seed0"
    assert main(["table", *options]) == 0
    text = (folder / "table.md").read_text("utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    assert "pending" not in text
    for row in PAPERS[program].lab.rows.values():
        if not isinstance(row, benz_rows.TransferRow):
            assert f"| {row.name} |" in text
    assert main(["figures", *options]) == 0
    drawn = capsys.readouterr().out.split()[1::2]
    assert all((here / path).stat().st_size > 10_000 for path in drawn)
    assert len(drawn) == {"benz": 3, "xie": 4}[program]
    assert main(["check", *options]) in (0, 1, 3)
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"(holds|FAILS)  .*: .* \(margin [+-](\d|inf)|waits  .* nothing right", line) for line in lines)
    assert len(lines) == {"benz": 16, "xie": 22}[program]


@pytest.mark.parametrize("program", PAPERS)
def test_what_is_not_there_yet_is_pending(
    program: str, here: Path, finished: dict[str, Lab], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[program].folder.root, here / "runs" / f"{program}-quick")
    folder = here / "runs" / f"{program}-quick" / "w2-seed0"
    for path in folder.glob("*.json"):
        path.unlink()
    main, options = PAPERS[program].main, ["--quick", "--width", "2"]
    assert main(["table", *options]) == 0
    assert "pending" in capsys.readouterr().out
    assert main(["check", *options]) == 3
    assert all(line.startswith("waits  ") for line in capsys.readouterr().out.splitlines())
    assert main(["figures", *options]) == 0
    assert capsys.readouterr().out == ""


def test_a_row_is_trained_after_what_it_needs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert BENZ.main(["train", "random-bn", "--quick", "--width", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if "finished" in line] == [
        "bn: finished", "random: finished", "random-bn: finished",
    ]  # fmt: skip
    assert BENZ.main(["evaluate", "random-bn", "--quick", "--width", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "random-bn: finished"


@pytest.mark.parametrize("program", PAPERS)
def test_settings_are_compared_on_left_out_images(
    program: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, main = next(iter(PAPERS[program].lab.choices)), PAPERS[program].main
    seen: list[Tensor] = []
    tune = commands.tune

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(args[3].batches.images if isinstance(args[3], Doubled) else args[3].images)
        return tune(*args, **options)

    monkeypatch.setattr(commands, "tune", noted)
    assert main(["choose", key, "--quick", "--width", "2"]) == 0
    text = capsys.readouterr().out
    settings = PAPERS[program].lab.choices[key]
    assert text.count("| lr ") == len(settings)
    assert text.count("| yes |") == 1
    assert len(seen) == len(settings)
    train = data.read(None).train[0]
    assert torch.equal(seen[0], train[: TINY.compared_training])
    monkeypatch.setattr(commands, "compared", lambda *_: pytest.fail("compared again"))
    assert main(["choose", key, "--quick", "--width", "2"]) == 0
    assert main(["table", "--quick", "--width", "2"]) == 0
    assert "## Settings compared by `choose`" in capsys.readouterr().out


def test_what_diverges_is_said_and_the_rest_goes_on(
    here: Path, finished: dict[str, Lab], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished["benz"].folder.root, here / "runs/benz-quick")
    folder = here / "runs/benz-quick/w2-seed0"
    for key in ("gn", "robust-none"):
        for path in [*folder.glob(f"{key}.*"), *folder.glob(f"interim/{key}.*")]:
            path.unlink()
    (folder / "transfer.matrix.json").unlink()
    initial = Benz.initial

    def spoiled(self: Benz, row: Any) -> nn.Module:
        model = initial(self, row)
        if row.name == "GN":
            nn.init.constant_(model.logits.bias, math.inf)
        return model

    monkeypatch.setattr(Benz, "initial", spoiled)
    assert BENZ.main(["all", "--quick", "--width", "2"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("benz: error: GN has diverged, its outputs are not finite")
    assert "left out: gn has diverged" in printed.out  # the matrix, which needs it
    assert (folder / "robust-none.evaluate.json").exists()
    assert "| GN | 2 | pending |" in printed.out


# Bad input.


def one_line(main: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize("program", PAPERS)
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train"], "no row given: train takes one of "),
        (["train", "resnet"], "unknown row 'resnet': train takes one of "),
        (["table", "bn"], "table takes no row, got 'bn'"),
        (["check"], "there are no results in "),
        (["learn"], "invalid choice: 'learn'"),
        (["all", "--budget", "0"], "must be a number of minutes above 0"),
        (["all", "--width", "0"], "must be a whole number from 1 to 1024, got '0'"),
        (["all", "--device", "abacus"], "'abacus' is not available here"),
        (["evaluate", "transfer"], "unknown row 'transfer': evaluate takes one of "),
        (["choose", "transfer"], "unknown row 'transfer': choose takes one of "),
    ],
)
def test_wrong_arguments_are_one_line(
    program: str, argv: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = one_line(PAPERS[program].main, argv, capsys)
    assert message.startswith(f"{program}: error: ")
    assert said in message


def test_a_result_of_something_that_was_replaced_is_refused(
    finished: dict[str, Lab], images: data.Images, tmp_path: Path
) -> None:
    now = copied(finished, images, tmp_path, "benz")
    path = now.folder.record("adv-bn", "train")
    record = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(record | {"sha256": "0" * 64}), "utf-8")
    with pytest.raises(
        Problem, match=r"robust\.set\.json was made of a result of adv-bn, and not of the one that is h"
    ):
        now.training("robust")
    with pytest.raises(
        Problem, match=r"adv-bn\.evaluate\.json is of another network than .*adv-bn\.train\.json: remove"
    ):
        now.evaluation("adv-bn")
    with pytest.raises(Problem, match=r"adv-bn\.safetensors is not the network of"):
        now.network("adv-bn")
    path.unlink()
    with pytest.raises(Problem, match="was made of a result of adv-bn, which is not here: remove it"):
        now.training("robust")
    with pytest.raises(Problem, match=r"adv-bn\.evaluate\.json belongs to .*adv-bn\.train\.json, which is not here"):
        now.evaluation("adv-bn")


@pytest.mark.parametrize(
    ("kind", "key"), [("train", "bn"), ("evaluate", "bn"), ("set", "random"), ("matrix", "transfer")]
)
def test_damaged_records_and_those_made_otherwise_are_one_line(
    kind: str, key: str, finished: dict[str, Lab], images: data.Images, tmp_path: Path
) -> None:
    now = copied(finished, images, tmp_path, "benz")
    path = now.folder.record(key, kind)
    read = now.evaluation if kind == "evaluate" else now.training
    whole = path.read_text("utf-8")
    record = json.loads(whole)
    for spoiled in (whole[:-9], "[]", json.dumps({k: v for k, v in record.items() if k not in ("sha256", "matrix")})):
        path.write_text(spoiled, "utf-8")
        with pytest.raises(Problem, match=f"{key}.{kind}.json is cut short or damaged"):
            read(key)
    record["configuration"]["width"] = 64
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(Problem, match=f"{key}.{kind}.json was made otherwise \\(width was 64, is 2\\): remove it"):
        read(key)


def test_flags_that_are_not_of_the_examples_are_damage(
    finished: dict[str, Lab], images: data.Images, tmp_path: Path
) -> None:
    now = copied(finished, images, tmp_path, "xie")
    path = now.folder.record("adv-20", "evaluate")
    record = json.loads(path.read_text("utf-8"))
    record["tests"]["clean"]["held"] = "01"
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(Problem, match="held does not say of each example whether it is right"):
        now.evaluation("adv-20")


def test_images_that_are_missing_or_others_are_said(
    finished: dict[str, Lab], images: data.Images, tmp_path: Path
) -> None:
    now = copied(finished, images, tmp_path, "benz")
    path = now.folder.interim("random.set.safetensors")
    shutil.copy(now.folder.interim("robust.set.safetensors"), path)
    with pytest.raises(Problem, match=r"random\.set\.safetensors is not the set of .*random\.set\.json: remove .*"):
        now.images_of("random")
    path.write_bytes(b"nothing")
    with pytest.raises(Problem, match=r"cannot read .*random\.set\.safetensors"):
        now.images_of("random")
    path.unlink()
    with pytest.raises(Problem, match=r"No such file or directory.*: remove .*, and it is made again"):
        now.images_of("random")


def test_what_is_needed_and_not_there_is_said(images: data.Images, tmp_path: Path) -> None:
    now = opened(images, tmp_path, "benz")
    with pytest.raises(Problem, match=r"bn is not finished yet in .*, and random needs it"):
        now.make("random")
    with pytest.raises(Problem, match=r"random is not trained yet in .*, and random-bn needs it"):
        now.make("random-bn")
    with pytest.raises(Problem, match="bn is not trained yet"):
        now.test("bn")


def test_what_was_begun_of_another_result_is_not_gone_on_with(
    finished: dict[str, Lab], images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benz_sets, "CHUNK", 12)
    now = copied(finished, images, tmp_path, "benz")
    for key, kind in (("random", "set"), ("random-bn", "train")):
        now.folder.record(key, kind).unlink()
    with monkeypatch.context() as patch:
        a_little_time(patch)
        assert not now.make("random")
    log, part = now.folder.interim("random.calls.json"), now.folder.interim("random.part0.safetensors")
    assert part.exists()
    path = now.folder.record("bn", "train")
    record = json.loads(path.read_text("utf-8"))
    state = load_file(now.folder.weights("bn"))
    state["logits.bias"] += 1.0
    model = now.architecture(now.rows["bn"])
    model.load_state_dict(state)
    data_, sha256 = files.serialized(model)
    now.folder.weights("bn").write_bytes(data_)
    path.write_text(json.dumps(record | {"sha256": sha256}), "utf-8")
    message = r"random\.{}\S* was begun of another bn than is here now: remove \S*random\.\*, and random is begun anew"
    with pytest.raises(Problem, match=message.format("calls")):
        now.make("random")
    log.unlink()  # what the message does not say
    with pytest.raises(Problem, match=message.format("part0")):
        now.make("random")
    part.with_suffix(".json").unlink()
    assert now.make("random")


@pytest.mark.parametrize("missing", ["calls.json", "measures.json"])
def test_a_checkpoint_without_what_belongs_to_it_is_not_gone_on_with(
    missing: str, images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = opened(images, tmp_path, "xie")
    with monkeypatch.context() as patch:
        patch.setattr(Lab, "left", property(lambda _: 1e-3))
        assert not now.make("adv-20")
    now.folder.interim(f"adv-20.{missing}").unlink()
    with pytest.raises(
        Problem, match=rf"adv-20\.{missing} is missing, beside .*: remove .*adv-20\.\*, and adv-20 is b"
    ):
        now.make("adv-20")
    for path in now.folder.interim("").glob("adv-20.*"):
        path.unlink()
    assert now.make("adv-20")


def test_a_snapshot_that_is_gone_is_said(images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = opened(images, tmp_path, "benz")
    with monkeypatch.context() as patch:
        patch.setattr(Lab, "left", property(lambda _: 1e-3))
        assert not now.make("bn")
    now.folder.interim("bn.epoch1.safetensors").unlink()
    with pytest.raises(Problem, match=r"cannot read .*bn\.epoch1\.safetensors \(No such file .*\): remove .*bn\.\*"):
        now.make("bn")


def test_two_processes_do_not_work_on_one_row(images: data.Images, tmp_path: Path) -> None:
    now = opened(images, tmp_path, "xie")
    with now.folder.locked("adv-20"), pytest.raises(Problem, match="another process is at work on adv-20"):
        now.make("adv-20")


# The checks.


def flags(right: int, count: int = 1000) -> dict[str, Any]:
    """The first so many are right."""
    return {"held": "1" * right + "0" * (count - right), "examples": count, "error": 100 - 100 * right / count}


class Faked(Xie):
    """Results as they are given."""

    given: dict[str, dict[str, Any]]

    def tested(self, key: str) -> dict[str, Any]:
        if key not in self.given:
            raise files.Pending(f"{key} is not evaluated yet")
        return {"tests": self.given[key]}


def faked_xie(images: data.Images, tmp_path: Path, **robust: int) -> Faked:
    now = Faked(Folder(tmp_path, 2, 0), lambda: images, TINY, torch.device("cpu"))
    now.given = {}
    for name, right in robust.items():
        key = name.replace("_", "-")
        prefix = "adv: " if xie_rows.ROWS[key].branches else ""
        now.given[key] = {
            f"{prefix}pgd-20": flags(right),
            f"{prefix}clean": flags(700),
            "clean: clean": flags(right + 300),
        }
    return now


def verdicts(paper: Any, now: Any) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for check in checks.made(paper.findings(now))[0]:
        found.setdefault(check.finding, []).append(check.holds)
    return found


def test_the_findings_of_xie_hold_where_they_are_in_the_results(images: data.Images, tmp_path: Path) -> None:
    as_in_the_paper = faked_xie(images, tmp_path, adv_20=450, mix_20=300, mbn_20=440, adv_56=480, mix_20_consistent=330)
    assert verdicts(XIE, as_in_the_paper) == {
        "without clean images, one BN is more robust": [True],
        "mixture BN on the mix is more robust than one BN": [True],
        "mixture BN keeps the clean error low": [True],
        "consistent BN makes more robust": [True],
        "deeper is more robust": [True],
    }
    otherwise = faked_xie(images, tmp_path, adv_20=310, mix_20=300, mbn_20=300, adv_56=300, mix_20_consistent=300)
    assert not any(itertools.chain(*verdicts(XIE, otherwise).values()))
    waiting = checks.made(XIE.findings(otherwise))[1]
    assert len(waiting) == 22 - 5
    assert all("is not evaluated yet" in line for line in waiting)


class FakedBenz(Benz):
    """Results as they are given."""

    robust: dict[str, int]
    clean_right: dict[str, int]
    ligs: dict[str, float]
    curve: list[dict[str, Any]]
    readouts: list[dict[str, Any]]
    found: TransferMatrix

    def tested(self, key: str) -> dict[str, Any]:
        ligs = {"mean": self.ligs.get(key, 0.5), "standard_error": 0.005}
        robust = flags(self.robust.get(key, 100))
        return {"tests": {"clean": flags(self.clean_right.get(key, 500)), "l2": robust, "linf": robust, "ligs": ligs}}

    def trained(self, key: str) -> dict[str, Any]:
        return {"measures": self.readouts if key.startswith("conflicting") else self.curve}

    def matrix(self, key: str = "transfer") -> TransferMatrix:
        return self.found


def faked_benz(images: data.Images, tmp_path: Path, *, as_in_the_paper: bool) -> FakedBenz:
    now = FakedBenz(Folder(tmp_path, 2, 0), lambda: images, replace(TINY, measured=1000), torch.device("cpu"))
    sign = 1 if as_in_the_paper else 0
    now.robust = {"bn": 100, "none": 100 + 290 * sign, "random-bn": 0 if sign else 300, "robust-bn": 100 + 350 * sign}
    now.clean_right = {"bn": 950, "none": 920 if sign else 950, "random-bn": 680 if sign else 100}
    now.ligs = {"bn": 0.585, "none": 0.585 + 0.2 * sign, "robust-bn": 0.6 + 0.3 * sign, "random-bn": 0.58 - 0.27 * sign}
    begin = 0.95 if sign else 0.6
    now.curve = [{"ligs": {"mean": mean, "standard_error": 0.01}} for mean in (0.99, begin, 0.585)]
    now.readouts = [{"next": 10.0, "clean": 90.0}, {"next": 30.0, "clean": 80.0}, {"next": 30.0, "clean": 60.0}]
    if not sign:
        now.readouts = [{"next": 10.0, "clean": 90.0}, {"next": 20.0, "clean": 70.0}, {"next": 40.0, "clean": 70.0}]
    names = tuple(benz_work.title_of(*pair) for pair in benz_rows.ROWS["transfer"].networks)
    high = {"no BN, end", "BN, epoch 4"} if sign else set()
    broken = tuple(tuple(600 if name in high else 300 for _ in names) for name in names)
    now.found = TransferMatrix(names, 1000, (100,) * len(names), broken, broken)
    return now


@pytest.mark.parametrize("as_in_the_paper", [True, False])
def test_the_findings_of_benz_hold_where_they_are_in_the_results(
    as_in_the_paper: bool, images: data.Images, tmp_path: Path
) -> None:
    found = verdicts(BENZ, faked_benz(images, tmp_path, as_in_the_paper=as_in_the_paper))
    assert len(list(itertools.chain(*found.values()))) == 16
    assert set(itertools.chain(*found.values())) == {as_in_the_paper}, found


def test_the_standard_error_of_two_readouts_is_that_of_exclusive_outcomes(images: data.Images, tmp_path: Path) -> None:
    now = faked_benz(images, tmp_path, as_in_the_paper=True)
    check = benz_checks._order("", now, first=True)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(torch.tensor([0.3, 0.2, 0.5]), 4000 * 1000, True, generator=generator).view(4000, 1000)
    spread = float(((drawn == 0).double().mean(1) - (drawn == 1).double().mean(1)).std())
    assert check.margin == pytest.approx(0.1 / spread, rel=0.05)


def test_pairs_and_shares_have_their_standard_errors() -> None:
    one, other = "1" * 60 + "0" * 40, "1" * 20 + "0" * 20 + "1" * 10 + "0" * 50
    gain = checks.paired(one, other)
    assert gain.value == pytest.approx(30.0)
    differences = torch.tensor([int(a) - int(b) for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    assert gain.error == pytest.approx(100 * float(differences.std()) / 10, rel=0.05)
    assert checks.share(0, 100).error > 0
    assert checks.share(50, 100).error == pytest.approx(5.0, rel=0.01)
    assert checks.Estimate(3.0, 1.0).minus(checks.Estimate(1.0, 1.0)).error == pytest.approx(math.sqrt(2))


def test_quick_is_small_and_full_is_all() -> None:
    assert FULL.epochs(24) == 24
    assert QUICK.epochs(24) == 2
    assert (FULL.training, FULL.tested) == (50_000, 10_000)


@pytest.fixture(autouse=True)
def nothing_is_left_in_pieces(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_not_finite_has_no_number_in_json() -> None:
    found = records.finite({"a": math.nan, "b": {"c": math.inf, "d": 1.0}, "e": "f"})
    assert found == {"a": None, "b": {"c": None, "d": 1.0}, "e": "f"}


def test_weights_are_those_of_the_architecture(finished: dict[str, Lab]) -> None:
    for now in finished.values():
        for key in networks(now):
            state = load_file(now.folder.weights(key))
            assert state.keys() == now.architecture(now.rows[key]).state_dict().keys()
            if getattr(now.rows[key], "norm", "batch") != "batch":
                assert not [m for m in now.architecture(now.rows[key]).modules() if isinstance(m, _BatchNorm)]


def test_the_adversarial_networks_of_benz_are_trained_on_their_attack(images: data.Images, tmp_path: Path) -> None:
    now = opened(images, tmp_path, "benz")
    attack = now.options(benz_rows.ROWS["adv-bn"])["attack"]
    assert isinstance(attack, PGD)
    assert (attack.eps, attack.norm, attack.steps, attack.step_size) == (0.5, "l2", 7, 0.1)
    assert now.options(benz_rows.ROWS["bn"])["attack"] is None


def test_the_papers_network_has_its_size_and_a_folder_of_its_own(
    images: data.Images, tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = opened(images, tmp_path, "benz")
    now.folder = Folder(tmp_path, 64, 0, "resnet18")
    model = now.architecture(benz_rows.ROWS["bn"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert len(bn_layers(model)) == 20
    assert now.settings(benz_rows.ROWS["bn"])["network"] == "resnet18"
    assert BENZ.main(["train", "bn", "--quick", "--width", "2", "--network", "resnet18"]) == 0
    assert (here / "runs/benz-quick/resnet18-w2-seed0/bn.train.json").exists()
    assert "invalid choice: 'vgg'" in one_line(BENZ.main, ["train", "bn", "--network", "vgg"], capsys)
    assert "unrecognized arguments" in one_line(XIE.main, ["train", "adv-20", "--network", "resnet18"], capsys)


# The committed results.

RESULTS = Path(__file__).parents[1] / "examples" / "results"
COMMITTED = [path for program in PAPERS for path in sorted((RESULTS / program).glob("w*-seed*/*.json"))]


def committed(path: Path) -> Lab:
    """What reads them: without images, at full scale."""
    width, seed = (int(number) for number in re.findall(r"\d+", path.parent.name))
    program = path.parents[1].name

    def no_images() -> data.Images:
        raise AssertionError("results are read without images")

    folder = Folder(path.parents[1], width, seed)
    return PAPERS[program].lab(folder, no_images, FULL, torch.device("cpu"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parents[1].name}-{path.name}")
def test_committed_records_are_of_the_rows_as_they_are_and_say_where_they_come_from(path: Path) -> None:
    now, record = committed(path), json.loads(path.read_text("utf-8"))
    key, kind = path.name.split(".")[0], path.name.split(".")[-2]
    if kind == "choose":
        key = next(row for row in now.choices if path.name.startswith(f"{row}-"))
        names = [files.label(settings) for settings in now.choices[key]]
        assert path.name.split("-", key.count("-") + 1)[-1].removesuffix(".choose.json") in names
    else:
        assert (now.evaluation(key) if kind == "evaluate" else now.training(key)) == record
    for call in [record, *record["calls"]]:
        assert re.fullmatch(r"[0-9a-f]{40}", call["commit"]), "the code is not that of a commit"
        assert call["command"].startswith(f"python -m examples.{now.program} ")
        assert call["seed"] == now.folder.seed
        assert {"torch", "bnsurgery"} <= call["versions"].keys()
        assert call["hardware"]
    if kind == "train":
        epochs = now.rows[key].epochs
        assert [found["epoch"] for found in record["measures"]] == list(range(epochs + 1))
        assert [found["epoch"] for found in record["history"]] == list(range(epochs))


@pytest.mark.parametrize("folder", sorted({path.parent for path in COMMITTED}), ids=lambda path: path.parent.name)
def test_the_committed_table_is_that_of_the_records(folder: Path) -> None:
    now = committed(folder / "any.json")
    paper = PAPERS[now.program]
    assert (folder / "table.md").read_text("utf-8") == paper.tables(now) + commands.chosen(now)
    for name in paper.figures(now):
        assert (folder / f"{name}.png").stat().st_size > 10_000
