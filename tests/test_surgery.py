"""Split BN layers: branches, the ways through them, and the way back."""

from __future__ import annotations

import _thread
import copy
import functools
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, convert_splitbn_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import reference
from bnsurgery import (
    PGD,
    BNSurgeryError,
    CheckpointError,
    Engine,
    NoBatchNormError,
    PatchError,
    adv_finetune,
    bn_layers,
    bn_state,
    evaluate,
    fold_bn,
    freeze_except_bn,
    fuse_bn,
    keep_branch,
    load_bn_patch,
    load_bn_state,
    plan_fusion,
    recalibrate_bn,
    reset_bn_stats,
    save_bn_patch,
    split_bn,
    use_branch,
)
from bnsurgery._branches import SplitBatchNorm, layout_of
from bnsurgery._replicas import Replicas
from bnsurgery.analysis import outputs
from networks import HEAVY, LIGHT, RESNET20, SHARED, SMALL, TIMM, Case, shake

SHARES = ["none", "parameters", "statistics"]
CASES = [*LIGHT, *HEAVY]
TESTS = Path(__file__).parent


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same, to the bit, under the same names in the same order, in the same modes."""
    states = one.state_dict(), other.state_dict()
    modes = [[(name, type(m), m.training) for name, m in model.named_modules()] for model in (one, other)]
    return (
        list(states[0]) == list(states[1])
        and all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
        and modes[0] == modes[1]
    )


def apart(model: nn.Module) -> nn.Module:
    """Gives the branches of a split model values of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return shake(model)


def parts(model: nn.Module) -> list[SplitBatchNorm]:
    return [module for module in model.modules() if isinstance(module, SplitBatchNorm)]


