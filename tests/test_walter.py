"""The reproduction of Walter, Stutz and Schiele: rows, commands, what is kept, checks, and bad input."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.common import data, files, work
from examples.common.checks import Estimate
from examples.common.files import Folder, Problem, label
from examples.resnet import resnet20
from examples.walter import __main__ as walter
from examples.walter import checks, choosing, evaluating, figures, planning, tables, training
from examples.walter.results import Results
from examples.walter.rows import CHOICES, ROWS, described, needed, table
from examples.walter.scales import FULL, QUICK, Scale
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery import PGD, evaluate, fold_bn, save_bn_patch

TINY = Scale(
    batch_size=16,
    most_epochs=1,
    training=48,
    clean=(8, 24),
    robust=8,
    chunk=4,
    held_out=64,
    compared_training=128,
    compared_epochs=1,
)
PAPER = {
    "NORMAL": (4.11, 99.8),
    "NORMAL +BN ONLY": (46.11, 99.7),
    "NORMAL +BN ONLY +log+conv1": (35.89, 99.6),
    "ADV": (17.67, 58.4),
    "ADV +BN ONLY": (43.33, 98.0),
    "ADV +BN ONLY +log+conv1": (35.22, 98.1),
    "BN STATS (no reset)": (6.44, 99.9),
    "BN STATS (reset)": (6.33, 99.6),
    "BN ONLY PARAMS": (77.11, 85.3),
    "BN PARAMS": (29.67, 70.5),
    "BN PARAMS +log+conv1": (26.89, 68.2),
}


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.read(None)


def context(images: data.Images, root: Path, **options: Any) -> training.Context:
    given: dict[str, Any] = {"scale": TINY, "device": torch.device("cpu"), "bars": True}
    return training.Context(Folder(root, 2, 0), lambda: images, **given | options)


# The rows.


def test_the_eleven_rows_are_those_of_table_2() -> None:
    assert {row.name: row.paper for row in table().values()} == PAPER
    assert list(table())[:1] == ["normal"]


def test_every_row_comes_after_its_start() -> None:
    for number, row in enumerate(ROWS.values()):
        assert row.start is None or row.start in list(ROWS)[:number]
    assert needed(["bn-stats-log"]) == ["normal", "bn-stats", "bn-stats-log"]
    assert needed(["adv"]) == ["adv"]
    assert set(CHOICES) < set(ROWS)


def test_settings_have_names_for_files_and_for_tables() -> None:
    settings = {"lr": 0.0003, "gamma": "one", "eps": 2 / 255, "epochs": 8}
    assert label(settings) == "lr0.0003-gammaone-eps0.00784314-epochs8"
    assert described(settings) == "lr 0.0003, gamma one, eps 2/255, epochs 8"
    assert len({label(one) for one in CHOICES["adv-bn-only"]}) == len(CHOICES["adv-bn-only"])


def test_the_attack_is_the_papers_and_smaller_radii_take_smaller_steps() -> None:
    attack = ROWS["adv"].attack()
    assert attack is not None
    assert (attack.eps, attack.steps, attack.step_size, attack.best) == (8 / 255, 10, 0.007, True)
    small = ROWS["bn-stats-eps2"].attack()
    assert small is not None
    assert (small.eps, small.step_size) == pytest.approx((2 / 255, 0.00175))
    assert ROWS["normal"].attack() is None


BN = {"norm1.weight", "norm1.bias"}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def changes(key: str, model: nn.Module) -> set[str]:
    """The entries of the state_dict that a row is to change, written out by what Table 1 says of it."""
    everything = set(model.state_dict()) - {"whiten.mean", "whiten.std"}
    of_bn = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    statistics = {f"{name}.{part}" for name in of_bn for part in STATISTICS}
    parameters = {f"{name}.{part}" for name in of_bn for part in ("weight", "bias")}
    ends = {"conv1.weight", "logits.weight", "logits.bias"}
    if key in ("normal", "adv"):
        return everything
    if key.startswith("bn-only-params"):
        return parameters
    if key == "bn-stats-log":
        return statistics | {"logits.weight", "logits.bias"}
    if key.startswith("bn-stats"):
        return statistics
    return statistics | parameters | (ends if key.endswith("log-conv1") else set())


@pytest.fixture(scope="module")
def trained(images: data.Images, tmp_path_factory: pytest.TempPathFactory) -> training.Context:
    """All rows, trained for a few steps at width 2."""
    made = context(images, tmp_path_factory.mktemp("walter"))
    assert all(training.train(made, key) for key in ROWS)
    return made


@pytest.mark.parametrize("key", ROWS)
def test_a_row_changes_what_it_trains_and_nothing_else(key: str, trained: training.Context) -> None:
    start = training.initial(trained, ROWS[key]).state_dict()
    if ROWS[key].reset:
        start = training.network(trained, str(ROWS[key].start)).state_dict()
    after = load_file(trained.folder.weights(key))
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    counters = {name for name in start if name.endswith("num_batches_tracked") and ROWS[key].reset}
    assert changed - counters == changes(key, resnet20(2)) - counters


def test_a_reset_leaves_only_what_was_seen_since(trained: training.Context) -> None:
    steps = TINY.training // TINY.batch_size
    counts = {key: load_file(trained.folder.weights(key))["norm1.num_batches_tracked"].item() for key in ROWS}
    assert counts["normal"] == counts["bn-stats-reset"] == steps
    assert counts["bn-stats"] == 2 * steps


@pytest.mark.parametrize("key", ROWS)
def test_a_record_says_what_it_was_made_with(key: str, trained: training.Context) -> None:
    record = json.loads(trained.folder.record(key, "train").read_text("utf-8"))
    assert record["row"] == ROWS[key].name
    assert record["command"].startswith("python -m examples.walter")
    assert record["seed"] == 0
    assert record["versions"].keys() >= {"bnsurgery", "torch", "torchvision", "numpy", "python"}
    assert record["seconds"] > 0
    assert record["hardware"]
    assert "commit" in record
    assert record["configuration"]["width"] == 2
    names = changes(key, resnet20(2)) & {name for name, _ in resnet20(2).named_parameters()}
    count = sum(parameter.numel() for name, parameter in resnet20(2).named_parameters() if name in names)
    assert record["trains"]["parameters"] == count
    assert record["trains"]["with_weight_decay"] == (0 if key == "bn-params-no-decay" else count)
    assert record["sha256"] == hashlib.sha256(trained.folder.weights(key).read_bytes()).hexdigest()
    start = ROWS[key].start
    assert record["start_sha256"] == (
        None if start is None else json.loads(trained.folder.record(start, "train").read_text("utf-8"))["sha256"]
    )


def test_table_1_at_the_papers_width() -> None:
    assert training.shares(resnet20(64), ROWS["bn-params"])["percent"] == pytest.approx(100 * 6272 / 4_327_754)
    text = tables.parameters(16)
    assert "| BN PARAMS | NORMAL | gamma, beta | updated | adversarial | 1,568 (0.58%) | 6,272 (0.14%) |" in text
    assert "| BN ONLY PARAMS | NORMAL | gamma, beta | frozen | adversarial |" in text
    assert "| ADV | random | everything | updated | adversarial |" in text


def test_a_row_is_attacked_ever_harder_where_it_says_so() -> None:
    row = ROWS["bn-only-params-warm"]
    assert row.configuration()["attack"] == f"{row.attack()!r}, eps_warmup={row.eps_warmup}"
    assert row.configuration() | {"attack": repr(row.attack())} == replace(row, eps_warmup=0).configuration()
    assert [row.shortened(epochs).eps_warmup for epochs in (1, 2, 3, 12, 99)] == [0, 1, 2, 7, 7]
    assert ROWS["bn-only-params"].eps_warmup == 0
    assert "eps_warmup" not in str([other.configuration() for other in table().values()])


def test_gamma_can_start_as_frankle_et_al_start_it(trained: training.Context) -> None:
    row = replace(ROWS["normal-bn-only"], gamma="uniform")
    gammas = torch.cat([m.weight for m in training.initial(trained, row).modules() if isinstance(m, _BatchNorm)])
    assert 0 < gammas.min() < 0.2
    assert 0.8 < gammas.max() < 1
    assert all(
        (m.weight == 1).all() for m in training.initial(trained, ROWS["adv"]).modules() if isinstance(m, _BatchNorm)
    )


# What is kept.


def test_finished_work_is_not_repeated(trained: training.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "adv_finetune", lambda *_, **__: pytest.fail("trained again"))
    assert all(training.train(trained, key) for key in ROWS)


@pytest.mark.parametrize("key", ["adv", "normal"])
def test_a_row_in_pieces_equals_one_in_one_go(key: str, images: data.Images, tmp_path: Path) -> None:
    scale = replace(TINY, most_epochs=3)
    whole = context(images, tmp_path / "whole", scale=scale)
    assert training.train(whole, key)
    done = []
    while not done or not done[-1]:
        piece = context(images, tmp_path / "pieces", scale=scale, deadline=time.monotonic() + 0.01)
        done.append(training.train(piece, key))
        torch.manual_seed(len(done))
    assert done == [False, False, True]
    weights = [load_file(made.folder.weights(key)) for made in (whole, piece)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    histories = [json.loads(made.folder.record(key, "train").read_text())["history"] for made in (whole, piece)]
    assert [{**r, "seconds": 0} for r in histories[0]] == [{**r, "seconds": 0} for r in histories[1]]


def test_behind_the_deadline_nothing_is_begun(images: data.Images, tmp_path: Path) -> None:
    late = context(images, tmp_path, deadline=time.monotonic() - 1)
    assert not training.train(late, "normal")
    assert not any(tmp_path.rglob("*.json"))


def test_what_would_end_too_late_is_begun_only_where_nothing_has_been(images: data.Images, tmp_path: Path) -> None:
    made = context(images, tmp_path, deadline=time.monotonic() + 50)
    assert made.fits(1000)
    made.worked = True
    assert not made.fits(1000)
    assert made.fits(10)
    assert made.fits(None)
    made.deadline = None
    assert made.fits(math.inf)


def for_an_epoch(made: training.Context, *arguments: Any, tune: Callable[..., Any] = training.tune) -> Any:
    """Stands in for ``tune``: the deadline passes in the first epoch."""
    made.deadline = time.monotonic() - 1
    return tune(made, *arguments)


def test_each_call_that_worked_on_a_row_is_in_its_record(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(images, tmp_path, scale=replace(TINY, most_epochs=2))
    with monkeypatch.context() as patch:
        patch.setattr(training, "tune", for_an_epoch)
        patch.setattr(files, "COMMIT", "a")
        assert not training.train(made, "normal")
    made.deadline = None
    monkeypatch.setattr(files, "COMMIT", "b")
    assert training.train(made, "normal")
    record = json.loads(Folder(tmp_path, 2, 0).record("normal", "train").read_text("utf-8"))
    assert [call["commit"] for call in record["calls"]] == ["a", "b"]
    assert record["commit"] == "b"


def test_the_commit_is_that_of_the_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import machine

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "examples" / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert machine.commit() is None
    monkeypatch.setenv("GIT_COMMIT", "from outside")
    assert machine.commit() == "from outside"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert machine.commit() == head
    (tmp_path / "notes.txt").write_text("not code")
    assert machine.commit() == head
    (tmp_path / "b.py").write_text("new code")
    assert machine.commit() == f"{head}+"
    (tmp_path / "b.py").unlink()
    (tmp_path / "a.py").write_text("2")
    assert machine.commit() == f"{head}+"


def test_two_processes_do_not_work_on_one_row(images: data.Images, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    made = context(images, tmp_path)
    with made.folder.locked("normal"):
        with pytest.raises(Problem, match="another process is at work on normal in "):
            training.train(made, "normal")
        with made.folder.locked("adv"):
            pass
    assert training.train(made, "normal")


@pytest.mark.parametrize("reason", ["in the way", "not to be locked"])
def test_a_lock_that_cannot_be_had_is_named(
    reason: str, images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    made = context(images, tmp_path)
    if reason == "in the way":
        made.folder.interim(".normal.lock").mkdir(parents=True)
    else:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    message = {
        "in the way": r"^cannot write .*\.normal\.lock: Is a directory",
        "not to be locked": "^cannot lock .*: No locks",
    }
    with pytest.raises(Problem, match=message[reason]):
        training.train(made, "normal")


def rebuilds(made: training.Context, key: str) -> bool:
    """Whether a row's network comes out of its start and its patch, bit for bit."""
    before = training.network(made, key).state_dict()
    made.folder.weights(key).unlink()
    after = training.network(made, key).state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("key", ["bn-params", "bn-stats-reset", "adv-bn-only"])
