"""A patch is all that BN fine-tuning changes, comes back bit for bit, and what does not fit changes nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from bnsurgery import (
    BNSurgeryError,
    BNSurgeryWarning,
    NoBatchNormError,
    PatchError,
    bn_state,
    freeze_except_bn,
    load_bn_patch,
    load_bn_state,
    save_bn_patch,
    swap_bn,
)
from bnsurgery._files import replacing
from networks import AFFINE_FREE, HEAVY, LIGHT, RESNET20, SHARED, SMALL, TIMM, Case, resnet20, shake, small
from reference import changed, differences, norm_layers, record, same
from strategies import damaged

PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def bn_keys(model: nn.Module) -> set[str]:
    return {f"{name}.{part}" for name in norm_layers(model) for part in PARTS} & model.state_dict().keys()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def other_values(model: nn.Module) -> nn.Module:
    """A copy with the same shapes and other numbers everywhere."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.add_(1)
    return twin


# in memory


@pytest.mark.parametrize("case", LIGHT + HEAVY, ids=repr)
def test_the_state_is_the_bn_part_of_the_models_state_dict_to_the_bit(case: Case) -> None:
    model = case.build()
    state, whole = bn_state(model), values(model)
    assert state.keys() == bn_keys(model)
    assert all(same(value, whole[name]) for name, value in state.items())
    assert all(not value.requires_grad for value in state.values())


def test_the_state_is_a_copy() -> None:
    model = SMALL.build()
    before = values(model)
    for value in bn_state(model).values():
        value.add_(1)
    assert changed(before, values(model)) == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LIGHT + HEAVY, ids=repr)
def test_loading_a_state_changes_the_bn_part_alone_and_in_place(case: Case, dtype: torch.dtype) -> None:
    source = case.build(dtype)
    model = other_values(source)
    before, start = record(model), values(model)
    load_bn_state(model, bn_state(source))
    assert changed(values(model), source.state_dict()) == start.keys() - bn_keys(model) - unmoved(start, source)
    assert {name for name in differences(before, record(model)) if not name.endswith(" value")} == set()
    assert {name.split(" ")[0] for name in differences(before, record(model))} <= bn_keys(model)


def unmoved(start: dict[str, Tensor], source: nn.Module) -> set[str]:
    """Entries that adding one did not change, in low precision."""
    return {name for name, value in source.state_dict().items() if same(value, start[name])}


def test_a_shared_layer_appears_once() -> None:
    model = nn.ModuleDict({"one": nn.BatchNorm1d(3)})
    model["two"] = model["one"]
    assert bn_state(model).keys() == {f"one.{part}" for part in PARTS}
    assert len(bn_state(SHARED.build())) == 15


def test_of_a_subclass_with_a_learned_activation_only_the_bn_tensors_are_taken() -> None:
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act_layer="prelu"))
    assert any("act" in name for name, _ in model[1].named_parameters())
    assert bn_state(model).keys() == {f"1.{part}" for part in PARTS}
    source = other_values(model)
    start = values(model)
    load_bn_state(model, bn_state(source))
    assert changed(start, values(model)) == {f"1.{part}" for part in PARTS}


class Doubled(nn.Module):
    def forward(self, original: Tensor) -> Tensor:
        return 2 * original


def test_of_a_parametrized_gamma_the_original_is_taken_under_its_name_in_the_state_dict(tmp_path: Path) -> None:
    model = SMALL.build()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    state = bn_state(model)
    assert "1.parametrizations.weight.original" in state
    assert "1.weight" not in state
    assert state.keys() <= model.state_dict().keys()
    twin = other_values(model)
    save_bn_patch(model, tmp_path / "patch.safetensors")
    load_bn_patch(twin, tmp_path / "patch.safetensors")
    assert torch.equal(twin[1].weight, model[1].weight)


def test_layers_without_parameters_or_statistics_give_what_they_have() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)
    )
    model[2].bias = None
    expected = {"1.weight", "1.bias", "2.weight", *(f"{layer}.{part}" for layer in (0, 2) for part in PARTS[2:])}
    assert bn_state(model).keys() == expected == model.state_dict().keys()
    assert len(bn_state(AFFINE_FREE.build())) == 9


