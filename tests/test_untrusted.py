"""Files that cannot be trusted: mutated patches, checkpoints and records; nothing is executed, nothing half loaded."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from examples.common.files import Problem, read_json
from examples.common.records import look_at_tests, look_at_training
from hypothesis import given, settings
from hypothesis import strategies as st

import networks  # noqa: F401 - it puts the examples on the path
from bnsurgery import CheckpointError, PatchError, evaluate, load_bn_patch, save_bn_patch
from bnsurgery import _states as states
from networks import SMALL
from test_finetuning import batches, tune, values

RESULTS = Path(__file__).parents[1] / "examples" / "results"


@contextmanager
def nothing_executed() -> Iterator[None]:
    """Anything that runs code or a program, or unpickles, is an error in the block."""
    places = [
        (pickle, "loads"),
        (pickle, "load"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (builtins, "eval"),
        (os, "system"),
        (subprocess, "Popen"),
    ]
    held = [getattr(module, name) for module, name in places]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was executed")

    for module, name in places:
        setattr(module, name, refuse)
    try:
        yield
    finally:
        for (module, name), function in zip(places, held, strict=True):
            setattr(module, name, function)


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes changed, cut out, put in or moved; or cut short; or other bytes altogether."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), begin + draw(st.integers(0, 64)))
        kind = draw(st.sampled_from(["change", "remove", "insert", "repeat", "cut", "flip", "other"]))
        if kind == "change":
            data = data[:begin] + draw(st.binary(min_size=end - begin, max_size=end - begin)) + data[end:]
        elif kind == "remove":
            data = data[:begin] + data[end:]
        elif kind == "insert":
            data = data[:begin] + draw(st.binary(max_size=32)) + data[begin:]
        elif kind == "repeat":
            data = data[:end] + data[begin:end] + data[end:]
        elif kind == "cut":
            data = data[:begin]
        elif kind == "flip" and data:
            data = data[:begin] + bytes([data[begin] ^ (1 << draw(st.integers(0, 7)))]) + data[begin + 1 :]
        elif kind == "other":
            data = draw(st.binary(max_size=200))
    return data


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just(torch.ones(3)),
    st.just(torch.ones(2, 2, dtype=torch.bool)),
    st.just(torch.zeros(0, dtype=torch.int64)),
)


@st.composite
def other_trees(draw: st.DrawFn, tree: Any, depth: int = 0) -> Any:
    """A tree of plain values in which some part has been replaced, removed or added."""
    if depth and draw(st.integers(0, 3)) == 0:
        return draw(
            st.one_of(LEAVES, st.lists(LEAVES, max_size=2), st.dictionaries(st.text(max_size=4), LEAVES, max_size=2))
        )
    if isinstance(tree, dict) and tree:
        key = draw(st.sampled_from(sorted(tree, key=str)))
        rest = {name: value for name, value in tree.items() if name != key}
        if draw(st.integers(0, 5)) == 0:
            return rest
        return {**rest, key: draw(other_trees(tree[key], depth + 1))}
    if isinstance(tree, (list, tuple)) and tree:
        place = draw(st.integers(0, len(tree) - 1))
        changed = [*tree[:place], draw(other_trees(tree[place], depth + 1)), *tree[place + 1 :]]
        changed = changed if draw(st.integers(0, 5)) else changed[:-1]
        return type(tree)(changed)
    return draw(LEAVES)


# Patches.


@cache
def patch() -> bytes:
    path = Path(mkdtemp()) / "p"
    save_bn_patch(SMALL.build(), path)
    return path.read_bytes()


@settings(max_examples=150)
@given(st.data())
def test_a_mutated_patch_loads_whole_or_not_at_all(data: st.DataObject) -> None:
    mutated = data.draw(mutations(patch()))
    path = Path(mkdtemp()) / "p"
    path.write_bytes(mutated)
    whole = values(SMALL.build())
    model = SMALL.build()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    before = values(model)
    with nothing_executed():
        try:
            load_bn_patch(model, path)
        except PatchError as error:
            assert repr(str(path)) in str(error)
            assert values(model) == before
            return
    loaded = {name: bits for name, bits in values(model).items() if bits != before[name]}
    assert loaded == {name: whole[name] for name in loaded}
    assert {name for name in before if name.split(".")[0] in ("1", "4", "8")} >= loaded.keys()


@pytest.mark.parametrize("place", [-1, -100, -200])
def test_a_patch_with_one_bit_turned_is_known_by_its_checksum(tmp_path: Path, place: int) -> None:
    data = bytearray(patch())
    data[place] ^= 1
    (tmp_path / "p").write_bytes(bytes(data))
    with pytest.raises(PatchError, match="is damaged: its checksum does not match"):
        load_bn_patch(SMALL.build(), tmp_path / "p")


# Checkpoints.


@cache
def run() -> bytes:
    path = Path(mkdtemp()) / "c"
    tune(
        SMALL.build(), batches(4, 4), epochs=2, checkpoint=path, on_step=lambda record, _: record.step == 2, max_steps=3
    )
    return path.read_bytes()


@cache
def under_way() -> bytes:
    """A checkpoint within an epoch."""
    path = Path(mkdtemp()) / "c"

    class Stop(Exception):  # noqa: N818
        pass

    def stop(record: Any, _: object) -> None:
        if record.step == 3:
            raise Stop

    with pytest.raises(Stop):
        tune(SMALL.build(), batches(4, 4), epochs=2, checkpoint=path, checkpoint_every=0, on_step=stop)
    return path.read_bytes()


def gone_on_with(data: bytes) -> None:
    """Either the run ends as it should, or it is refused and the model is as it was."""
    path = Path(mkdtemp()) / "c"
    path.write_bytes(data)
    model = SMALL.build()
    before = values(model)
    with nothing_executed():
        try:
            result = tune(model, batches(4, 4), epochs=2, checkpoint=path)
        except CheckpointError as error:
            assert repr(str(path)) in str(error)
            assert values(model) == before
            return
    assert result.steps >= 0


def test_what_may_have_no_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "c"
    os.mkfifo(path)  # as a device: reading it would wait for ever
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*c': it is no file"):
        tune(SMALL.build(), batches(4), checkpoint=path)


@settings(max_examples=150)
@given(st.data())
def test_a_mutated_checkpoint_is_refused(data: st.DataObject) -> None:
    mutated = data.draw(mutations(under_way()))
    path = Path(mkdtemp()) / "c"
    path.write_bytes(mutated)
    model = SMALL.build()
    before = values(model)
    if mutated == under_way():
        return
    with nothing_executed(), pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        tune(model, batches(4, 4), epochs=2, checkpoint=path)
    assert values(model) == before


@settings(max_examples=120)
@given(st.data())
def test_a_checkpoint_that_somebody_made_up_leaves_the_model_whole(data: st.DataObject) -> None:
    state = data.draw(other_trees(states.loaded(under_way(), "adv_finetune")))
    try:
        made = states.dumped("adv_finetune", state)
    except TypeError:
        return
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr("bnsurgery.finetuning.warnings.warn", lambda *_, **__: None)
        gone_on_with(made)


# Evaluations.

X, Y = SMALL.example(8), torch.tensor([0, 3] * 4)


def measured(path: Path) -> Any:
    return evaluate(SMALL.build(), (X, Y), attacks=["pgd-2"], eps=0.1, batch_size=3, checkpoint=path, progress=False)


@cache
def evaluation() -> bytes:
    path = Path(mkdtemp()) / "c"
    measured(path)
    return path.read_bytes()


@settings(max_examples=150)
@given(st.data())
def test_a_mutated_evaluation_is_refused(data: st.DataObject) -> None:
    mutated = data.draw(mutations(evaluation()))
    path = Path(mkdtemp()) / "c"
    path.write_bytes(mutated)
    if mutated == evaluation():
        return
    with nothing_executed(), pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        measured(path)


@settings(max_examples=120)
@given(st.data())
def test_an_evaluation_that_somebody_made_up_is_refused_or_makes_sense(data: st.DataObject) -> None:
    state = data.draw(other_trees(states.loaded(evaluation(), "evaluate")))
    try:
        made = states.dumped("evaluate", state)
    except TypeError:
        return
    path = Path(mkdtemp()) / "c"
    path.write_bytes(made)
    with nothing_executed():
        try:
            result = measured(path)
        except CheckpointError as error:
            assert repr(str(path)) in str(error)
            return
    assert result.examples == 8
    assert not bool((result.robust & ~result.correct).any())


# Records of the examples.


@cache
def record() -> str:
    return (RESULTS / "xie" / "w16-seed0" / "adv-20.train.json").read_text(encoding="utf-8")


@settings(max_examples=150)
@given(st.data())
def test_a_mutated_record_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    path = Path(mkdtemp()) / "r.json"
    path.write_bytes(data.draw(mutations(record().encode())))
    with nothing_executed():
        try:
            read_json(path, look_at_training)
        except Problem as problem:
            assert "\n" not in str(problem)
            assert str(path) in str(problem)


@settings(max_examples=150)
@given(st.data())
@pytest.mark.parametrize("look", [look_at_training, look_at_tests], ids=["training", "tests"])
def test_a_record_that_somebody_made_up_is_read_or_refused_in_one_line(
    look: Callable[[dict[str, Any]], object], data: st.DataObject
) -> None:
    made = data.draw(other_trees(json.loads(record())))
    path = Path(mkdtemp()) / "r.json"
    try:
        path.write_text(json.dumps(made), encoding="utf-8")
    except TypeError:
        return
    with nothing_executed():
        try:
            read_json(path, look)
        except Problem as problem:
            assert "\n" not in str(problem)


# The format itself.

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(-9, 9)), inner, max_size=4),
    ),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_written_comes_back_to_the_type(value: object) -> None:
    back = states.loaded(states.dumped("kind", {"value": value}), "kind")
    assert repr(back) == repr({"value": value})


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.complex128,
        torch.bool,
        torch.int8,
        torch.uint8,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_tensors_come_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.complex128).to(dtype) if dtype.is_complex else torch.randn(shape).to(dtype)
    held = {"tensor": tensor, "view": torch.arange(12.0).view(3, 4).t()[1:]}
    back = states.loaded(states.dumped("kind", held), "kind")
    for name in held:
        assert back[name].dtype == held[name].dtype
        assert torch.equal(back[name], held[name])


@pytest.mark.parametrize(
    "value",
    [object(), {1.5: 2}, {"a": {3}}, torch.eye(2).to_sparse(), 1j],
    ids=["object", "keys that are numbers", "set", "sparse tensor", "complex"],
)
def test_what_cannot_be_kept_is_said(value: object) -> None:
    with pytest.raises(TypeError, match=r"checkpoint"):
        states.dumped("kind", {"value": value})