def test_where_weights_are_gone_a_patch_does(key: str, images: data.Images, tmp_path: Path) -> None:
    made = context(images, tmp_path)
    for name in needed([key]):
        assert training.train(made, name)
    assert rebuilds(made, key)


def test_where_more_than_bn_trained_a_patch_does_not_do(images: data.Images, tmp_path: Path) -> None:
    made = context(images, tmp_path)
    for key in ("normal", "bn-params-log-conv1", "bn-params"):
        assert training.train(made, key)
    made.folder.weights("bn-params-log-conv1").unlink()
    with pytest.raises(Problem, match=r"cannot read .*bn-params-log-conv1\.safetensors"):
        training.network(made, "bn-params-log-conv1")
    # Nor does one of another network, nor without the start.
    made.folder.weights("bn-params").unlink()
    made.folder.patch("bn-params").write_bytes(made.folder.patch("bn-params-log-conv1").read_bytes())
    with pytest.raises(Problem, match=r"cannot read .*bn-params\.safetensors"):
        training.network(made, "bn-params")
    made.folder.weights("normal").unlink()
    with pytest.raises(Problem, match=r"cannot read .*normal\.safetensors"):
        training.network(made, "bn-params")


def test_a_network_that_is_published_beside_its_results_is_used(images: data.Images, tmp_path: Path) -> None:
    made = context(images, tmp_path)
    assert training.train(made, "normal")
    made.folder.weights("normal").rename(made.folder.path / "normal.safetensors")
    shutil.rmtree(made.folder.interim(""))
    assert training.train(made, "bn-params")
    assert not made.folder.interim("normal.safetensors").exists()