def test_a_flag_flipped_while_the_buffers_stay_makes_no_difference() -> None:
    model = SMALL.build()
    expected = bn_state(model)
    for layer in norm_layers(model).values():
        layer.track_running_stats = False
    assert changed(expected, bn_state(model)) == set()
    load_bn_state(model, bn_state(other_values(model)))
    assert [layer.track_running_stats for layer in norm_layers(model).values()] == [False] * 3


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, DataParallel], ids=lambda wrap: wrap.__name__)
def test_wrappers_leave_no_trace_in_the_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = SMALL.build()
    assert changed(bn_state(wrap(model)), bn_state(model)) == set()
    twin = other_values(model)
    load_bn_state(wrap(twin), bn_state(model))
    assert changed(bn_state(twin), bn_state(model)) == set()


def test_distributed_data_parallel_leaves_no_trace_in_the_names(process_group: None) -> None:
    model = SMALL.build()
    assert bn_state(DistributedDataParallel(model)).keys() == bn_keys(model)


def test_what_is_viewed_elsewhere_sees_the_new_values() -> None:
    model = SMALL.build()
    view, optimizer = model[1].running_mean[:3], torch.optim.SGD(model.parameters(), lr=1.0)
    source = other_values(model)
    load_bn_state(model, bn_state(source))
    assert torch.equal(view, source[1].running_mean[:3])
    assert any(parameter is model[1].weight for parameter in optimizer.param_groups[0]["params"])


def test_a_state_is_converted_to_the_models_dtype() -> None:
    source, model = SMALL.build(torch.float64), SMALL.build(torch.bfloat16)
    expected = source[1].weight.detach().add(1)
    with torch.no_grad():
        source[1].weight.copy_(expected)
    load_bn_state(model, bn_state(source))
    assert model[1].weight.dtype == torch.bfloat16
    assert same(model[1].weight.detach(), expected.bfloat16())


def test_a_fine_tuned_model_is_the_original_and_its_patch() -> None:
    original = SMALL.build().train()
    tuned = copy.deepcopy(original)
    freeze_except_bn(tuned)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for _ in range(3):
        F.cross_entropy(tuned(SMALL.example()), SMALL.labels()).backward()
        optimizer.step()
    load_bn_state(original, bn_state(tuned))
    assert changed(original.state_dict(), tuned.state_dict()) == set()


# what does not fit


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


def with_entry(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: value(state.get(name)) if callable(value) else value})


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[0] = value
        return tensor

    return change