# There and back.


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_split_then_keep_is_the_identity_bit_for_bit(case: Case, share: Any) -> None:
    model = case.build().train()
    next(iter(bn_layers(model).values())).eval()  # a layer in another mode than the rest
    before = copy.deepcopy(model)
    split = split_bn(model, ("one", "two", "three"), share=share)
    for branch in ("one", "two", "three"):
        kept = keep_branch(split, branch)
        assert same(kept, before)
        own = {id(part) for part in (*split.parameters(), *split.buffers(), *split.modules())}
        assert not own & {id(part) for part in (*kept.parameters(), *kept.buffers(), *kept.modules())}
    assert same(model, before)
    assert not parts(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_each_branch_begins_as_what_was_there(case: Case, training: bool) -> None:
    model, x = case.build().train(training), case.example()
    split = split_bn(model)
    torch.manual_seed(0)
    expected = copy.deepcopy(model)(x)
    for branch in ("clean", "adv"):
        torch.manual_seed(0)  # dropout
        with use_branch(split, branch):
            assert torch.equal(split(x), expected)


def test_the_parts_are_bn_layers_under_names_of_their_own() -> None:
    split = split_bn(SMALL.build(), ("main", "aux"))
    assert list(bn_layers(split)) == ["1.main", "1.aux", "4.main", "4.aux", "8.main", "8.aux"]
    assert repr(split[1]).splitlines()[1:3] == ["  share='none'", f"  (main): {nn.BatchNorm2d(8)}"]


def test_a_root_that_is_a_bn_layer_is_split() -> None:
    layer = shake(nn.BatchNorm1d(3)).train()
    split = split_bn(layer)
    assert isinstance(split, SplitBatchNorm)
    assert same(keep_branch(split, "adv"), layer)


def test_a_layer_in_several_places_is_split_once() -> None:
    split = split_bn(SHARED.build())
    assert [layer.place for layer in parts(split)] == ["bn0", "bn3", "bn"]


def test_one_branch_is_enough() -> None:
    model = SMALL.build()
    assert same(keep_branch(split_bn(model, ["only"]), "only"), model)


def test_some_layers_can_be_left_as_they_are() -> None:
    model = SMALL.build()
    split = split_bn(model, layers=["4", "8"])
    assert [layer.place for layer in parts(split)] == ["4", "8"]
    assert same(keep_branch(split, "clean"), model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_left_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = SMALL.build()
    assert same(keep_branch(split_bn(wrap(model)), "adv"), model)


def test_hooks_go_with_each_branch_and_come_back() -> None:
    model, seen = SMALL.build().eval(), []
    model[1].register_forward_hook(lambda layer, _inputs, _outputs: seen.append(layer))
    split = split_bn(model)
    x = SMALL.example()
    for branch in ("clean", "adv"):
        with use_branch(split, branch):
            split(x)
    assert seen == [split[1].clean, split[1].adv]
    kept = keep_branch(split, "adv")
    kept(x)
    assert seen[2] is kept[1]


def test_a_split_layer_with_hooks_or_a_forward_of_its_own_is_not_taken_apart() -> None:
    x = SMALL.example()
    for spoil, what in (
        (lambda layer: layer.register_forward_hook(lambda _layer, _inputs, outputs: 2 * outputs), "hooks"),
        (lambda layer: setattr(layer, "forward", layer.forward), "a forward of its own"),
    ):
        split = split_bn(SMALL.build()).eval()
        spoil(split[4])
        for call in (
            lambda split: keep_branch(split, "adv"),
            lambda split: fuse_bn(split, x),
            lambda split: plan_fusion(split, x),
        ):
            with pytest.raises(BNSurgeryError, match=rf"'4' \(SplitBatchNorm\) has {what}, which would be lost: put"):
                call(split)


class Scaled(nn.BatchNorm1d):
    def forward(self, x: Tensor, *, y: float = 1.0) -> Tensor:
        return y * super().forward(x)


def test_a_split_layer_is_called_as_the_layer_was() -> None:
    layer, x = shake(Scaled(3)).eval(), torch.rand(4, 3)
    split = split_bn(layer)
    assert torch.equal(split(x=x, y=2), layer(x, y=2))
    with use_branch(split, torch.tensor([0, 1, 0, 1])):
        assert torch.allclose(split(x=x), layer(x))
        with pytest.raises(BNSurgeryError, match="was called with 2 arguments, and takes one where examples take diff"):
            split(x, y=2)


def test_a_part_of_a_model_routes_what_was_split_with_it() -> None:
    split, x = apart(split_bn(SMALL.build())).eval(), SMALL.example()
    with use_branch(split, "adv"):
        expected = split(x)
    with use_branch(split[4], "adv"):
        assert torch.equal(split(x), expected)


@dataclass
class Settings:
    norm: nn.Module


class Keeps(nn.Module):
    """Refers to its BN layer in ways that torch does not list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.logits = nn.Linear(4, 10)
        self.listed = [self.bn]
        self.named = {"bn": (self.bn, 1)}
        self.bound = self.bn.forward
        self.settings = Settings(self.bn)
        self.partial = functools.partial(self.bn)
        self.few = frozenset([self.bn])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            x = self.listed[0](x) + self.named["bn"][0](x)
        else:
            x = self.bound(x) + self.settings.norm(x) + self.partial(x) + next(iter(self.few))(x)
        return self.logits(x.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
def test_wherever_the_model_refers_to_the_layer_it_is_split(training: bool) -> None:
    model = shake(Keeps()).train(training)
    split, x = apart(split_bn(model)), torch.rand(4, 3, 6, 6)
    for branch in ("clean", "adv"):
        kept = keep_branch(split, branch)
        with use_branch(split, branch):
            assert torch.equal(split(x), kept(x))
    with use_branch(split, "clean"):
        assert not torch.equal(split(x), kept(x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parametrized_gamma_stays_parametrized() -> None:
    model = SMALL.build()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    split = split_bn(model)
    assert split[1].adv.parametrizations.weight.original is not split[1].clean.parametrizations.weight.original
    shared = split_bn(model, share="parameters")
    assert shared[1].adv.parametrizations.weight.original is shared[1].clean.parametrizations.weight.original
    assert torch.equal(shared[1].adv.weight, model[1].weight)


# The way through.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0]])
@pytest.mark.parametrize("training", [False, True])
def test_a_mixed_batch_equals_two_passes(training: bool, order: list[int], dtype: torch.dtype) -> None:
    split = apart(split_bn(SMALL.build(dtype))).train(training)
    twice = copy.deepcopy(split)
    x, index = SMALL.example(dtype=dtype), torch.tensor(order)
    with use_branch(split, index):
        mixed = split(x)
        mixed.square().sum().backward()
    expected = torch.empty_like(mixed)
    for number, branch in enumerate(("clean", "adv")):
        with use_branch(twice, branch):
            expected[index == number] = twice(x[index == number])
    expected.square().sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert torch.allclose(mixed, expected, rtol=tolerance, atol=tolerance)
    largest = max(float(parameter.grad.abs().max()) for parameter in twice.parameters())
    for (name, one), (_, other) in zip(split.named_parameters(), twice.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=10 * tolerance * largest), name
    for (name, one), (_, other) in zip(split.named_buffers(), twice.named_buffers(), strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance), name


@given(index=st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_whatever_the_order_each_example_takes_its_branch(index: list[int]) -> None:
    layer = apart(split_bn(nn.BatchNorm1d(3), ("a", "b", "c"))).eval()
    x = torch.linspace(-1, 1, 3 * len(index)).view(-1, 3)
    with use_branch(layer, torch.tensor(index)):
        found = layer(x)
    for example, number, value in zip(x, index, found, strict=True):
        own = getattr(layer, "abc"[number])
        expected = reference.batch_norm(example[None], own.running_mean, own.running_var, own.weight, own.bias)
        assert np.allclose(reference.array(value[None]), expected, atol=1e-6)


def test_of_two_branches_bools_say_which() -> None:
    layer, x = apart(split_bn(nn.BatchNorm1d(3))).eval(), torch.rand(4, 3)
    with use_branch(layer, torch.tensor([True, False, True, False])):
        found = layer(x)
    assert torch.equal(found[0], layer.adv(x)[0])
    assert torch.equal(found[1], layer.clean(x)[1])


def test_a_branch_that_no_example_takes_is_left_alone() -> None:
    layer = split_bn(nn.BatchNorm1d(3)).train()
    with use_branch(layer, torch.ones(4, dtype=torch.int64)):
        layer(torch.rand(4, 3))
    assert (int(layer.clean.num_batches_tracked), int(layer.adv.num_batches_tracked)) == (0, 1)


def test_the_memory_format_of_images_stays() -> None:
    layer = split_bn(nn.BatchNorm2d(3)).train()
    x = torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for index in ([0, 0, 1, 1], [0, 1, 0, 1]):
        with use_branch(layer, torch.tensor(index)):
            assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_the_first_branch_is_where_nothing_is_chosen() -> None:
    split, x = apart(split_bn(SMALL.build(), ("main", "aux"))).eval(), SMALL.example()
    assert torch.equal(split(x), keep_branch(split, "main")(x))


def test_blocks_nest_and_end_with_exceptions() -> None:
    split, x = apart(split_bn(SMALL.build())).eval(), SMALL.example()
    clean, adv = (keep_branch(split, branch)(x) for branch in ("clean", "adv"))
    with use_branch(split, "adv") as given:
        assert given is split
        with use_branch(split, "clean"):
            assert torch.equal(split(x), clean)
            with suppress(ZeroDivisionError), use_branch(split, torch.ones(6, dtype=torch.uint8)):
                assert torch.allclose(split(x), adv, atol=1e-6)
                raise ZeroDivisionError
            assert torch.equal(split(x), clean)
        assert torch.equal(split(x), adv)
        with pytest.raises(ValueError, match="no branch 'none'"), use_branch(split, "none"):
            pass  # pragma: no cover - never entered
        assert torch.equal(split(x), adv)
    assert torch.equal(split(x), clean)


def test_threads_choose_by_themselves() -> None:
    split, x = apart(split_bn(SMALL.build(), ("a", "b", "c"))).eval(), SMALL.example()
    expected = {branch: keep_branch(split, branch)(x) for branch in "abc"}
    barrier, found = threading.Barrier(3), {}

    def run(branch: str) -> None:
        with use_branch(split, branch):
            barrier.wait(10)
            first = split(x)
            barrier.wait(10)
        found[branch] = first, split(x)

    threads = [threading.Thread(target=run, args=(branch,)) for branch in "abc"]
    with use_branch(split, "c"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert torch.equal(split(x), expected["c"])
    for branch in "abc":
        assert torch.equal(found[branch][0], expected[branch])
        assert torch.equal(found[branch][1], expected["a"])


def in_a_thread_of_the_system(call: Callable[[], object]) -> object:
    """What a call gives, or raises, in a thread that Python's threading has not started, as autograd's on a GPU."""
    done, found = threading.Event(), []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)
        done.set()

    _thread.start_new_thread(run, ())
    assert done.wait(10)
    return found[0]


def test_a_thread_of_the_system_goes_where_the_last_pass_went_of_the_one_it_works_for() -> None:
    layer, x = apart(split_bn(nn.BatchNorm1d(3))).eval(), torch.rand(4, 3)
    assert torch.equal(in_a_thread_of_the_system(lambda: layer(x)), layer.clean(x))
    with use_branch(layer, "clean"), use_branch(layer, "adv"):
        layer(x)
        assert torch.equal(in_a_thread_of_the_system(lambda: layer(x)), layer.adv(x))
    assert torch.equal(in_a_thread_of_the_system(lambda: layer(x)), layer.adv(x))  # a backward pass after the block
    layer(x)
    assert torch.equal(in_a_thread_of_the_system(lambda: layer(x)), layer.clean(x))
    go_on, done = threading.Event(), threading.Event()

    def other() -> None:
        with use_branch(layer, "adv"):
            layer(x)
        done.set()
        go_on.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert done.wait(10)
    assert "threads use several branches at once" in str(in_a_thread_of_the_system(lambda: layer(x)))
    go_on.set()
    thread.join(10)
    assert torch.equal(in_a_thread_of_the_system(lambda: layer(x)), layer.clean(x))  # that thread is gone


def test_blocks_may_end_in_another_order_than_they_began() -> None:
    layer, x = apart(split_bn(nn.BatchNorm1d(3), ("a", "b", "c"))).eval(), torch.rand(4, 3)
    first, second = use_branch(layer, "b"), use_branch(layer, "c")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(layer(x), layer.c(x))
    second.__exit__(None, None, None)
    assert torch.equal(layer(x), layer.a(x))


def test_threads_that_are_gone_are_forgotten() -> None:
    layer, x = split_bn(nn.BatchNorm1d(3)).eval(), torch.rand(4, 3)
    layer.router._last = {-number: "adv" for number in range(1, 200)}  # no thread has such a number
    layer(x)
    assert layer.router._last == {threading.get_ident(): "clean"}


def test_replicas_of_data_parallel_go_where_the_model_goes() -> None:
    layer, x = apart(split_bn(nn.BatchNorm1d(3))).eval(), torch.rand(4, 3)
    with use_branch(layer, "adv"):
        replica = layer._replicate_for_data_parallel()
    replica._modules = dict(layer._modules)
    assert torch.equal(replica(x), layer.adv(x))
    assert torch.equal(layer(x), layer.clean(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_for_good_as_the_model_is_inside_the_block(copied: Callable[[nn.Module], nn.Module]) -> None:
    split, x = apart(split_bn(SMALL.build())).eval(), SMALL.example()
    adv = keep_branch(split, "adv")(x)
    with use_branch(split, "adv"):
        inside = copied(split)
    assert torch.equal(inside(x), adv)
    assert torch.equal(copied(split)(x), split(x))
    with use_branch(inside, "clean"):
        assert torch.equal(inside(x), split(x))
        assert torch.equal(copied(split)(x), split(x))  # another model: this block is not for it
    with use_branch(split, torch.ones(6, dtype=torch.int64)):
        mixed = copied(split)
    assert torch.allclose(mixed(x), adv, atol=1e-6)


def test_a_model_made_of_split_models_is_routed_whole() -> None:
    parts_of = [apart(split_bn(nn.BatchNorm1d(3))) for _ in range(2)]
    model, x = nn.Sequential(*parts_of).eval(), torch.rand(4, 3)
    with use_branch(model, "adv"):
        assert torch.equal(model(x), model[1].adv(model[0].adv(x)))
    with use_branch(model[0], "adv"):
        assert torch.equal(model(x), model[1].clean(model[0].adv(x)))


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    split = split_bn(SMALL.build())
    with use_branch(split, "adv"):
        split(SMALL.example())
    gone = [weakref.ref(split), weakref.ref(split[1].router)]
    del split
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# Compiled, wrapped, moved.


@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole_it_takes_each_branch(training: bool) -> None:
    torch._dynamo.reset()
    split, x = apart(split_bn(SMALL.build())).train(training), SMALL.example()
    eager = copy.deepcopy(split)
    compiled = torch.compile(split, backend="eager", fullgraph=True)
    ways = ["clean", "adv", torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 1, 0])]
    with torch._dynamo.config.patch(recompile_limit=len(ways) + 1, fail_on_recompile_limit_hit=True):
        for _ in range(3):  # more often than it may be compiled
            for way in ways:
                with use_branch(split, way):
                    found = compiled(x)
                with use_branch(eager, way):
                    assert torch.allclose(found, eager(x), atol=1e-6)
    with use_branch(split, "adv"):
        result = []
        thread = threading.Thread(target=lambda: result.append(compiled(x)))
        thread.start()
        thread.join(20)
    assert torch.allclose(result[0], eager(x), atol=1e-6)


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.double(),
        lambda model: model.to(torch.float64),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), model)[1],
        lambda model: model.to_empty(device="cpu"),
    ],
    ids=["double", "to", "deepcopy", "pickle", "assign", "to_empty"],
)
@pytest.mark.parametrize("share", SHARES)
def test_what_is_shared_stays_shared(share: str, move: Callable[[nn.Module], nn.Module]) -> None:
    split = move(split_bn(SMALL.build(), ("a", "b", "c"), share=share))
    for layer in parts(split):
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            shared = share == ("parameters" if name in ("weight", "bias") else "statistics")
            held = [getattr(branch, name) for branch in (layer.a, layer.b, layer.c)]
            assert (held[0] is held[1]) == shared, name
            assert (held[0] is held[2]) == shared, name
            assert (held[0].data_ptr() == held[2].data_ptr()) == shared, name
    assert len(list(split.parameters())) == len({id(p) for p in split.parameters()})


def test_shared_statistics_move_for_all_and_shared_parameters_train_for_all() -> None:
    x = torch.rand(8, 3)
    layer = split_bn(nn.BatchNorm1d(3), share="statistics").train()
    with use_branch(layer, "adv"):
        layer(x)
    assert torch.equal(layer.clean.running_mean, layer.adv.running_mean)
    assert bool(layer.clean.running_mean.any())
    layer = split_bn(nn.BatchNorm1d(3), share="parameters").train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with use_branch(layer, torch.tensor([0] * 4 + [1] * 4)):
        layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.clean.weight, layer.adv.weight)
    assert not torch.equal(layer.clean.weight, torch.ones(3))
    assert not torch.equal(layer.clean.running_mean, layer.adv.running_mean)


@pytest.mark.parametrize("share", ["parameters", "statistics"])
def test_values_that_differ_are_not_loaded_into_what_is_shared(share: Any) -> None:
    shared, split = split_bn(SMALL.build(), share=share), apart(split_bn(SMALL.build()))
    before = copy.deepcopy(shared)
    with pytest.raises(
        RuntimeError, match=rf"'1' \(SplitBatchNorm\) shares {share}, and '1.adv.* differs from another"
    ):
        shared.load_state_dict(split.state_dict())
    shared = before
    with pytest.raises(PatchError, match=r"1.adv.\w+ differs from 1.clean.\w+, and the model holds them together"):
        load_bn_state(shared, bn_state(split))
    load_bn_state(shared, bn_state(shared))
    shared.load_state_dict(shared.state_dict())


def test_what_branches_have_is_not_asked_of_the_layer_that_holds_them() -> None:
    split = split_bn(SMALL.build())
    with pytest.raises(
        AttributeError, match=r"'1' \(SplitBatchNorm\) has no 'weight' of its own.*: take 1.clean.weight"
    ):
        _ = split[1].weight
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = split[1].nothing


def test_what_ties_layers_to_one_another_ties_each_branch() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    split = split_bn(model)
    for branch in ("clean", "adv"):
        kept = keep_branch(split, branch)
        assert kept[0].weight is kept[1].weight
    assert split[0].adv.weight is split[1].adv.weight
    assert split[0].adv.weight is not split[0].clean.weight


def test_no_examples_at_all_pass() -> None:
    layer = split_bn(nn.BatchNorm2d(3)).eval()
    with use_branch(layer, torch.zeros(0, dtype=torch.int64)):
        assert layer(torch.rand(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_synchronised_layers_are_made_of_each_branch() -> None:
    split = apart(split_bn(SMALL.build(), share="parameters"))
    made = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(split))
    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in bn_layers(made).values())
    assert made[1].clean.weight is made[1].adv.weight
    back = split_bn(nn.SyncBatchNorm.convert_sync_batchnorm(SMALL.build()))
    assert all(type(layer) is nn.SyncBatchNorm for layer in bn_layers(back).values())


def test_two_processes_with_a_mixed_batch_each_take_the_mean_of_their_gradients(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "split_ranks.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store"), str(tmp_path / "out")]) for rank in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in (0, 1)]

    import split_ranks

    alone = split_ranks.model()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for rank in (0, 1):  # each with statistics of its own share of the batch
        (split_ranks.loss(alone, rank) / 2).backward()
    optimizer.step()
    for name, parameter in alone.named_parameters():
        assert torch.equal(found[0]["by hand"][name], found[1]["by hand"][name]), name
        assert torch.allclose(found[0]["by hand"][name], parameter, atol=1e-10), name
    assert found[0]["tuned"].keys() == found[1]["tuned"].keys()
    moved = split_ranks.model().state_dict()
    for name, tensor in found[0]["tuned"].items():
        assert torch.equal(tensor, found[1]["tuned"][name]), name
        assert not torch.equal(tensor, moved[name]), name


# With the rest of the library.


def test_freezing_leaves_each_branch_to_train() -> None:
    split = split_bn(SMALL.build(), layers="4")
    with freeze_except_bn(split) as freeze:
        assert freeze.trainable == (
            "1.weight", "1.bias", "4.clean.weight", "4.clean.bias", "4.adv.weight", "4.adv.bias", "8.weight", "8.bias",
        )  # fmt: skip
    frozen = freeze_except_bn(split, stats="frozen", also="0")
    before = reference.array(split[4].adv.running_mean)
    with use_branch(split.train(), "adv"):
        split(SMALL.example())
    assert np.array_equal(reference.array(split[4].adv.running_mean), before)
    frozen.remove()


def test_a_freeze_goes_with_what_is_split() -> None:
    model = SMALL.build()
    freeze_except_bn(model, stats="frozen")
    split = split_bn(model).train()
    assert not any(layer.training for layer in bn_layers(split).values())
    assert split[0].training
    assert [name for name, p in split.named_parameters() if p.requires_grad][:2] == ["1.clean.weight", "1.clean.bias"]


def test_resetting_and_recalibrating_reach_the_branch_in_use() -> None:
    split = apart(split_bn(SMALL.build()))
    kept = keep_branch(split, "adv")
    batches = [SMALL.example(8), SMALL.example(5) ** 2]
    before = bn_state(split)
    with use_branch(split, "adv"):
        found = recalibrate_bn(split, batches)
    recalibrate_bn(kept, batches)
    assert found.layers == ("1.adv", "4.adv", "8.adv")
    assert found.kept == ("1.clean", "4.clean", "8.clean")
    after = bn_state(split)
    assert all(torch.equal(after[name], before[name]) for name in before if ".clean." in name)
    assert all(
        torch.equal(after[name.replace("1.", "1.adv.", 1)], t) for name, t in bn_state(kept).items() if name[0] == "1"
    )
    assert reset_bn_stats(split, layers="*.clean") == ["1.clean", "4.clean", "8.clean"]


def test_statistics_that_branches_share_are_those_of_all_examples() -> None:
    layer = apart(split_bn(nn.BatchNorm2d(3), share="statistics"))
    x = torch.rand(9, 3, 4, 4, dtype=torch.float64)
    layer = layer.double()
    with use_branch(layer, torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1])):
        found = recalibrate_bn(layer, [x])
        with pytest.raises(BNSurgeryError, match=r"'clean' \(BatchNorm2d\) and 'adv' .* the same statistics"):
            recalibrate_bn(layer, [x], estimator="exact")
    mean, variance = reference.moments(x)
    assert np.allclose(reference.array(layer.adv.running_mean), mean, atol=1e-12)
    assert np.allclose(reference.array(layer.clean.running_var), variance, atol=1e-12)
    assert found.elements == {"clean": 144, "adv": 144}
    with use_branch(layer, "adv"):
        found = recalibrate_bn(layer, [x])
    assert (found.layers, found.kept) == (("clean", "adv"), ())  # clean's moved with them


def test_folding_reads_each_branch() -> None:
    split = apart(split_bn(SMALL.build()))
    folded = fold_bn(split)
    for branch in ("clean", "adv"):
        for name, affine in fold_bn(keep_branch(split, branch)).items():
            assert torch.equal(folded[f"{name}.{branch}"].weight, affine.weight)
            assert torch.equal(folded[f"{name}.{branch}"].bias, affine.bias)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("branch", ["clean", "adv"])
@pytest.mark.parametrize("case", [RESNET20, TIMM, SHARED], ids=repr)
def test_fusing_takes_the_branch_in_use(case: Case, branch: str, traced: bool) -> None:
    split, x = apart(split_bn(case.build())).eval(), case.example()
    with use_branch(split, branch):
        plan = plan_fusion(split, x if traced else None)
        fused = fuse_bn(split, x if traced else None)
        expected = split(x)
    assert plan == plan_fusion(keep_branch(split, branch), x if traced else None)
    assert fused.fusion_plan == plan
    assert not parts(fused)
    assert torch.allclose(fused(x), expected, atol=1e-4)


def test_a_patch_is_of_all_branches_or_of_one(tmp_path: Path) -> None:
    split, other = apart(split_bn(SMALL.build())), split_bn(SMALL.build())
    save_bn_patch(split, tmp_path / "all.safetensors")
    load_bn_patch(other, tmp_path / "all.safetensors")
    assert same(other, split)
    save_bn_patch(keep_branch(split, "adv"), tmp_path / "adv.safetensors")
    plain = SMALL.build()
    load_bn_patch(plain, tmp_path / "adv.safetensors")
    assert same(plain, keep_branch(split, "adv"))


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_evaluation_is_of_the_branch_in_use(engine: Any) -> None:
    split = apart(split_bn(RESNET20.build()))
    data = RESNET20.example(12), RESNET20.labels(12)
    options = {"attacks": [PGD(0.01, 5, 0.005)], "eps": 0.01, "keep_adversarial": True, "progress": False}
    for branch in ("clean", "adv"):
        expected = evaluate(keep_branch(split, branch), data, **options, engine=engine)
        with use_branch(split, branch):
            found = evaluate(split, data, **options, engine=engine)
        assert torch.equal(found.robust, expected.robust)
        assert torch.equal(found.adversarial, expected.adversarial)


# Beside timm's SplitBatchNorm2d.


@pytest.mark.parametrize("bn", [BatchNormAct2d, nn.BatchNorm2d])
def test_a_batch_in_two_parts_gives_what_timm_gives(bn: type[nn.Module]) -> None:
    model = shake(nn.Sequential(nn.Conv2d(3, 8, 3), bn(8), nn.Conv2d(8, 4, 3), bn(4))).train()
    theirs, split = convert_splitbn_model(copy.deepcopy(model), 2), split_bn(model)
    if not hasattr(theirs[1], "act"):  # older ones lose it
        theirs = (
            nn.Sequential(theirs[0], theirs[1], nn.ReLU(), *theirs[2:], nn.ReLU()) if bn is BatchNormAct2d else theirs
        )
    x = torch.randn(6, 3, 8, 8)
    with use_branch(split, torch.tensor([0, 0, 0, 1, 1, 1])):
        assert torch.allclose(split(x), theirs(x), atol=1e-6)
    assert torch.allclose(split[1].adv.running_mean, theirs[1].aux_bn[0].running_mean, atol=1e-6)


def test_an_activation_stays_in_each_branch() -> None:
    model = shake(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8))).eval()
    x = torch.randn(6, 3, 8, 8)
    split = apart(split_bn(model))
    assert all(type(layer) is BatchNormAct2d for layer in bn_layers(split).values())
    for branch in ("clean", "adv"):
        with use_branch(split, branch):
            found = split(x)
        assert float(found.detach().min()) == 0
        assert torch.equal(found, keep_branch(split, branch)(x))


def test_the_auxiliary_branch_is_attacked_in_evaluation_mode_which_timm_cannot() -> None:
    model = TIMM.build().eval()
    theirs = convert_splitbn_model(copy.deepcopy(model), 2).eval()
    assert theirs.bn1.aux_bn[0].training is False
    for layer in theirs.bn1.aux_bn:
        nn.init.zeros_(layer.weight)
    x, y = TIMM.example(4), TIMM.labels(4)
    assert torch.isfinite(theirs(x)).all()
    before = theirs(x)
    nn.init.ones_(theirs.bn1.aux_bn[0].weight)
    assert torch.equal(theirs(x), before)  # in evaluation mode nothing goes through it
    split = apart(split_bn(model))
    attack = PGD(8 / 255, steps=3, random_start=False)
    made = {}
    for branch in ("clean", "adv"):
        with use_branch(split, branch):
            made[branch] = attack(split, x, y)
        assert torch.equal(made[branch], attack(keep_branch(split, branch), x, y))
    assert not torch.equal(made["clean"], made["adv"])


# Refusals, after which the model is as before.


@pytest.fixture
def untouched() -> Iterator[nn.Module]:
    model = split_bn(SMALL.build())
    before = copy.deepcopy(model)
    yield model
    assert same(model, before)
    assert model[1].router.chosen is None
    assert torch.equal(model.eval()(SMALL.example()), before.eval()(SMALL.example()))


def test_a_split_model_is_not_split_again(untouched: nn.Module) -> None:
    with pytest.raises(BNSurgeryError, match=r"'1' \(SplitBatchNorm\) is split already, into 'clean', 'adv': use keep"):
        split_bn(untouched)


@pytest.mark.parametrize("call", [keep_branch, lambda model, branch: use_branch(model, branch).__enter__()])
def test_an_unknown_branch_is_said_with_those_there_are(untouched: nn.Module, call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="there is no branch 'aux': this model is split into 'clean', 'adv'"):
        call(untouched, "aux")


@pytest.mark.parametrize("call", [keep_branch, lambda model, branch: use_branch(model, branch).__enter__()])
def test_a_model_that_is_not_split_has_no_branches(call: Callable[..., Any]) -> None:
    with pytest.raises(BNSurgeryError, match="no BN layer of Sequential is split: use split_bn first"):
        call(SMALL.build(), "adv")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got a int"):
        call(3, "adv")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 1, 2, 0, 0, 0]), r"numbers among 0 \('clean'\), 1 \('adv'\), got 0 to 2"),
        (torch.tensor([0, -1, 0, 0, 0, 0]), r"numbers among 0 \('clean'\), 1 \('adv'\), got -1 to 0"),
        (torch.zeros(6), r"integers \(N,\), one for each example, got a tensor \(6,\) of torch.float32"),
        (torch.zeros(6, 1, dtype=torch.int64), r"integers \(N,\), .*, got a tensor \(6, 1\)"),
        (torch.zeros(6, dtype=torch.int64).to_sparse(), r"integers \(N,\), one for each example, got a tensor \(6,\)"),
        (3, r"branch must be a name, or a tensor of integers \(N,\), got a int"),
        ([0, 1], r"branch must be a name, or a tensor of integers \(N,\), got a list of 2"),
    ],
)
def test_wrong_routes_are_refused(untouched: nn.Module, index: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), use_branch(untouched, index):
        pass  # pragma: no cover - never entered


@pytest.mark.parametrize("count", [0, 5, 7])
def test_a_route_of_another_length_names_the_layer(untouched: nn.Module, count: int) -> None:
    message = rf"'1' \(SplitBatchNorm\) was given a batch of 6, and use_branch one of {count} entries"
    with pytest.raises(ValueError, match=message), use_branch(untouched, torch.zeros(count, dtype=torch.int64)):
        untouched(SMALL.example())


def test_fusing_and_planning_take_one_branch(untouched: nn.Module) -> None:
    with use_branch(untouched, torch.zeros(6, dtype=torch.int64)):
        for call in (fuse_bn, plan_fusion):
            with pytest.raises(BNSurgeryError, match=rf"{call.__name__} takes one branch .*, 'clean'\)"):
                call(untouched, SMALL.example())


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ("clean", r"one or several names, such as \('clean', 'adv'\), got 'clean'"),
        ((), "one or several names"),
        (("a", "a"), "different names, got 'a', 'a'"),
        (("a", "b.c"), "Python identifiers, and no attributes of modules, .* got 'b.c'"),
        (("a", "train"), "got 'train'"),
        (("a", "router"), "got 'router'"),
        (("a", "running_mean"), r"as an attribute of '1' \(BatchNorm2d\), got 'running_mean'"),
        (("a", 3), "got 3"),
    ],
)
def test_names_that_cannot_be_are_refused(branches: Any, message: str) -> None:
    model = SMALL.build()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        split_bn(model, branches)
    assert same(model, before)


def test_what_cannot_be_split_is_said() -> None:
    with pytest.raises(NoBatchNormError):
        split_bn(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="share must be one of 'none', 'parameters', 'statistics', got 'all'"):
        split_bn(SMALL.build(), share="all")
    with pytest.raises(ValueError, match="layers='2' matches nothing; the nearest names are"):
        split_bn(SMALL.build(), layers="2")
    with pytest.raises(BNSurgeryError, match=r"share='statistics' needs running statistics, and '1' .* has none"):
        split_bn(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3, track_running_stats=False)), share="statistics")
    with pytest.raises(BNSurgeryError, match=r"'0' \(LazyBatchNorm2d\) is lazy"):
        split_bn(nn.Sequential(nn.LazyBatchNorm2d()))

    theirs = convert_splitbn_model(nn.Sequential(nn.BatchNorm2d(3)), 2)
    with pytest.raises(
        BNSurgeryError, match=r"'0' \(SplitBatchNorm2d\) holds BN layers of its own, as one that another"
    ):
        split_bn(theirs)

    class Uncopied(nn.BatchNorm2d):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("not this one")

    with pytest.raises(BNSurgeryError, match=r"cannot be copied \(RuntimeError: not this one\), and this is done on a"):
        split_bn(nn.Sequential(Uncopied(3)))


def test_the_models_that_timm_names_are_there() -> None:
    assert isinstance(timm.create_model("mobilenetv3_small_050", num_classes=10).bn1, BatchNormAct2d)


# Trained.


def batches(case: Case, count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    shape = (size, *case.shape[1:])
    return [
        (torch.rand(shape, generator=generator), torch.randint(10, (size,), generator=generator)) for _ in range(count)
    ]


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("train", ["bn", "bn-params", "bn-stats", "all"])
def test_one_branch_in_use_trains_as_a_model_that_is_not_split(train: Any, engine: Any) -> None:
    model, data = RESNET20.build(), batches(RESNET20)
    split = split_bn(model)
    options = {"epochs": 2, "train": train, "engine": engine, "attack": PGD(steps=3), "progress": False}
    plain = adv_finetune(model, data, **options)
    with use_branch(split, "adv"):
        run = adv_finetune(split, data, **options, clean_fraction=0.0)
    assert same(keep_branch(split, "adv"), model)
    assert [record.loss for record in run.history] == [record.loss for record in plain.history]
    untouched = bn_state(keep_branch(split, "clean"))
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in bn_state(RESNET20.build()).items())


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("names", [("clean", "adv"), ("adv", "clean")])
def test_each_part_goes_through_its_branch_and_the_attack_through_the_adversarial(names: Any, engine: Any) -> None:
    split = apart(split_bn(SMALL.build(torch.float64), names))
    by_hand = copy.deepcopy(split)
    ((x, y),) = batches(SMALL, 1)
    x = x.double()
    attack = PGD(8 / 255, steps=4, random_start=False)
    run = adv_finetune(
        split, [(x, y)], epochs=1, train="all", attack=attack, clean_fraction=0.375, engine=engine,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), progress=False,
    )  # fmt: skip
    made = attack(keep_branch(by_hand, "adv"), x[3:], y[3:])
    by_hand.train()
    with use_branch(by_hand, "clean"):
        clean = by_hand(x[:3])
    with use_branch(by_hand, "adv"):
        adversarial = by_hand(made)
    logits = torch.cat([clean, adversarial])
    loss = F.cross_entropy(logits, y)
    assert run.history[0].loss == pytest.approx(float(loss.detach()), abs=1e-9)
    assert run.history[0].error == pytest.approx(100 * float((logits.argmax(1) != y).double().mean()))
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    for (name, one), (_, other) in zip(split.state_dict().items(), by_hand.state_dict().items(), strict=True):
        assert torch.allclose(one, other, atol=1e-9), name


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_one_branch_alone_may_train(branch: str, engine: Any) -> None:
    split = split_bn(SMALL.build())
    for name, parameter in split.named_parameters():
        parameter.requires_grad_(f".{branch}." in name)
    before = copy.deepcopy(split.state_dict())
    run = adv_finetune(
        split, batches(SMALL), epochs=1, train="as-is", attack=PGD(steps=1), clean_fraction=0.5, engine=engine,
        progress=False,
    )  # fmt: skip
    assert run.history[0].steps == 3
    moved = {name for name, parameter in split.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, _ in split.named_parameters() if f".{branch}." in name}


def test_a_loss_may_compare_the_parts_of_a_batch() -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        clean, adversarial = logits.chunk(2)
        pairs = (clean - adversarial).square().sum(1).repeat(2)
        return F.cross_entropy(logits, y, reduction="none") + pairs

    runs = []
    for engine in ("fast", "plain"):
        split = apart(split_bn(SMALL.build(torch.float64)))
        attack = PGD(8 / 255, steps=2, random_start=False)
        data = [(torch.cat([x[:4], x[:4]]).double(), torch.cat([y[:4], y[:4]])) for x, y in batches(SMALL)]
        adv_finetune(
            split, data, epochs=1, train="all", attack=attack, clean_fraction=0.5, loss=loss, engine=engine,
            progress=False,
        )  # fmt: skip
        runs.append(split.state_dict())
    for name, tensor in runs[0].items():
        assert torch.allclose(tensor, runs[1][name], atol=1e-9), name


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"attack": None}, {"clean"}),
        ({"clean_fraction": 1.0}, {"clean"}),
        ({}, {"adv"}),
        ({"clean_fraction": 0.5}, {"clean", "adv"}),
        ({"clean_fraction": 0.5, "branches": ("adv", "clean")}, {"clean", "adv"}),
        ({"branches": ("clean", "clean")}, {"clean"}),
    ],
)
def test_what_is_not_in_the_batch_leaves_its_branch_alone(options: dict[str, Any], moved: set[str]) -> None:
    split = split_bn(SMALL.build())
    adv_finetune(split, batches(SMALL), epochs=1, **{"attack": PGD(steps=1)} | options, progress=False)
    counts = {branch: int(getattr(split[1], branch).num_batches_tracked) - 7 for branch in ("clean", "adv")}
    assert {branch for branch, count in counts.items() if count} == moved
    assert set(counts.values()) <= {0, 3}


def test_a_mixed_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    data = batches(SMALL)
    options: dict[str, Any] = {"epochs": 4, "attack": PGD(steps=2), "clean_fraction": 0.5, "progress": False}
    whole, cut = split_bn(SMALL.build()), split_bn(SMALL.build())
    adv_finetune(whole, data, **options, consistent_bn_after=2)
    path = tmp_path / "run"
    for _ in range(4):
        adv_finetune(cut, data, **options, consistent_bn_after=2, checkpoint=path, max_seconds=1e-9)
    assert same(whole, cut)


@pytest.mark.parametrize("train", ["bn", "bn-stats"])
def test_a_checkpoint_of_another_branch_or_of_other_sharing_is_refused(tmp_path: Path, train: Any) -> None:
    options: dict[str, Any] = {"epochs": 2, "attack": PGD(steps=1), "progress": False, "train": train}
    options |= {"checkpoint": tmp_path / "run", "max_seconds": 1e-9}
    with use_branch(split := split_bn(SMALL.build()), "adv"):
        adv_finetune(split, batches(SMALL), **options)
    untouched = split_bn(SMALL.build())
    with use_branch(untouched, "clean"), pytest.raises(CheckpointError, match=r"use_branch was .*adv.*, is .*clean"):
        adv_finetune(untouched, batches(SMALL), **options)
    with pytest.raises(CheckpointError, match=r"branches was None, is \['clean', 'adv'\]; use_branch was"):
        adv_finetune(untouched, batches(SMALL), **options)
    shared = split_bn(SMALL.build(), share="statistics")
    with use_branch(shared, "adv"), pytest.raises(CheckpointError, match=r"share was \{'none': 3}, is \{'stati"):
        adv_finetune(shared, batches(SMALL), **options)
    assert same(untouched, split_bn(SMALL.build()))
    with use_branch(split, "adv"):
        assert len(adv_finetune(split, batches(SMALL), **options).history) == 2


def test_a_checkpoint_of_other_branches_by_example_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "attack": None, "progress": False, "checkpoint": tmp_path / "run"}
    options |= {"max_seconds": 1e-9}
    ((x, y),) = batches(SMALL, 1)
    index, other = torch.arange(len(y)) % 2, (torch.arange(len(y)) + 1) % 2
    split = split_bn(SMALL.build())
    with use_branch(split, index):
        adv_finetune(split, [(x, y)], **options)
    with use_branch(split, other), pytest.raises(CheckpointError, match="use_branch was "):
        adv_finetune(split, [(x, y)], **options)
    with use_branch(split, index.clone()):
        assert len(adv_finetune(split, [(x, y)], **options).history) == 2


def test_what_a_checkpoint_says_of_a_model_that_is_not_split_is_nothing() -> None:
    assert layout_of(SMALL.build()) == {}
    assert layout_of(split_bn(SMALL.build())) == {"share": {"none": 3}, "use_branch": [None]}


def test_branches_are_chosen_for_all_split_layers_or_for_none() -> None:
    model = nn.Sequential(*(nn.Sequential(split_bn(nn.BatchNorm1d(3))) for _ in range(2)), nn.Linear(3, 10))
    before = copy.deepcopy(model)
    data = [(torch.rand(4, 3), torch.arange(4))]
    with use_branch(model[0], "adv"), pytest.raises(BNSurgeryError, match="has chosen for some split layers and not f"):
        adv_finetune(model, data, epochs=1, attack=None, progress=False)
    assert same(model, before)


def test_a_copy_of_a_checkpoint_goes_on_with_consistent_bn_to_the_same_bits(tmp_path: Path) -> None:
    data, path = batches(SMALL), tmp_path / "run"
    options: dict[str, Any] = {"epochs": 4, "attack": PGD(steps=2), "progress": False}
    plain = SMALL.build()
    adv_finetune(plain, data, **options)
    for after in (2, 3):
        whole, fork = SMALL.build(), SMALL.build()
        adv_finetune(whole, data, **options, consistent_bn_after=after)
        adv_finetune(SMALL.build(), data, **options, checkpoint=path, max_seconds=1e-9)
        adv_finetune(SMALL.build(), data, **options, checkpoint=path, max_seconds=1e-9)
        run = adv_finetune(fork, data, **options, consistent_bn_after=after, checkpoint=path)
        assert len(run.history) == 4
        assert same(whole, fork)
        assert not same(whole, plain)
        path.unlink()


def test_a_checkpoint_of_other_consistent_epochs_is_refused(tmp_path: Path) -> None:
    data, path = batches(SMALL), tmp_path / "run"
    options: dict[str, Any] = {"epochs": 4, "attack": PGD(steps=1), "progress": False, "checkpoint": path}
    for _ in range(2):
        adv_finetune(SMALL.build(), data, **options, max_seconds=1e-9)
    untouched = SMALL.build()
    for after in (0, 1):  # it would have been consistent in an epoch that is made already
        with pytest.raises(CheckpointError, match=f"consistent_bn_after was None, is {after}: use another path"):
            adv_finetune(untouched, data, **options, consistent_bn_after=after)
    assert same(untouched, SMALL.build())
    adv_finetune(SMALL.build(), data, **options, consistent_bn_after=2, max_seconds=1e-9)
    for other in (None, 3):
        with pytest.raises(CheckpointError, match=f"consistent_bn_after was 2, is {other}"):
            adv_finetune(untouched, data, **options, consistent_bn_after=other)
    adv_finetune(SMALL.build(), data, **options, consistent_bn_after=2)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        (
            ("main", "aux"),
            r"branches=\('main', 'aux'\): there is no branch 'main': .* 'clean', 'adv'; name two of these",
        ),
        (("clean",), r"branches must be two, for clean and for adversarial examples, got \('clean',\)"),
        ("ab", "branches must be two, .* got 'ab'"),
        (3, "branches must be two, .* got 3"),
    ],
)
def test_branches_that_a_model_has_not_are_said(untouched: nn.Module, branches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adv_finetune(untouched, batches(SMALL), epochs=1, branches=branches, progress=False)


def test_branches_of_a_model_that_is_not_split_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="no BN layer is split: use split_bn, which returns a copy"):
        adv_finetune(SMALL.build(), batches(SMALL), epochs=1, branches=("main", "aux"), progress=False)


def test_a_batch_with_one_example_for_a_branch_is_left_out() -> None:
    split = split_bn(SMALL.build())
    data = [(x[:4], y[:4]) for x, y in batches(SMALL)]
    with pytest.warns(UserWarning, match="that batch is left out"):
        run = adv_finetune(split, data, epochs=1, attack=PGD(steps=1), clean_fraction=0.25, progress=False)
    assert run.history[0].left_out == 3
    assert same(split, split_bn(SMALL.build()))


@pytest.mark.parametrize("fuse", [True, False])
def test_the_copies_that_attacks_run_on_follow_the_branch_and_its_values(fuse: bool) -> None:
    split, x = apart(split_bn(RESNET20.build())).eval(), RESNET20.example(8)
    replicas = Replicas(split, Engine(fuse=fuse), dtype=None, compile=False)
    mixed = torch.tensor([0, 1] * 4)
    made: dict[str, Any] = {}
    for turn in range(3):
        for way in ("clean", "adv", mixed):
            with use_branch(split, way), torch.no_grad():
                replica = replicas.fresh(x)
                assert replica is not None
                assert torch.allclose(replica.net(x), split(x), atol=1e-4)
            assert made.setdefault(str(way), replica) is replica  # none is made anew
            assert replica.route == (way if isinstance(way, str) else replica.route[0],)
        with torch.no_grad():
            for parameter in split.parameters():
                parameter.mul_(1.01 + 0.01 * turn)
        split.norm1.adv.running_mean.add_(0.1)
    assert len({id(replica) for replica in made.values()}) == 3


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("branches", [("clean", "adv"), ("adv", "clean")])
def test_whatever_is_shared_the_engine_attacks_as_the_model_itself(branches: Any, share: Any, fuse: bool) -> None:
    split = apart(split_bn(RESNET20.build(torch.float64), branches, share=share))
    x, y = RESNET20.example(8, torch.float64), RESNET20.labels(8)
    for branch in branches:
        with use_branch(split, branch):
            fast = outputs(split, (x.float(), y), attack=PGD(steps=2, random_start=False), engine=Engine(fuse=fuse))
            slow = outputs(split, (x.float(), y), attack=PGD(steps=2, random_start=False), engine="plain")
        assert torch.allclose(fast.logits, slow.logits, atol=1e-4)
    run = adv_finetune(
        split.float(), [(x.float(), y)], epochs=2, attack=PGD(steps=1), clean_fraction=0.5, progress=False
    )
    assert run.skipped == 0


def test_an_attack_on_a_mixed_batch_is_that_on_its_parts() -> None:
    split = apart(split_bn(RESNET20.build(torch.float64)))
    x, y = RESNET20.example(6, torch.float64), RESNET20.labels(6)
    index = torch.tensor([0, 1, 1, 0, 1, 0])
    attack = PGD(8 / 255, steps=3, random_start=False)
    with use_branch(split, index):
        made = attack(split, x, y)
    for number, branch in enumerate(("clean", "adv")):
        alone = attack(keep_branch(split, branch), x[index == number], y[index == number])
        assert torch.allclose(made[index == number], alone, atol=1e-12)
    with use_branch(split, index):
        adv_finetune(split, [(x, y)], epochs=2, attack=attack, progress=False)
    assert int(split.norm1.adv.num_batches_tracked) == 9


# Consistent BN.


@pytest.mark.parametrize("train", ["bn", "all", "bn-params", "as-is"])
def test_after_that_epoch_statistics_stay_and_parameters_train(train: Any) -> None:
    model, seen = SMALL.build(), []

    def look(_record: object, model: nn.Module) -> None:
        layer = bn_layers(model)["1"]
        seen.append([layer.running_mean.clone(), layer.weight.detach().clone()])

    adv_finetune(
        model, batches(SMALL), epochs=4, train=train, attack=PGD(steps=1), consistent_bn_after=2, callbacks=look,
        schedule="constant", progress=False,
    )  # fmt: skip
    moves = [not torch.equal(seen[k][0], seen[k + 1][0]) for k in range(3)]
    assert moves == [train != "bn-params", False, False]
    assert all(not torch.equal(seen[k][1], seen[k + 1][1]) for k in range(3))
    assert model.training


def test_a_consistent_step_is_that_of_a_network_in_evaluation_mode() -> None:
    model = SMALL.build(torch.float64)
    by_hand = copy.deepcopy(model)
    ((x, y),) = batches(SMALL, 1)
    x = x.double()
    adv_finetune(
        model, [(x, y)], epochs=1, train="all", attack=None, consistent_bn_after=0,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), progress=False,
    )  # fmt: skip
    F.cross_entropy(by_hand.eval()(x), y).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    for (name, one), (_, other) in zip(model.state_dict().items(), by_hand.state_dict().items(), strict=True):
        assert torch.allclose(one, other, atol=1e-10), name


@pytest.mark.parametrize("after", [-1, 3, 1.5, "1", True])
def test_an_epoch_that_is_none_is_refused(after: Any) -> None:
    with pytest.raises(ValueError, match=f"from 0 to below epochs=3, got {after!r}"):
        adv_finetune(SMALL.build(), batches(SMALL), epochs=3, consistent_bn_after=after, progress=False)


def test_consistent_bn_needs_statistics_and_something_else_that_trains() -> None:
    with pytest.raises(ValueError, match="with train='bn-stats' nothing else moves"):
        adv_finetune(SMALL.build(), batches(SMALL), epochs=1, train="bn-stats", consistent_bn_after=0, progress=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.BatchNorm1d(10, track_running_stats=False))
    with pytest.raises(BNSurgeryError, match=r"consistent_bn_after needs running statistics, and '2' \(BatchNorm1d\)"):
        adv_finetune(model, batches(SMALL), epochs=1, consistent_bn_after=0, progress=False)