def test_a_damaged_network_that_is_published_can_be_trained_anew_as_the_message_says(
    images: data.Images, tmp_path: Path
) -> None:
    made = context(images, tmp_path)
    assert training.train(made, "normal")
    published = made.folder.path / "normal.safetensors"
    made.folder.weights("normal").rename(published)
    whole = published.read_bytes()
    published.write_bytes(whole[:100])
    with pytest.raises(Problem, match=r"cannot read .*normal\.safetensors .*: remove .*normal\.train\.json"):
        training.network(made, "normal")
    made.folder.record("normal", "train").unlink()
    assert training.train(made, "normal")
    training.network(made, "normal")
    assert published.read_bytes() == whole


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_another_process_finishes_meanwhile_is_not_made_again(
    kind: str, images: data.Images, tmp_path: Path, few_attacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = context(images, tmp_path)
    work = training.train if kind == "train" else evaluating.evaluate_row
    if kind == "evaluate":
        assert training.train(other, "normal")

    def meanwhile() -> data.Images:
        assert work(other, "normal")
        monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained again"))
        monkeypatch.setattr(evaluating, "_evaluate", lambda *_: pytest.fail("evaluated again"))
        return images

    made = replace(context(images, tmp_path), read=meanwhile)
    assert work(made, "normal")
    assert made.folder.record("normal", kind).exists()


def test_an_evaluation_of_what_is_not_trained_reads_no_images(images: data.Images, tmp_path: Path) -> None:
    made = replace(context(images, tmp_path), read=lambda: pytest.fail("read"))
    with pytest.raises(Problem, match=r"^adv is not trained yet: train it first$"):
        evaluating.evaluate_row(made, "adv")


def test_where_a_record_is_removed_a_row_is_trained_anew(images: data.Images, tmp_path: Path) -> None:
    made = context(images, tmp_path)
    assert training.train(made, "normal")
    first = json.loads(made.folder.record("normal", "train").read_text("utf-8"))
    assert sorted(path.name for path in made.folder.interim("").iterdir()) == [".normal.lock", "normal.safetensors"]
    made.folder.record("normal", "train").unlink()
    made.folder.interim("normal.calls.json").write_text(json.dumps({"calls": [{"command": "of long ago"}]}))
    assert training.train(made, "normal")
    second = json.loads(made.folder.record("normal", "train").read_text("utf-8"))
    assert second["sha256"] == first["sha256"]
    assert len(second["calls"]) == 1
    assert second["calls"][0]["command"] != "of long ago"


def test_what_is_finished_needs_no_images(trained: training.Context) -> None:
    made = replace(trained, read=lambda: pytest.fail("read"))
    assert all(training.train(made, key) for key in ROWS)


def test_without_a_terminal_each_epoch_is_a_line(
    images: data.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = context(images, tmp_path, scale=replace(TINY, most_epochs=2), bars=False)
    assert training.train(made, "normal")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["NORMAL: epoch 1 of 2", "NORMAL: epoch 2 of 2"]
    assert lines[1].endswith("about 0 min left")


@pytest.fixture
def few_attacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two parts of AutoAttack stand in for all four, to be quick; notes how many examples each call has."""
    calls: list[int] = []

    def quick(model: nn.Module, pair: tuple[Tensor, Tensor], *, attacks: Any, **options: Any) -> Any:
        calls.append(len(pair[1]))
        attacks = ["apgd-ce", "square"] if attacks == ("autoattack",) else attacks
        assert not torch.backends.cudnn.allow_tf32
        return evaluate(model, pair, attacks=attacks, **options)

    monkeypatch.setattr(evaluating, "evaluate", quick)
    return calls


def test_an_evaluation_is_that_of_the_library(trained: training.Context, few_attacks: list[int]) -> None:
    assert evaluating.evaluate_row(trained, "adv")
    record = json.loads(trained.folder.record("adv", "evaluate").read_text("utf-8"))
    model = training.network(trained, "adv").eval()
    x, y = trained.images.tests(24)
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    assert record["clean_error"] == {"8": 100 * wrong[:8].double().mean(), "24": 100 * wrong.double().mean()}
    found = record["autoattack"]
    held = [flag == "1" for flag in found["held"]]
    assert len(held) == found["examples"] == 8
    assert found["robust_error"] == pytest.approx(100 * (1 - np.mean(held)))
    share = found["robust_error"] / 100
    assert found["standard_error"] == pytest.approx(100 * (share * (1 - share) / 8) ** 0.5)
    assert found["rows"][-1]["robust_error"] == pytest.approx(found["robust_error"])
    assert not (torch.tensor(held) & wrong[:8]).any()
    assert torch.backends.cudnn.allow_tf32  # as before
    for under, eps in zip(record["pgd20"], TINY.robust_eps, strict=True):
        attack = PGD(eps, steps=20, step_size=eps / 8)
        whole = evaluate(model, (x[:8], y[:8]), attacks=[attack], eps=eps, progress=False)
        assert under["eps"] == eps
        assert abs(under["robust_error"] - whole.robust_error) <= 12.5  # other random starts, of eight examples
        assert under["robust_error"] >= 100 * wrong[:8].double().mean()
    for kind in ("clean", "adversarial"):
        assert sum(record["histograms"][kind]["confidence"]["counts"]) == 8
        logits = record["histograms"][kind]["logits"]
        assert sum(logits["counts"]) + logits["outside"] == 80
    few_attacks.clear()
    assert evaluating.evaluate_row(trained, "adv")
    assert few_attacks == []


def test_an_evaluation_goes_on_after_the_examples_that_are_done(
    images: data.Images, tmp_path: Path, few_attacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(images, tmp_path)
    assert training.train(made, "normal")
    attacked, calls = evaluating.attacked, itertools.count()
    monkeypatch.setattr(evaluating, "origin", lambda *_: {"started": next(calls)})

    def to_the_end(*arguments: Any, **options: Any) -> Any:
        found = attacked(*arguments, **options)
        made.deadline = time.monotonic() - 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "attacked", to_the_end)
        assert not evaluating.evaluate_row(made, "normal")
        assert not evaluating.evaluate_row(made, "normal")
    assert few_attacks == [4]
    assert not made.folder.record("normal", "evaluate").exists()
    made.deadline = None
    assert evaluating.evaluate_row(made, "normal")
    assert few_attacks[:2] == [4, 4]
    assert len(few_attacks) == 2 + 1  # clean error
    record = json.loads(made.folder.record("normal", "evaluate").read_text("utf-8"))
    assert record["autoattack"]["examples"] == 8
    assert record["calls"] == [{"started": 0}, {"started": 2}]  # nothing was done in 1
    assert record["started"] == 2


def test_parts_join_to_the_whole() -> None:
    def part(examples: int, clean: int, *broken: int) -> dict[str, Any]:
        tried, rows = examples - clean, []
        for count in broken:
            rows.append({"attack": "a", "tried": tried, "broken": count, "rejected": 0, "seconds": 1.0})
            tried -= count
        wrong = clean + sum(broken)
        held = "1" * (examples - wrong) + "0" * wrong
        return {
            "seconds": 1.0,
            "examples": examples,
            "clean_error": 100 * clean / examples,
            "robust_error": 100 * wrong / examples,
            "rows": rows,
            "held": held,
        }

    joined = evaluating.joined([part(10, 1, 2, 3), part(5, 2, 1, 0)])
    assert joined["clean_error"] == pytest.approx(100 * 3 / 15)
    assert joined["robust_error"] == pytest.approx(100 * 9 / 15)
    assert [row["tried"] for row in joined["rows"]] == [12, 9]
    assert [row["broken"] for row in joined["rows"]] == [3, 3]
    assert [row["robust_error"] for row in joined["rows"]] == pytest.approx([40.0, 60.0])
    assert joined["held"].count("0") == 9


# Data.


def test_clean_training_has_autoaugment_and_a_hole_and_adversarial_training_has_not(images: data.Images) -> None:
    few = data.Images((images.train[0][:64], images.train[1][:64]), images.test)
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    clean = list(data.batches(few, adversarial=False, batch_size=32, device=cpu))
    crops = list(data.batches(few, adversarial=True, batch_size=32, device=cpu))
    for batches in (clean, crops):
        assert [tuple(x.shape) for x, _ in batches] == [(32, 3, 32, 32)] * 2
        assert all(x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1 for x, _ in batches)
        labels = torch.cat([y for _, y in batches])
        assert torch.equal(labels.sort().values, few.train[1].sort().values)
        assert not torch.equal(labels, few.train[1])

    def hole(image: Tensor) -> bool:
        return bool((image.unfold(1, 16, 1).unfold(2, 16, 1).abs().amax((0, 3, 4)) == 0).any())

    assert all(hole(image) for x, _ in clean for image in x)
    assert not any(hole(image) for x, _ in crops for image in x)
    again = torch.cat([x for x, _ in data.batches(few, adversarial=False, batch_size=32, device=cpu)])
    assert not torch.equal(torch.cat([x for x, _ in clean]), again)


def test_held_out_images_are_none_of_those_trained_on(images: data.Images) -> None:
    held = images.held_out(100, 50)
    assert torch.equal(held.train[0], images.train[0][:50])
    assert torch.equal(held.test[0], images.train[0][-100:])
    assert len(images.held_out(2750, 500).train[1]) == 50


# Results, checks, tables, figures.


def held(errors: float, seed: int = 0) -> str:
    """A thousand flags of which so many percent are 0."""
    order = np.random.default_rng(seed).permutation(1000)
    flags = np.ones(1000, dtype=int)
    flags[order[: round(10 * errors)]] = 0
    return "".join(map(str, flags))


@pytest.fixture
def as_in_the_paper(tmp_path: Path) -> Results:
    """Result files that hold the paper's own numbers."""
    folder = Folder(tmp_path, 2, 0)
    folder.make()
    torch.manual_seed(0)
    model = resnet20(2)
    errors = {key: row.paper for key, row in table().items()}
    errors["bn-params-longer"] = (29.0, 70.0)
    for key, paper in errors.items():
        assert paper is not None
        clean, robust = paper
        put(folder, key, clean, held(robust))
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, _BatchNorm)):
                nn.init.normal_(layer.weight, 0.8 if key == "normal" else 0.8 - 0.177, 0.01)
        save_bn_patch(model, folder.patch(key))
    return Results(folder)