MISFITS = {
    "missing": (without("8.bias"), r"missing: 8\.bias$"),
    "unexpected": (with_entry("9.weight", torch.ones(3)), r"unexpected: 9\.weight$"),
    "mis-shaped": (
        with_entry("4.weight", torch.ones(3)),
        r"mis-shaped: 4\.weight is a tensor \(3,\) of torch\.float32, expected \(12,\)$",
    ),
    "would broadcast": (
        with_entry("4.weight", torch.ones(1)),
        r"mis-shaped: 4\.weight is a tensor \(1,\) of torch\.float32, expected \(12,\)$",
    ),
    "scalar counter": (
        with_entry("4.num_batches_tracked", torch.tensor([1])),
        r"mis-shaped: 4\.num_batches_tracked is a tensor \(1,\) of torch\.int64, expected \(\)$",
    ),
    "no tensor": (with_entry("4.weight", [1.0] * 12), r"mis-shaped: 4\.weight is a list of 12"),
    "nan": (with_entry("8.running_mean", spoilt(float("nan"))), r"invalid: 8\.running_mean is not finite$"),
    "infinite": (with_entry("8.weight", spoilt(float("-inf"))), r"invalid: 8\.weight is not finite$"),
    "negative variance": (with_entry("8.running_var", spoilt(-1e-6)), r"invalid: 8\.running_var is negative$"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("how", ["load_bn_state", "swap_bn", "load_bn_patch"])
def test_a_state_that_does_not_fit_is_refused_with_what_is_wrong_and_changes_nothing(
    misfit: str, how: str, tmp_path: Path
) -> None:
    spoil, message = MISFITS[misfit]
    model = SMALL.build().train()
    state: dict[str, Any] = bn_state(other_values(model))
    spoil(state)
    before = record(model)
    whole = r"the patch does not fit the model, nothing was loaded; " + message
    if how == "load_bn_patch":
        if misfit == "no tensor":
            state["4.weight"] = torch.zeros(12, 2)
            whole = r"mis-shaped: 4\.weight is a tensor \(12, 2\)"
        save_file(state, tmp_path / "patch.safetensors")
        with pytest.raises(PatchError, match=whole):
            load_bn_patch(model, tmp_path / "patch.safetensors")
    elif how == "swap_bn":
        with pytest.raises(PatchError, match="^" + whole), swap_bn(model, state):
            pytest.fail("the block must not be entered")
    else:
        with pytest.raises(PatchError, match="^" + whole):
            load_bn_state(model, state)
    assert differences(before, record(model)) == []


def test_a_value_beyond_the_models_dtype_is_refused_and_changes_nothing() -> None:
    model = SMALL.build(torch.float16)
    state = bn_state(SMALL.build())
    state["8.running_var"][0] = 1e6  # float16 ends at 65,504
    before = record(model)
    with pytest.raises(PatchError, match=r"8\.running_var"):
        load_bn_state(model, state)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("name", ["8.weight", "8.running_var", "8.num_batches_tracked"])
def test_complex_values_are_refused_and_change_nothing(name: str) -> None:
    model = SMALL.build()
    state = bn_state(other_values(model))
    state[name] = state[name].to(torch.complex64)
    before = record(model)
    with pytest.raises(PatchError, match=re.escape(name)):
        load_bn_state(model, state)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("dtype", [torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.bool, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["8.weight", "8.running_var", "8.num_batches_tracked"])
def test_a_value_of_an_odd_dtype_is_refused_or_loaded_whole(name: str, dtype: torch.dtype) -> None:
    model = SMALL.build()
    state = bn_state(other_values(model))
    state[name] = torch.ones(state[name].shape).to(dtype)
    before = record(model)
    try:
        load_bn_state(model, state)
    except PatchError:
        assert differences(before, record(model)) == []
    else:
        assert (model.state_dict()[name] == 1).all()
        assert same(model[1].weight.detach(), state["1.weight"])


def test_all_that_is_wrong_is_said_at_once_and_long_lists_are_cut() -> None:
    model = resnet20(4)
    state = bn_state(resnet20(8))
    for name in [name for name in state if name.endswith("running_mean")]:
        del state[name]
    state["odd"] = torch.ones(1)
    with pytest.raises(PatchError) as caught:
        load_bn_state(model, state)
    message = str(caught.value)
    assert re.search(r"missing: norm1\.running_mean, stages\.0\.0\.norm1\.running_mean, .* and 15 more; ", message)
    assert "; unexpected: odd; " in message
    assert re.search(r"; mis-shaped: norm1\.weight is a tensor \(8,\) of .*, expected \(4,\), .*more$", message)


@pytest.mark.parametrize(("one", "other"), [(RESNET20, SMALL), (SMALL, SHARED), (SHARED, RESNET20)], ids=str)
def test_a_patch_for_another_architecture_lists_names_and_changes_nothing(
    one: Case, other: Case, tmp_path: Path
) -> None:
    path = tmp_path / "patch.safetensors"
    source, model = one.build(), other.build().train()
    save_bn_patch(source, path)
    before = record(model)
    with pytest.raises(PatchError) as caught:
        load_bn_patch(model, path)
    message = str(caught.value)
    assert message.startswith(f"{str(path)!r}: the patch does not fit the model, nothing was loaded; missing: ")
    assert sorted(bn_keys(model) - bn_keys(source))[0] in message.split("unexpected")[0]
    assert sorted(bn_keys(source) - bn_keys(model))[0] in message.split("unexpected")[1]
    assert differences(before, record(model)) == []


def test_a_patch_for_another_width_lists_the_shapes() -> None:
    with pytest.raises(PatchError, match=r"mis-shaped: norm1\.weight is a tensor \(8,\) of .*, expected \(4,\)"):
        load_bn_state(resnet20(4), bn_state(resnet20(8)))


def test_models_without_bn_and_layers_without_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    message = "Linear has no batch-normalization layer"
    for call in (bn_state, lambda model: load_bn_state(model, {}), lambda model: save_bn_patch(model, path)):
        with pytest.raises(NoBatchNormError, match=message):
            call(nn.Linear(2, 2))
        with pytest.raises(BNSurgeryError, match="is lazy and not yet initialised: run a forward pass first"):
            call(nn.Sequential(nn.LazyBatchNorm1d()))
        with pytest.raises(BNSurgeryError, match="is on the meta device and holds no values"):
            call(nn.Sequential(nn.BatchNorm1d(2, device="meta")))
    with pytest.raises(NoBatchNormError, match=message), swap_bn(nn.Linear(2, 2), {}):
        pytest.fail("the block must not be entered")
    save_bn_patch(SMALL.build(), path)
    with pytest.raises(NoBatchNormError, match=message):
        load_bn_patch(nn.Linear(2, 2), path)
    with pytest.warns(BNSurgeryWarning, match=message):
        assert bn_state(nn.Linear(2, 2), strict=False) == {}


# swap_bn


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("case", [*LIGHT, TIMM], ids=repr)
def test_swapping_lasts_for_the_block_whatever_happens_in_it(case: Case, error: type[BaseException] | None) -> None:
    model = case.build().train()
    source = other_values(model)
    before = record(model)

    def block() -> None:
        with swap_bn(model, bn_state(source)) as swapped:
            assert swapped is model
            assert changed(bn_state(model), bn_state(source)) == set()
            model(case.example())  # moves the statistics
            with torch.no_grad():
                norm_layers(model).popitem()[1].running_var.mul_(3)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            block()
    else:
        block()
    assert differences(before, record(model)) == []


def test_swaps_nest() -> None:
    model = SMALL.build()
    one, two = bn_state(model), bn_state(other_values(model))
    three = {name: value + 2 for name, value in one.items()}
    with swap_bn(model, two):
        with swap_bn(model, three):
            assert changed(bn_state(model), three) == set()
        assert changed(bn_state(model), two) == set()
    assert changed(bn_state(model), one) == set()


def test_what_was_trained_in_the_block_can_be_kept_by_reading_it_there() -> None:
    model = SMALL.build().train()
    with swap_bn(model, bn_state(other_values(model))):
        model(SMALL.example())
        inside = bn_state(model)
    load_bn_state(model, inside)
    assert changed(bn_state(model), inside) == set()


# files


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LIGHT + HEAVY, ids=repr)
def test_a_round_trip_through_a_file_is_bit_identical(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    source = case.build(dtype)
    model = other_values(source)
    before = record(source)
    save_bn_patch(source, tmp_path / "patch.safetensors")
    assert differences(before, record(source)) == []
    addresses = {name: value.data_ptr() for name, value in model.state_dict(keep_vars=True).items()}
    load_bn_patch(model, tmp_path / "patch.safetensors")
    assert changed(bn_state(model), bn_state(source)) == set()
    assert {name: value.data_ptr() for name, value in model.state_dict(keep_vars=True).items()} == addresses


def test_a_patch_file_is_safetensors_with_the_names_of_the_state_dict(tmp_path: Path) -> None:
    model = SMALL.build()
    save_bn_patch(model, str(tmp_path / "patch.safetensors"))
    loaded = load_file(tmp_path / "patch.safetensors")
    assert changed(loaded, bn_state(model)) == set()


@pytest.mark.parametrize(("width", "limit"), [(16, 32_000), (64, 64_000)])
def test_a_patch_of_resnet20_is_small(width: int, limit: int, tmp_path: Path) -> None:
    save_bn_patch(resnet20(width), tmp_path / "patch.safetensors")
    size = (tmp_path / "patch.safetensors").stat().st_size
    numbers = {16: 1568, 64: 6272}[width]
    assert numbers * 2 * 4 < size < limit


def test_buffers_that_are_not_contiguous_or_share_memory_can_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    base = torch.rand(2, 8)
    model[0].running_mean = base[0, ::2]
    model[1].running_mean = base[0, ::2]
    save_bn_patch(model, tmp_path / "patch.safetensors")
    assert same(load_file(tmp_path / "patch.safetensors")["1.running_mean"], base[0, ::2].clone())


def test_there_being_no_file_or_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no BN patch at '.*missing\.safetensors'"):
        load_bn_patch(SMALL.build(), tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="no BN patch at"):
        load_bn_patch(SMALL.build(), tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        save_bn_patch(SMALL.build(), tmp_path / "nowhere" / "patch.safetensors")
    assert list(tmp_path.iterdir()) == []


class Trap:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "old torch.save"])
def test_a_pickle_is_refused_and_not_executed(kind: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "patch.safetensors", tmp_path / "executed"
    model = SMALL.build()
    content = {**bn_state(model), "trap": Trap(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    before = record(model)
    with pytest.raises(PatchError, match=r"patch\.safetensors' is not a safetensors file, and nothing else is read: "):
        load_bn_patch(model, path)
    assert not trace.exists()
    assert differences(before, record(model)) == []
    if kind == "pickle":
        pickle.loads(path.read_bytes())
        assert trace.exists(), "the trap must work"


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 64, b"{}", struct.pack("<Q", 2) + b"{}"], ids=repr)
def test_what_is_no_patch_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    path.write_bytes(content)
    model = SMALL.build()
    before = record(model)
    with pytest.raises(PatchError, match=r"patch\.safetensors'"):
        load_bn_patch(model, path)
    assert differences(before, record(model)) == []


def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return shake(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2, affine=False)))


def tiny_file(folder: Path) -> bytes:
    save_bn_patch(tiny(), folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


def load_damaged(content: bytes, path: Path) -> None:
    """Loads a file: a PatchError and nothing changed, or all of it, and that finite."""
    path.write_bytes(content)
    model = other_values(tiny())
    before = record(model)
    try:
        load_bn_patch(model, path)
    except PatchError:
        assert differences(before, record(model)) == []
    else:
        held = load_file(path)
        assert held.keys() == bn_state(model).keys()
        assert not any(value.is_complex() for value in held.values())
        for name, value in bn_state(model).items():
            assert value.isfinite().all()
            assert same(value, held[name].to(value.dtype))
            assert not name.endswith("running_var") or (value >= 0).all()


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    content, path = tiny_file(tmp_path), tmp_path / "patch.safetensors"
    model = other_values(tiny())
    before = record(model)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(PatchError):
            load_bn_patch(model, path)
    assert differences(before, record(model)) == []
    path.write_bytes(content)
    load_bn_patch(model, path)
    assert changed(bn_state(model), bn_state(tiny())) == set()


@settings(max_examples=400)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_loaded_whole(data: st.DataObject, tmp_path: Path) -> None:
    load_damaged(data.draw(damaged(tiny_file(tmp_path))), tmp_path / "patch.safetensors")


DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "1.num_batches_tracked"])
def test_a_file_whose_header_claims_another_dtype_is_refused_or_loaded_whole(
    name: str, dtype: str, tmp_path: Path
) -> None:
    content = tiny_file(tmp_path)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header[name]["dtype"] = dtype
    encoded = json.dumps(header).encode()
    load_damaged(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :], tmp_path / "patch.safetensors")


