"""Every operation on networks of torchvision and timm: right, or refused by name. All of them with ``--zoo``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torchvision
from torch import nn

import zoo_checks
from zoo import FEWEST_OF_TIMM, Architecture, Case, case_of

ROOT = Path(__file__).parents[1]
RECORD: dict[str, Any] = json.loads((ROOT / "benchmarks/results/zoo.json").read_text(encoding="utf-8"))
LISTED = {
    name: Architecture(*name.split("/", 1), own["family"], own["task"])  # type: ignore[arg-type]
    for name, own in RECORD["listed"].items()
}
SMALL = (
    "torchvision/shufflenet_v2_x0_5",  # channels shuffled
    "torchvision/mnasnet0_5",  # depthwise, momentum of its own
    "torchvision/quantized_resnet18",  # sums are modules
    "torchvision/lraspp_mobilenet_v3_large",  # segmentation
    "torchvision/ssdlite320_mobilenet_v3_large",  # detection
    "timm/test_byobnet",  # BN with activation in it
    "timm/test_efficientnet",
    "timm/test_resnet",
    "timm/dla46x_c",  # a tree
    "timm/ghostnet_050",  # features made from others
    "timm/mobilevit_xxs",  # convolutions and attention
    "timm/repghostnet_050",  # branches with BN alone
    "timm/starnet_s050",
    "timm/xcit_nano_12_p16_224",  # attention over channels
)
"""One of each structure, small enough for every run."""
_BUILT: dict[str, Case] = {}


def built(name: str) -> Case:
    """The same for all operations, which leave it as it was."""
    if name not in _BUILT:
        _BUILT.clear()
        _BUILT[name] = case_of(LISTED[name])
    return _BUILT[name]


def tried(name: str) -> None:
    """All operations, each with what the result file says."""
    case, wrong = built(name), []
    for operation in (operation for operation in zoo_checks.OPERATIONS if zoo_checks.suits(operation, case)):
        found = zoo_checks.check(operation, case)
        if found["verdict"] != RECORD["architectures"][name]["operations"][operation]["verdict"]:
            wrong.append(f"{operation}: {found['verdict']}, {found['note']}")
    assert not wrong


@pytest.mark.parametrize("name", SMALL)
def test_operations_are_right_or_refused_on_one_network_of_each_kind(name: str) -> None:
    tried(name)


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", LISTED)
def test_operations_are_right_or_refused_on_every_network(name: str) -> None:
    tried(name)


def test_the_result_file_is_complete_and_holds_nothing_wrong() -> None:
    found = RECORD["architectures"]
    assert found.keys() == RECORD["listed"].keys()
    assert sum(name.startswith("timm/") for name in found) >= FEWEST_OF_TIMM
    always = set(zoo_checks.OPERATIONS) - {"recalibrate, exact"}
    for name, own in found.items():
        assert always <= own["operations"].keys(), name
        for operation, entry in own["operations"].items():
            assert entry["verdict"] in ("right", "refused"), (name, operation, entry)
            assert entry["note"], (name, operation)


def test_the_result_file_has_every_architecture_of_torchvision() -> None:
    if torchvision.__version__.split("+")[0] != RECORD["environment"]["versions"]["torchvision"]:
        pytest.skip("the result file is of another version of torchvision")
    listed = {name.partition("/")[2] for name in RECORD["listed"] if name.startswith("torchvision/")}
    assert listed | set(RECORD["without_bn"]) == set(torchvision.models.list_models())


def test_the_result_file_names_no_place_of_this_machine() -> None:
    assert not re.search(r"(?<![\w/.])/(tmp|home|work|usr|root|var)/", json.dumps(RECORD))


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("reset", "reset_bn_stats"),
        ("recalibrate", "recalibrate_bn"),
        ("fold", "fold_bn"),
        ("patch", "load_bn_patch"),
        ("split", "split_bn"),
        ("replace by GroupNorm", "replace_bn"),
    ],
)
def test_what_is_wrong_is_seen(operation: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves: an operation that moves one beta by a little is found out."""
    real = getattr(zoo_checks.bnsurgery, name)

    def slightly_wrong(model: nn.Module, *args: Any, **named: Any) -> Any:
        done = real(model, *args, **named)
        first = next(iter(zoo_checks.bn_of(model).values()))
        assert first.bias is not None
        first.bias.data[0] += 1e-3
        return done

    monkeypatch.setattr(zoo_checks.bnsurgery, name, slightly_wrong)
    assert zoo_checks.check(operation, built("timm/test_resnet"))["verdict"] == "wrong"