def put(folder: Folder, key: str, clean: float, flags: str) -> None:
    robust = 100 * flags.count("0") / len(flags)
    spread = {"edges": [0.0, 0.5, 1.0], "counts": [3, 5], "outside": 0}
    found = {"robust_error": robust, "standard_error": 1.0}
    row = ROWS[key]
    trained = {
        "configuration": FULL.of_training(row, folder.width),
        "sha256": key,
        "start_sha256": row.start,
        "trains": {"parameters": 1},
        "seconds": 60.0,
        "history": [{"seconds": 1.0}],
    }
    record = {
        "configuration": FULL.of_evaluation(row, folder.width),
        "sha256": key,
        "seconds": 60.0,
        "clean_error": {"900": clean, "1000": clean, "10000": clean},
        "autoattack": {
            **found,
            "held": flags,
            "examples": len(flags),
            "clean_error": clean,
            "rows": [],
            "chunk_seconds": [1.0],
        },
        "pgd20": [
            {**found, "eps": eps, "cross_entropy": 2.0, "cross_entropy_standard_error": 0.1} for eps in FULL.robust_eps
        ],
        "histograms": {kind: {"confidence": spread, "logits": spread} for kind in ("clean", "adversarial")},
    }
    folder.record(key, "train").write_text(json.dumps(trained), encoding="utf-8")
    folder.record(key, "evaluate").write_text(json.dumps(record), encoding="utf-8")


def test_the_papers_own_numbers_pass_every_check(as_in_the_paper: Results) -> None:
    made, pending = checks.checks(as_in_the_paper)
    assert [str(check) for check in made if not check.holds] == []
    assert len(made) == 14
    assert pending == []


@pytest.mark.parametrize(
    ("key", "clean", "robust", "finding"),
    [
        ("bn-stats", 6, 90, "statistics alone give nothing"),
        ("bn-stats-reset", 6, 90, "statistics alone give nothing"),
        ("bn-params", 30, 95, "parameters and statistics together give a lot"),
        ("bn-only-params", 77, 65, "parameters alone give less than both"),
        ("bn-only-params", 77, 75, "parameters alone give little"),
        ("bn-only-params", 35, 85, "parameters alone, at a ruinous clean error"),
        ("normal-bn-only", 46, 90, "random features give next to nothing"),
        ("normal-bn-only-log-conv1", 46, 90, "random features give next to nothing"),
        ("adv-bn-only", 46, 90, "random features give next to nothing"),
        ("adv-bn-only-log-conv1", 46, 90, "random features give next to nothing"),
        ("adv", 18, 75, "ADV is the most robust"),
        ("bn-params-log-conv1", 27, 60, "+log+conv1 helps little"),
        ("bn-params-longer", 29, 67, "BN PARAMS has settled"),
        ("bn-params-longer", 29, 75, "BN PARAMS has settled"),
    ],
)
def test_each_check_can_fail(as_in_the_paper: Results, key: str, clean: float, robust: float, finding: str) -> None:
    put(as_in_the_paper.folder, key, clean, held(robust))
    failed = [check for check in checks.checks(as_in_the_paper)[0] if not check.holds]
    assert finding in {check.finding for check in failed}
    assert all(check.margin <= 0 and str(check).startswith("FAILS") for check in failed)


def test_the_check_of_the_normalized_weights_can_fail(as_in_the_paper: Results) -> None:
    folder = as_in_the_paper.folder
    folder.patch("bn-params").write_bytes(folder.patch("normal").read_bytes())
    failed = {check.finding for check in checks.checks(as_in_the_paper)[0] if not check.holds}
    assert failed == {"the mean normalized weight falls"}


def test_the_fall_without_weight_decay_stands_beside_it(as_in_the_paper: Results) -> None:
    def said() -> str:
        (check,) = [made for made in checks.checks(as_in_the_paper)[0] if "normalized weight" in made.finding]
        return check.found

    assert "without weight decay" not in said()
    folder = as_in_the_paper.folder
    put(folder, "bn-params-no-decay", 30.0, held(70.0))
    folder.patch("bn-params-no-decay").write_bytes(folder.patch("normal").read_bytes())
    assert said().endswith("; without weight decay +0.000, median +0.000")
    folder.patch("bn-params-no-decay").write_bytes(folder.patch("bn-params").read_bytes())
    both = re.search(r"NORMAL ([+-][0-9.]+) ± .*, median ([+-][0-9.]+); without weight decay (.*), median (.*)", said())
    assert both is not None
    assert both.groups()[:2] == both.groups()[2:]
    assert float(both.group(1)) < -0.1


def test_a_tie_is_no_finding(as_in_the_paper: Results) -> None:
    for key in table():
        put(as_in_the_paper.folder, key, 50, held(80))
    failed = {check.finding for check in checks.checks(as_in_the_paper)[0] if not check.holds}
    assert failed >= {"ADV is the most robust", "parameters alone give less than both"}
    assert Estimate(2.0, 0.0).beyond(2.0) == 0


def test_what_cannot_be_checked_yet_waits(as_in_the_paper: Results, capsys: pytest.CaptureFixture[str]) -> None:
    folder = as_in_the_paper.folder
    folder.record("bn-params-longer", "evaluate").unlink()
    made, pending = checks.checks(as_in_the_paper)
    assert len(made) == 13
    assert pending == [f"waits  BN PARAMS has settled: bn-params-longer is not evaluated yet in {folder.path}"]
    command = ["check", "--out", str(folder.root), "--width", "2"]
    assert walter.main(command) == 3
    printed = capsys.readouterr()
    assert printed.out.count("holds") == 13
    assert printed.out.splitlines()[-1] == pending[0]
    assert printed.err == ""
    put(folder, "adv", 18, held(75))
    assert walter.main(command) == 1  # what fails is more than what waits
    for path in folder.path.glob("*.json"):
        path.unlink()
    capsys.readouterr()
    assert walter.main(command) == 3
    assert capsys.readouterr().out.count("waits  ") == 14


def test_check_exits_with_1_where_one_fails(as_in_the_paper: Results, capsys: pytest.CaptureFixture[str]) -> None:
    folder = as_in_the_paper.folder
    command = ["check", "--out", str(folder.root), "--width", "2"]
    assert walter.main(command) == 0
    assert "FAILS" not in capsys.readouterr().out
    put(folder, "adv", 18, held(75))
    assert walter.main(command) == 1
    assert "FAILS  ADV is the most robust" in capsys.readouterr().out