# writing whole or not at all


def half_written(self: Path, data: bytes) -> int:
    with self.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("disk full")


def unsynced(_: int) -> None:
    raise OSError("disk full")


FAILURES = {"half written": (Path, "write_bytes", half_written), "not synced": (os, "fsync", unsynced)}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("exists", [True, False], ids=["replaced", "new"])
def test_a_failure_while_saving_leaves_the_folder_as_it_was(
    exists: bool, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "patch.safetensors"
    if exists:
        save_bn_patch(SMALL.build(), path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(*FAILURES[failure])
    with pytest.raises(OSError, match="disk full"):
        save_bn_patch(other_values(SMALL.build()), path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert len(before) == exists


def test_saving_replaces_the_file_before(tmp_path: Path) -> None:
    path, model = tmp_path / "patch.safetensors", other_values(SMALL.build())
    save_bn_patch(RESNET20.build(), path)
    save_bn_patch(model, path)
    assert changed(load_file(path), bn_state(model)) == set()
    assert list(tmp_path.iterdir()) == [path]


def write_and_fail(partial: Path, target: Path, error: type[BaseException]) -> None:
    assert partial.parent == target.parent
    partial.write_text("new")
    assert target.read_text() == "old"
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replacing_keeps_the_target_where_the_block_fails(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(error), replacing(target) as partial:
        write_and_fail(partial, target, error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_puts_the_new_file_there_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for text in ("one", "two"):
        with replacing(target) as partial:
            partial.write_text(text)
        assert target.read_text() == text
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_fails_where_the_rename_fails_and_leaves_no_other_file(tmp_path: Path, monkeypatch: Any) -> None:
    target = tmp_path / "target"
    target.write_text("old")

    def refuse(self: Path, other: Path) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError), replacing(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_text() == "old"


def test_a_patch_serves_a_model_built_with_other_options(tmp_path: Path) -> None:
    source, model = SMALL.build(), small(momentum=None)
    save_bn_patch(source, tmp_path / "patch.safetensors")
    load_bn_patch(model, tmp_path / "patch.safetensors")
    assert changed(bn_state(model), bn_state(source)) == set()
    assert model[1].momentum is None
