"""The examples' own parts: network, data, and what the quickstart says to wrong arguments."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import resnet20

EXAMPLES = Path(__file__).parents[1] / "examples"
ROOT = EXAMPLES.parent

import cifar10
import quickstart
from resnet import ResNet


def test_resnet20_has_the_papers_parameter_counts() -> None:
    model = resnet20(64)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sum(p.numel() for p in model.parameters()) == 4_327_754
    assert len(norms) == 21
    assert sum(m.num_features for m in norms) == 3_136


@pytest.mark.parametrize(("depth", "convolutions"), [(20, 19 + 2), (56, 55 + 2), (110, 109 + 2)])
def test_depth_counts_convolutions_and_the_logits(depth: int, convolutions: int) -> None:
    model = ResNet(depth, width=2)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == convolutions


def test_a_depth_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2 \(20, .* got 21"):
        ResNet(21)
    with pytest.raises(ValueError, match=r"depth must be 8 n \+ 2 \(18, .* got 20"):
        ResNet(20, stages=4)


def test_the_network_whitens_and_clamps_its_input() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = (torch.tensor([0.0, 0.5, 1.0]) - mean) / std
    assert torch.allclose(resnet20(4).whiten(x).flatten(), expected)


def test_the_sample_is_balanced_and_begins_with_the_published_test_images() -> None:
    images, labels = cifar10.sample(train=True)
    assert images.dtype == torch.uint8
    assert images.shape == (2800, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [280] * 10
    images, labels = cifar10.sample(train=False)
    assert images.shape == (512, 3, 32, 32)
    assert [cifar10.CLASSES[label] for label in labels[:5]] == ["cat", "ship", "ship", "airplane", "frog"]
    assert images[0, :, 0, 0].tolist() == [158, 112, 49]  # the published file's first pixel


def test_the_sample_is_small() -> None:
    assert sum(file.stat().st_size for file in cifar10.SAMPLE.glob("cifar10-sample*")) <= 6_000_000


def test_the_shipped_network_is_the_one_of_its_record() -> None:
    record = json.loads((EXAMPLES / "data" / "resnet20-w16.json").read_text(encoding="utf-8"))
    assert record["test_images"] == 10_000
    assert record["clean_accuracy"] >= 0.88
    model = resnet20(16)
    model.load_state_dict(load_file(EXAMPLES / "data" / "resnet20-w16.safetensors"))
    images, labels = cifar10.sample(train=False)
    with torch.inference_mode():
        accuracy = (model.eval()(cifar10.floats(images)).argmax(1) == labels).double().mean().item()
    deviation = (record["clean_accuracy"] * (1 - record["clean_accuracy"]) / len(labels)) ** 0.5
    assert abs(accuracy - record["clean_accuracy"]) < 4 * deviation


def batch_of(images: Tensor, **options: object) -> list[tuple[Tensor, Tensor]]:
    return list(cifar10.Batches(images, torch.arange(len(images)), **options))


def test_batches_cover_each_image_once_in_a_new_order_each_time() -> None:
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    batches = cifar10.Batches(images, torch.arange(10), batch_size=4)
    assert len(batches) == 3
    torch.manual_seed(0)
    orders = [torch.cat([y for _, y in batches]).tolist() for _ in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    x, y = next(iter(batches))
    assert torch.equal(x, images[y].float() / 255)


def test_drop_last_and_no_shuffle() -> None:
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    batches = batch_of(images, batch_size=4, shuffle=False, drop_last=True)
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_augmented_images_are_crops_of_the_padded_image_or_of_its_mirror() -> None:
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    ((x, y),) = batch_of(images, batch_size=24, augment=True)
    flipped = 0
    for image, row in zip(x, y, strict=True):
        padded = F.pad(images[row].float() / 255, (4, 4, 4, 4))
        crops = {
            flip: any(
                torch.equal(image, crop.flip(-1) if flip else crop)
                for top in range(9)
                for left in range(9)
                for crop in [padded[:, top : top + 32, left : left + 32]]
            )
            for flip in (False, True)
        }
        assert any(crops.values())
        flipped += crops[True]
    assert 0 < flipped < 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--width", "x"], "argument --width: must be a whole number of at least 1, got 'x'"),
        (["--width", "32"], "no network of width 32 at"),
        (["--lr", "nan"], "argument --lr: must be a number above 0, got 'nan'"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--device", "toaster"], "argument --device: 'toaster' is not available here"),
        (["--device", "meta"], "argument --device: 'meta' is not available here"),
        (["--examples", "513"], "--examples 513: there are only 512 test images"),
        (["--network", __file__], "is not a ResNet-20 of width 16"),
        (["--network", "nowhere.safetensors"], "no network of width 16 at nowhere.safetensors: train it with"),
        (["--data", __file__], "no CIFAR-10 in"),
        (["--out", __file__], "cannot be a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "/" not in value[-1] else None,
)
def test_a_wrong_argument_gives_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        quickstart.main(arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("quickstart.py: error: ")
    assert message in printed.err


def test_a_network_of_another_width_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(resnet20(4).state_dict(), tmp_path / "n.safetensors")
    with pytest.raises(SystemExit):
        quickstart.main(["--network", str(tmp_path / "n.safetensors")])
    assert "is not a ResNet-20 of width 16" in capsys.readouterr().err


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        quickstart.main(["--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--data", "--device", "--width", "--epochs", "--seed", "--out", "--network"):
        assert option in printed


def test_the_examples_are_importable_without_side_effects() -> None:
    assert "quickstart" in sys.modules
    assert torch.get_default_dtype() == torch.float32


def test_torchrun_runs_the_quickstart_unchanged(tmp_path: Path) -> None:
    arguments = ["examples/quickstart.py", "--quick", "--out", str(tmp_path)]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy under AutoAttack") == 1  # the first process alone prints
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["finetuning"]["steps"] == 8
    assert record["after"]["autoattack"]["examples"] == 16  # of --quick
    settings = record["settings"]
    first = record["finetuning"]["history"][0]
    assert first["examples"] == first["steps"] * settings["batch_size"]  # of whole batches, not of a share
    assert record["command"] == f"torchrun --nproc-per-node 2 examples/quickstart.py --quick --out {tmp_path}"
    assert ", 2 processes of 1 threads" in record["hardware"]


@pytest.mark.parametrize("script", ["train_resnet20.py", "make_sample.py"])
def test_what_works_in_one_process_says_so_to_torchrun(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "n.safetensors"
    arguments = ["--data", str(tmp_path), *(["--out", str(out)] if "train" in script else [])]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit, match=f"{script} works in one process: start it with python, without torchrun"):
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