def test_the_difference_of_two_rows_is_judged_by_pairs(as_in_the_paper: Results) -> None:
    folder = as_in_the_paper.folder
    first, second = held(70, seed=1), held(60, seed=2)
    put(folder, "adv", 18, second)
    put(folder, "bn-params", 30, first)
    found = as_in_the_paper.more_robust("adv", "bn-params")
    pairs = np.array([int(b) - int(a) for a, b in zip(first, second, strict=True)])
    assert found.value == pytest.approx(10.0)
    assert found.error == pytest.approx(100 * pairs.std() / math.sqrt(1000), rel=0.01)
    put(folder, "adv", 18, first)
    same = as_in_the_paper.more_robust("adv", "bn-params")
    assert same.value == 0
    assert 0 < same.error < 0.2


def test_a_margin_is_a_distance_in_standard_errors() -> None:
    assert Estimate(12.0, 0.5).beyond(10.0) == 4.0
    assert Estimate(1.0, 0.0).beyond(2.0) == -math.inf


def test_clean_error_is_that_of_the_most_images(as_in_the_paper: Results) -> None:
    found = as_in_the_paper.clean("adv")
    assert found.value == 17.67
    assert found.error == pytest.approx(100 * math.sqrt(0.1767 * 0.8233 / 10_000), rel=0.01)


def test_tables_show_ours_beside_the_papers_and_what_is_pending(as_in_the_paper: Results) -> None:
    for kind, seconds in (("train", 5000), ("evaluate", 2000)):
        path = as_in_the_paper.folder.record("adv", kind)
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"seconds": seconds}), encoding="utf-8")
    text = tables.everything(as_in_the_paper)
    assert "| ADV | 30 | 17.67 | 17.67 | 17.67 | 58.4 ± 1.0 | 58.4 ± 1.0 | 1.9 | 17.67 | 58.4 |" in text
    assert (
        "| row | epochs | clean, first 900 | clean, first 1,000 | clean, first 10,000 | AutoAttack, first 1,000 |"
        in text
    )
    as_in_the_paper.folder.record("adv", "evaluate").unlink()
    text = tables.everything(as_in_the_paper)
    assert "| ADV | 30 | pending | pending | pending | pending | pending | pending | 17.67 | 58.4 |" in text
    assert "| 2/255 | 2.00 ± 0.10 | 99.8 ± 1.0 | pending | pending |" in text
    # Eleven rows and one beside them, of two minutes each but for ADV.
    assert "Finished: 10 of the 11 rows above and 1 of 7 beside them; together 0.4 hours.\n" in text
    assert "| BN PARAMS, twice the epochs | 29.00 | 70.0 ± 1.0 | 2.00 ± 0.10 | 0.0 |" in text


def test_the_figures_show_the_eighth_layer_the_means_and_the_outputs(as_in_the_paper: Results) -> None:
    first = figures.weights(as_in_the_paper)
    assert [ax.get_xlabel() for ax in first.axes] == [
        f"{name}, BN layer 8" for name in ("gamma", "beta", "normalized weight m", "normalized bias b")
    ]
    model = resnet20(2)
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert names[7] == "stages.1.0.norm1"
    assert [len(ax.patches) for ax in first.axes] == [3] * 4
    (ax,) = figures.means(as_in_the_paper).axes
    before, after = (as_in_the_paper.folded(key) for key in ("normal", "bn-params"))
    shift = np.mean([float(after[name].weight.mean() - before[name].weight.mean()) for name in before])
    assert f"{shift:+.3f} on average" in ax.get_title()
    assert ax.get_lines()[0].get_ydata() == pytest.approx([float(a.weight.mean()) for a in before.values()])
    third = figures.predictions(as_in_the_paper)
    assert [ax.get_xlabel() for ax in third.axes] == [
        f"{what}, {kind} examples" for what in ("confidence", "logit") for kind in ("clean", "adversarial")
    ]
    for figure in (first, third):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["NORMAL", "ADV", "BN PARAMS"]
        assert all(ax.get_legend() is None and ax.get_ylabel().endswith("(%)") for ax in figure.axes)


def test_figure_3_says_what_it_does_not_draw(as_in_the_paper: Results) -> None:
    path = as_in_the_paper.folder.record("adv", "evaluate")
    record = json.loads(path.read_text("utf-8"))
    record["histograms"]["clean"]["confidence"]["outside"] = 1  # of the axes that the legend is of
    record["histograms"]["adversarial"]["logits"]["outside"] = 1234
    path.write_text(json.dumps(record), encoding="utf-8")
    figure = figures.predictions(as_in_the_paper)
    said = "not drawn, outside the axis: {} of ADV"
    assert [ax.get_title() for ax in figure.axes] == [said.format("1"), "", "", said.format("1,234")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["NORMAL", "ADV", "BN PARAMS"]


def test_a_network_with_a_rows_patch_folds_to_what_the_row_has(trained: training.Context) -> None:
    folded = trained.results.folded("bn-params")
    expected = fold_bn(training.network(trained, "bn-params"))
    assert all(torch.equal(folded[name].weight, expected[name].weight) for name in expected)
    assert all(torch.equal(folded[name].bias, expected[name].bias) for name in expected)


# Commands.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(walter, "QUICK", TINY)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_all_runs_every_row_in_order_and_then_has_nothing_to_do(
    here: Path, few_attacks: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["all", "--quick", "--width", "2"]
    assert walter.main([*command, "--budget", "0.0001"]) == 0
    assert "stopped at the budget in normal; the same command goes on from there" in capsys.readouterr().out
    assert walter.main(command) == 0
    printed = capsys.readouterr().out
    assert [line.split("] ")[1].split(";")[0] for line in printed.splitlines() if line.startswith("[")] == [
        row.name for row in ROWS.values()
    ]
    assert "no estimate before the first is done" in printed
    assert "[18 of 18] BN PARAMS, twice the epochs; 1 of 18 rows are left, about " in printed
    made = contents(here)
    folder = here / "runs" / "walter-quick" / "w2-seed0"
    assert {path.name for path in folder.glob("*.png")} == {"figure1.png", "figure2.png", "figure3.png"}
    assert len(list(folder.glob("*.json"))) == 2 * len(ROWS)
    monkeypatch.setattr(work, "adv_finetune", lambda *_, **__: pytest.fail("trained again"))
    few_attacks.clear()
    assert walter.main(command) == 0
    assert few_attacks == []
    now = contents(here)
    assert {path for path in made if made[path] != now[path]} <= {*folder.glob("*.png"), folder / "table.md"}


def test_train_makes_the_start_first_and_evaluate_takes_what_is_trained(
    here: Path, few_attacks: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick", "--width", "2"]
    assert walter.main(["evaluate", "bn-params", *options]) == 2
    assert "bn-params is not trained yet: train it first" in capsys.readouterr().err
    assert walter.main(["train", "bn-params", *options]) == 0
    lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "trained" in line]
    assert lines == ["normal", "bn-params"]
    assert walter.main(["evaluate", "bn-params", *options]) == 0
    assert "AutoAttack" in capsys.readouterr().out


def test_choose_compares_settings_on_left_out_training_images(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHOICES, "normal-bn-only", ({"lr": 0.1, "gamma": "one"}, {"lr": 0.2, "gamma": "uniform"}))  # type: ignore[arg-type]
    assert walter.main(["choose", "normal-bn-only", "--quick", "--width", "2"]) == 0
    printed = capsys.readouterr().out
    assert "lr0.1-gammaone" in printed
    assert "lr0.2-gammauniform" in printed
    record = json.loads(
        (here / "runs/walter-quick/w2-seed0/normal-bn-only-lr0.1-gammaone.choose.json").read_text("utf-8")
    )
    assert record["configuration"]["held_out"] == 64
    assert record["configuration"]["lr"] == 0.1
    made = contents(here)
    assert walter.main(["choose", "normal-bn-only", "--quick", "--width", "2"]) == 0
    table = [line for line in printed.splitlines() if "epoch 1 of 1" not in line]
    assert capsys.readouterr().out.splitlines() == table
    assert contents(here) == made
    assert walter.main(["table", "--quick", "--width", "2"]) == 0
    compared = capsys.readouterr().out.split("## Settings compared by `choose`\n\n")[1].splitlines()
    robust = f"{record['robust_error']:.1f} ± {record['standard_error']:.1f}"
    loss = f"{record['cross_entropy']:.2f} ± {record['cross_entropy_standard_error']:.2f}"
    found = f"{record['clean_error']:.1f} | {robust} | {loss}"
    assert compared[2] == f"| NORMAL +BN ONLY | lr 0.1, gamma one | {found} | yes |"
    assert compared[3].startswith("| NORMAL +BN ONLY | lr 0.2, gamma uniform | ")
    assert compared[3].endswith("|  |")


def test_a_comparison_that_is_none_is_not_shown_as_one(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHOICES, "bn-params", ({"lr": 0.1},))  # type: ignore[arg-type]
    options = ["--quick", "--width", "2"]
    assert walter.main(["choose", "bn-params", *options]) == 0
    path = here / "runs/walter-quick/w2-seed0/bn-params-lr0.1.choose.json"
    record = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(record | {"start_sha256": "other"}), encoding="utf-8")
    capsys.readouterr()
    assert walter.main(["table", *options]) == 0
    assert "| BN PARAMS | lr 0.1 | - | - | - | of another NORMAL |\n" in capsys.readouterr().out
    assert walter.main(["choose", "bn-params", *options]) == 2
    assert "bn-params-lr0.1.choose.json started from a network of normal, and not from" in capsys.readouterr().err
    path.write_text(json.dumps(record | {"cross_entropy": None}), encoding="utf-8")
    assert walter.main(["table", *options]) == 0
    assert "| BN PARAMS | lr 0.1 | diverged | diverged | diverged |  |\n" in capsys.readouterr().out
    path.write_text(json.dumps(record | {"examples": [64, 9]}), encoding="utf-8")
    for command in (["table"], ["choose", "bn-params"]):
        assert walter.main([*command, *options]) == 2
        assert "was made otherwise (examples was [64, 9], is [64, 8])" in capsys.readouterr().err


def test_the_table_has_no_empty_part_where_nothing_was_compared(trained: training.Context) -> None:
    assert "choose" not in tables.everything(trained.results)


def test_what_is_not_compared_yet_is_pending_beside_what_is(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--quick", "--width", "2"]
    monkeypatch.setitem(CHOICES, "normal-bn-only", ({"lr": 0.2},))  # type: ignore[arg-type]
    assert walter.main(["choose", "normal-bn-only", *options]) == 0
    monkeypatch.setitem(CHOICES, "normal-bn-only", ({"lr": 0.2}, {"lr": 0.1}))  # type: ignore[arg-type]
    capsys.readouterr()
    assert walter.main(["table", *options]) == 0
    compared = capsys.readouterr().out.split("## Settings compared by `choose`\n\n")[1].splitlines()
    assert compared[2].startswith("| NORMAL +BN ONLY | lr 0.2 | ")
    assert compared[3:] == ["| NORMAL +BN ONLY | lr 0.1 | pending | pending | pending | yes |", ""]


@pytest.mark.parametrize("key", CHOICES)
def test_a_comparison_in_small_takes_as_few_epochs_as_a_row(key: str) -> None:
    for settings in CHOICES[key]:
        small, whole = QUICK.compared(ROWS[key], settings), FULL.compared(ROWS[key], settings)
        assert small.epochs == 1
        assert small.eps_warmup == 0
        assert whole.epochs == settings.get("epochs", 3)
        assert whole.eps_warmup == settings.get("eps_warmup", min(ROWS[key].eps_warmup, 2))


def test_each_call_that_worked_on_a_comparison_is_in_its_record(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHOICES, "normal-bn-only", ({"lr": 0.1, "epochs": 2},))  # type: ignore[arg-type]
    made = context(images, tmp_path, scale=replace(TINY, most_epochs=2))
    with monkeypatch.context() as patch:
        patch.setattr(choosing, "tune", for_an_epoch)
        patch.setattr(files, "COMMIT", "a")
        assert not choosing.choose(made, "normal-bn-only")[1]
    made.deadline = None
    monkeypatch.setattr(files, "COMMIT", "b")
    assert choosing.choose(made, "normal-bn-only")[1]
    folder = Folder(tmp_path, 2, 0)
    record = json.loads(folder.choice("normal-bn-only", {"lr": 0.1, "epochs": 2}).read_text("utf-8"))
    assert [call["commit"] for call in record["calls"]] == ["a", "b"]
    assert (record["commit"], record["started"]) == ("b", record["calls"][-1]["started"])
    assert len(record["history"]) == 2
    assert [path.name for path in folder.interim("").iterdir()] == [".normal-bn-only-choose.lock"]


def test_choose_stops_at_the_budget_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["choose", "normal-bn-only", "--quick", "--width", "2"]
    assert walter.main([*command, "--budget", "0.0001"]) == 0
    assert "stopped at the budget in normal-bn-only" in capsys.readouterr().out


Spoil = Callable[[Folder], object]


def cut_short(folder: Folder) -> None:
    path = folder.record("normal", "train")
    path.write_bytes(path.read_bytes()[:100])


def other_width(folder: Folder) -> None:
    save_file(resnet20(4).state_dict(), folder.weights("normal"))


def other_settings(folder: Folder) -> None:
    path = folder.record("normal", "train")
    record = json.loads(path.read_text("utf-8"))
    record["configuration"]["lr"] = 0.5
    path.write_text(json.dumps(record), encoding="utf-8")


def no_result(folder: Folder) -> None:
    folder.record("normal", "train").write_text("[]", encoding="utf-8")


def lacks_an_entry(folder: Folder) -> None:
    path = folder.record("normal", "train")
    record = json.loads(path.read_text("utf-8"))
    del record["sha256"]
    path.write_text(json.dumps(record), encoding="utf-8")


def another_network(folder: Folder) -> None:
    torch.manual_seed(5)
    save_file(resnet20(2).state_dict(), folder.weights("normal"))


def damaged_calls(folder: Folder) -> None:
    folder.interim("bn-params.calls.json").write_text("{}", encoding="utf-8")
    folder.interim("bn-params.checkpoint").write_bytes(b"it goes on from there")


def damaged_weights(folder: Folder) -> None:
    folder.weights("normal").write_bytes(b"nothing")


def missing_weights(folder: Folder) -> None:
    folder.weights("normal").unlink()


def damaged_checkpoint(folder: Folder) -> None:
    folder.interim("bn-params.checkpoint").write_bytes(b"nothing")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def checkpoint_of_another_width(folder: Folder) -> None:
    other = Folder(folder.root, 4, 0)
    assert walter.main(["train", "normal", "--quick", "--width", "4"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "serialized", interrupted)
        assert walter.main(["train", "bn-params", "--quick", "--width", "4"]) == 130
    folder.interim("bn-params.checkpoint").write_bytes(other.interim("bn-params.checkpoint").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "normal.train.json is cut short or damaged"),
        (no_result, "normal.train.json is cut short or damaged"),
        (
            lacks_an_entry,
            "normal.train.json is cut short or damaged (it lacks 'sha256'): remove it, and it is made again",
        ),
        (
            another_network,
            "normal.safetensors is not the network of runs/walter-quick/w2-seed0/normal.train.json: ",
        ),
        (damaged_calls, "bn-params.calls.json is cut short or damaged"),
        (other_settings, "was made otherwise (lr was 0.5, is 0.05): remove it, or use another --out"),
        (other_width, "is of another network or width (conv1.weight is (4, 3, 3, 3), not (2, 3, 3, 3)): remove"),
        (damaged_weights, "cannot read runs/walter-quick/w2-seed0/interim/normal.safetensors"),
        (missing_weights, "cannot read runs/walter-quick/w2-seed0/interim/normal.safetensors"),
        (damaged_checkpoint, "cannot read the checkpoint 'runs/walter-quick/w2-seed0/interim/bn-params.checkpoint'"),
        (checkpoint_of_another_width, "trainable: ['norm1.weight', 4] and 41 more before, ['norm1.weight', 2] and"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_damaged_or_of_another_run_is_named_and_left_alone(
    here: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, message: str
) -> None:
    folder = Folder(Path("runs/walter-quick"), 2, 0)
    assert walter.main(["train", "normal", "--quick", "--width", "2"]) == 0
    spoil(folder)
    before = contents(here)
    capsys.readouterr()
    assert walter.main(["train", "bn-params", "--quick", "--width", "2"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("walter: error: ")
    notes = {folder.interim("bn-params.calls.json"), folder.interim(".bn-params.lock")}  # that this call was made
    assert {path: data for path, data in contents(here).items() if path.relative_to(here) not in notes} == {
        path: data for path, data in before.items() if path.relative_to(here) not in notes
    }


def test_a_row_that_has_diverged_is_not_attacked(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(images, tmp_path)
    assert training.train(made, "normal")
    whole = training.network(made, "normal")
    torch.nn.init.constant_(whole.logits.bias, math.inf)
    monkeypatch.setattr(evaluating, "network", lambda *_: whole)
    monkeypatch.setattr(evaluating, "evaluate", lambda *_, **__: pytest.fail("attacked"))
    with pytest.raises(
        evaluating.Diverged,
        match=r"^normal has diverged, .* not finite: .*rows\.py, and remove .*normal\.\* and .*interim.normal\.\*$",
    ):
        evaluating.evaluate_row(made, "normal")
    assert not made.folder.record("normal", "evaluate").exists()


def test_a_row_whose_outputs_under_attack_are_not_finite_has_diverged(
    images: data.Images, tmp_path: Path, few_attacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(images, tmp_path)
    assert training.train(made, "normal")
    under = evaluating.under_attack

    def spoiled(*arguments: Any) -> Any:
        found = under(*arguments)
        found.logits[0, 0] = math.nan
        return found

    monkeypatch.setattr(evaluating, "under_attack", spoiled)
    with pytest.raises(evaluating.Diverged, match=r"^normal has diverged, its outputs are not finite: "):
        evaluating.evaluate_row(made, "normal")
    assert not made.folder.record("normal", "evaluate").exists()


def test_all_goes_on_beside_what_has_diverged(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walter, "ROWS", {key: ROWS[key] for key in ("adv", "normal", "bn-stats", "normal-bn-only")})
    monkeypatch.setattr(walter, "short", lambda _, key: f"{key} is done")
    done = []

    def evaluated(_: training.Context, key: str) -> bool:
        if key == "normal":
            raise evaluating.Diverged("normal has diverged")
        done.append(key)
        return True

    monkeypatch.setattr(evaluating, "evaluate_row", evaluated)
    assert walter.main(["all", "--quick", "--width", "2"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "walter: error: normal has diverged\n"
    assert done == ["adv", "normal-bn-only"]
    assert "    left out: normal has diverged\n" in printed.out
    assert "## Errors in percent" in printed.out
    folder = here / "runs" / "walter-quick" / "w2-seed0"
    assert {path.name for path in folder.glob("*.train.json")} == {f"{key}.train.json" for key in (*done, "normal")}


def of_another_network(record: dict[str, Any]) -> None:
    record["sha256"] = "other"


def short_of_an_example(record: dict[str, Any]) -> None:
    record["autoattack"]["held"] = record["autoattack"]["held"][:-1]


def without_parts(record: dict[str, Any]) -> None:
    record["autoattack"] = {}


def without_a_radius(record: dict[str, Any]) -> None:
    del record["pgd20"][1]


def without_a_histogram(record: dict[str, Any]) -> None:
    del record["histograms"]["clean"]["logits"]["edges"]


def of_other_settings(record: dict[str, Any]) -> None:
    record["configuration"]["evaluation"]["chunk"] = 8


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (of_another_network, "is of another network than"),
        (short_of_an_example, "damaged (held does not say of each example whether it is right)"),
        (without_parts, "damaged (it lacks 'held')"),
        (without_a_radius, "damaged (PGD-20 was not run at eps 4/255)"),
        (without_a_histogram, "is cut short or damaged"),
        (of_other_settings, "was made otherwise (evaluation was {"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("command", ["table", "check", "figures"])
def test_a_damaged_evaluation_is_named_by_all_who_read_it(
    as_in_the_paper: Results,
    capsys: pytest.CaptureFixture[str],
    command: str,
    spoil: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    folder = as_in_the_paper.folder
    path = folder.record("normal", "evaluate")
    record = json.loads(path.read_text("utf-8"))
    spoil(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    before = contents(folder.root)
    assert walter.main([command, "--out", str(folder.root), "--width", "2"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert str(path) in printed.err
    assert printed.err.count("\n") == 1
    assert contents(folder.root) == before


def test_an_evaluation_without_its_training_is_kept(
    as_in_the_paper: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_in_the_paper.folder
    folder.record("bn-stats", "train").unlink()
    assert walter.main(["check", "--out", str(folder.root), "--width", "2"]) == 2
    message = (
        f"{folder.record('bn-stats', 'evaluate')} belongs to {folder.record('bn-stats', 'train')}, which is not here"
    )
    assert f"{message}: put that back" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "no chunks", "other network"])
def test_a_damaged_half_of_an_evaluation_is_named(
    trained: training.Context, damage: str, few_attacks: list[int], tmp_path: Path
) -> None:
    path = trained.folder.interim("bn-params.autoattack.json")
    configuration = TINY.of_evaluation(ROWS["bn-params"], 2)
    text = {
        "cut": '{"chunks": [',
        "no chunks": json.dumps({"configuration": configuration, "sha256": "", "calls": []}),
        "other network": json.dumps({"configuration": configuration, "sha256": "", "calls": [], "chunks": []}),
    }[damage]
    path.write_text(text, encoding="utf-8")
    message = "is of another network" if damage == "other network" else "is cut short or damaged"
    try:
        with pytest.raises(Problem, match=rf"bn-params.autoattack.json {message}"):
            evaluating.evaluate_row(trained, "bn-params")
        assert path.read_text("utf-8") == text
    finally:
        path.unlink()


def test_a_row_that_started_from_another_network_is_refused(images: data.Images, tmp_path: Path) -> None:
    made = context(images, tmp_path)
    assert training.train(made, "normal")
    assert training.train(made, "bn-stats")
    path = made.folder.record("normal", "train")
    record = json.loads(path.read_text("utf-8"))
    path.unlink()
    with pytest.raises(Problem, match=r"bn-stats.train.json started from a network of normal, which is not here"):
        training.train(made, "bn-stats")
    path.write_text(json.dumps(record | {"sha256": "other"}), encoding="utf-8")
    with pytest.raises(Problem, match=r"started from a network of normal, and not from the one that is here: "):
        training.train(made, "bn-stats")
    assert training.train(made, "adv")  # which does not start from it


def test_a_file_of_one_row_does_not_stop_another(images: data.Images, tmp_path: Path) -> None:
    made = context(images, tmp_path)
    made.folder.make()
    made.folder.record("bn-params", "train").write_text("{}", encoding="utf-8")
    assert training.train(made, "normal")
    assert made.results.seconds_an_epoch(ROWS["normal"]) is not None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "the following arguments are required: command"),
        (["retrain"], "argument command: invalid choice: 'retrain'"),
        (["train"], "no row given: train takes one of normal, normal-bn-only,"),
        (["train", "BN"], "unknown row 'BN': train takes one of normal, normal-bn-only,"),
        (["evaluate", "x"], "unknown row 'x': evaluate takes one of normal,"),
        (
            ["choose", "adv"],
            "unknown row 'adv': choose takes one of bn-params, bn-only-params, bn-only-params-warm, bn-params-",
        ),
        (["table", "adv"], "table takes no row, got 'adv'"),
        (["all", "--budget", "0"], "argument --budget: must be a number of minutes above 0, got '0'"),
        (["all", "--budget", "nan"], "argument --budget: must be a number of minutes above 0, got 'nan'"),
        (["all", "--width", "0"], "argument --width: must be a whole number from 1 to 1024, got '0'"),
        (["all", "--device", "toaster"], "argument --device: 'toaster' is not available here"),
        (["all", "--seed", "x"], "argument --seed: must be a whole number from 0 to 4294967295, got 'x'"),
        (["train", "adv", "--data", "other"], "--data other is not CIFAR-10: there is no cifar-10-batches-py in it"),
        (["train", "adv", "--data", "file"], "--data file: no CIFAR-10 there, and none could be had"),
        (["train", "adv", "--data", "broken"], "--data broken: files of CIFAR-10 are missing or damaged in it: remove"),
        (["train", "adv", "--data", "n" * 300], f"--data {'n' * 300}: no CIFAR-10 there, and none could be had: "),
        (["all", "--device", "privateuseone"], "argument --device: 'privateuseone' is not available here"),
        (["train", "adv", "--quick", "--out", "file"], "--out file cannot be a folder: "),
        (["table"], "there are no results in runs/walter/w16-seed0"),
        (["figures", "--out", "half"], "normal is not trained yet in half/w16-seed0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line_and_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    (here / "other").mkdir()
    (here / "other" / "cats.jpg").write_bytes(b"")
    (here / "file").write_bytes(b"")
    (here / "broken" / "cifar-10-batches-py").mkdir(parents=True)
    (here / "half" / "w16-seed0").mkdir(parents=True)
    before = contents(here)
    assert walter.main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"walter: error: {message}")
    assert contents(here) == before


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("which", ["calls.json", "checkpoint", "safetensors", "patch.safetensors", "train.json"])
def test_a_full_disk_is_said_and_nothing_is_left_in_pieces(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    small_disk: Callable[[int], None],
    which: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        before = {
            "calls.json": (training.Context, "note_call"),
            "checkpoint": (training, "tune"),
            "safetensors": (training, "serialized"),
            "patch.safetensors": (training, "save_bn_patch"),
            "train.json": (training, "write_json"),
        }[which]
        writes = getattr(*before)

        def full(*arguments: Any, **options: Any) -> Any:
            if which != "train.json" or "train" in str(arguments[0]):
                small_disk(100)
            return writes(*arguments, **options)

        patch.setattr(*before, full)
        code = walter.main(["train", "normal", "--quick", "--width", "2"])
    small_disk(10**9)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("walter: error: cannot write runs/walter-quick/w2-seed0/")
    assert f"normal.{which}: File too large" in printed.err
    assert not list(here.rglob("*.partial"))
    assert not list(here.rglob("*.train.json"))
    assert walter.main(["train", "normal", "--quick", "--width", "2"]) == 0


def test_ctrl_c_is_one_line_and_the_next_call_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(work, "adv_finetune", interrupted)
        assert walter.main(["train", "normal", "--quick", "--width", "2"]) == 130
    assert capsys.readouterr().err == "walter: interrupted; the same command goes on from what is saved\n"
    assert walter.main(["train", "normal", "--quick", "--width", "2"]) == 0


def test_what_remains_is_judged_by_rows_of_the_same_kind(
    images: data.Images, tmp_path: Path, trained: training.Context, few_attacks: list[int]
) -> None:
    made = context(images, tmp_path)
    assert made.results.seconds_an_epoch(ROWS["adv"]) is None
    assert training.train(made, "normal")
    clean = made.results.seconds_an_epoch(ROWS["normal"])
    record = json.loads(made.folder.record("normal", "train").read_text("utf-8"))
    assert clean == pytest.approx(record["history"][0]["seconds"])
    assert made.results.seconds_an_epoch(ROWS["adv"]) == pytest.approx(clean * 23 / 3)  # for want of better
    assert training.train(made, "bn-params")
    record = json.loads(made.folder.record("bn-params", "train").read_text("utf-8"))
    assert made.results.seconds_an_epoch(ROWS["adv"]) == pytest.approx(record["history"][0]["seconds"])
    assert evaluating.evaluate_row(trained, "adv")
    assert planning.remaining(trained).startswith(f"{len(ROWS) - 1} of {len(ROWS)} rows are left, about ")


def test_a_row_whose_start_is_not_trained_says_so(images: data.Images, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"^normal is not trained yet: train it first$"):
        training.train(context(images, tmp_path), "bn-params")


RESULTS = Path(__file__).parents[1] / "examples" / "results" / "walter"


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(RESULTS.glob("*/table.md"))])
def test_the_committed_tables_are_those_of_the_result_files(name: str) -> None:
    width, seed = (int(part.strip("wsed")) for part in name.split("-"))
    results = Results(Folder(RESULTS, width, seed))
    assert tables.everything(results) == (RESULTS / name / "table.md").read_text("utf-8")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_are_of_the_rows_as_they_are(path: Path) -> None:
    record = json.loads(path.read_text("utf-8"))
    key, kind, _ = path.name.split(".", 1)[0], *path.name.rsplit(".", 2)[1:]
    assert record["commit"]
    assert not record["commit"].endswith("+")
    assert record["versions"]["bnsurgery"]
    if kind != "choose":
        expected = ROWS[key].configuration()
        assert {name: record["configuration"][name] for name in expected} == expected
        assert record["configuration"]["training_images"] == 50_000
    if kind == "evaluate":
        assert record["autoattack"]["examples"] == 1000
        assert list(record["clean_error"]) == ["900", "1000", "10000"]
        assert [row["attack"] for row in record["autoattack"]["rows"]] == ["apgd-ce", "apgd-t", "fab-t", "square"]


PATCHES = [key for key in ROWS if (RESULTS / "w16-seed0" / f"{key}.patch.safetensors").exists()]


@pytest.mark.parametrize(
    "key", [key for key in PATCHES if needed([key])[0] == "normal" and (ROWS[key].only_bn or key == "normal")]
)
def test_a_committed_patch_on_the_committed_network_makes_the_recorded_one(key: str, images: data.Images) -> None:
    folder = Folder(RESULTS, 16, 0)
    made = training.Context(folder, lambda: images, scale=Scale(), device=torch.device("cpu"))
    model = training.network(made, key)
    trained, record = (json.loads(folder.record(key, kind).read_text("utf-8")) for kind in ("train", "evaluate"))
    assert files.serialized(model)[1] == trained["sha256"] == record["sha256"]
    x, y = images.tests(512)  # the shipped sample: the first test images
    error = evaluate(model, (x, y), attacks=(), progress=False).clean_error
    share = record["clean_error"]["10000"] / 100
    assert abs(error - 100 * share) < 4 * 100 * math.sqrt(share * (1 - share) / 512)
