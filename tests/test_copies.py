"""What makes a copy fit or not: what models keep as attributes, and how they are copied."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnsurgery._graphs
from bnsurgery import (
    PGD,
    BNSurgeryError,
    BNSurgeryWarning,
    Engine,
    FusionError,
    adv_finetune,
    fuse_bn,
    plan_fusion,
    replace_bn,
    split_bn,
)
from bnsurgery._graphs import MOST_CAPTURES, Steps
from bnsurgery._layouts import runs_channels_last
from bnsurgery._replicas import Replicas, craft_on_copy
from bnsurgery._signature import signature
from odd_networks import Build, Net, batches, wide
from test_attacks import World
from test_engine import SHORT, assert_same, replica_of, tuned

# Functions that are kept as attributes and refer to the model.


def with_forward_compiled() -> nn.Module:
    model = Net()
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


def with_closure(path: str) -> Build:
    def make() -> nn.Module:
        model = Net()
        *parents, name = path.split(".")
        owner = model.get_submodule(".".join(parents))
        old = getattr(owner, name)
        setattr(owner, name, lambda x: 2 * old(x))
        return model

    return make


class Dropping(Net):
    """Dropout within a function: it has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.act = lambda z: self.drop(F.relu(z))

    def neck(self, z: Tensor) -> Tensor:
        return self.act(super().neck(z))


class Peeking(Net):
    """A function that takes values of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = lambda z: z + self.conv1.weight.data.mean()

    def neck(self, z: Tensor) -> Tensor:
        return super().neck(self.shift(z))


CLOSURES: dict[str, Build] = {
    "dropout": Dropping,
    "data": Peeking,
    "compiled forward": with_forward_compiled,
    "model": with_closure("forward"),
    "method": with_closure("neck"),
    "convolution": with_closure("conv2.forward"),
    "BN": with_closure("bn2.forward"),
}


@pytest.fixture
def seeded() -> Iterator[Callable[..., tuple[dict[str, Tensor], list[Tensor]]]]:
    """As tuned, from the same random state each time."""

    def run(*args: object, **options: object) -> tuple[dict[str, Tensor], list[Tensor]]:
        torch.manual_seed(0)
        return tuned(*args, **options)  # type: ignore[arg-type]

    with torch.random.fork_rng(devices=[]):
        yield run


@pytest.mark.parametrize("name", CLOSURES)
def test_a_function_that_refers_to_the_model_is_no_way_around_the_copy(
    name: str, seeded: Callable[..., tuple[dict[str, Tensor], list[Tensor]]]
) -> None:
    build, engine = wide(CLOSURES[name]), Engine(channels_last=False)  # dropout draws in the order of memory
    with pytest.warns(BNSurgeryWarning, match="live model.*a function that refers to the model") as caught:
        fast, made = seeded(build, batches(6, 6, 6), engine=engine)
    assert len(caught) == 1
    plain, seen = seeded(build, batches(6, 6, 6), engine="plain")
    assert all(torch.allclose(one, other, rtol=0, atol=1e-9) for one, other in zip(made, seen, strict=True))
    assert all(torch.allclose(plain[key].double(), fast[key].double(), rtol=1e-7, atol=1e-9) for key in plain)
    assert int(fast["bn1.num_batches_tracked"]) == int(build().bn1.num_batches_tracked) + 3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("training", [False, True])
def test_such_a_model_is_not_touched(name: str, training: bool) -> None:
    model, ((x, _),) = wide(CLOSURES[name])().train(training), batches(6)
    world = World(model)
    for call in (fuse_bn, plan_fusion):
        with pytest.raises(FusionError, match="a function that refers to the model is kept as an attribute"):
            call(model, x)
        assert world.unchanged()
    with pytest.warns(BNSurgeryWarning, match="on the live model"):
        assert Replicas(model, Engine(), dtype=None, compile=False).fresh(x) is None
    assert world.unchanged()
    runs_channels_last(model, x, modes=(False, True), hooks=True)
    assert world.unchanged()


@pytest.mark.parametrize("name", CLOSURES)
def test_copies_that_live_on_do_not_share_what_functions_refer_to(name: str) -> None:
    model = wide(CLOSURES[name])()
    world = World(model)
    for change in (split_bn, lambda model: replace_bn(model, "none", layers="bn1")):
        with pytest.raises(BNSurgeryError, match=r"a copy of \w+ would run parts of the model itself.*attribute"):
            change(model)
    assert world.unchanged()


def hooked(model: nn.Module) -> None:
    model.conv2.register_forward_hook(lambda _module, _inputs, outputs: outputs + model.conv1.bias.sum())


def with_a_default(model: nn.Module) -> None:
    model.conv2.forward = lambda x, conv=model.conv1: conv(x[:, :3])  # type: ignore[method-assign]


def in_a_list(model: nn.Module) -> None:
    model.extras = [(1, lambda: model.conv1)]


def bound_around(model: nn.Module) -> None:
    inner = model.conv2.forward
    model.conv2.forward = MethodType(lambda _self, x: 2 * inner(x), model.conv2)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [hooked, with_a_default, in_a_list, bound_around])
def test_functions_are_looked_for_wherever_a_module_keeps_them(change: Callable[[nn.Module], None]) -> None:
    model = Net()
    change(model)
    with pytest.raises(BNSurgeryError, match=r"(a hook|attribute '(forward|extras)') of .* refers to the model"):
        split_bn(model)


NET_OF_A_SCRIPT = nn.Module()


def test_functions_are_looked_into_for_global_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    monkeypatch.setitem(globals(), "NET_OF_A_SCRIPT", model)
    model.conv2.forward = lambda x: sum(NET_OF_A_SCRIPT.conv1(part) for part in (x[:, :3],))  # type: ignore
    with pytest.raises(BNSurgeryError, match=r"attribute 'forward' of .* refers to the model"):
        split_bn(model)
    monkeypatch.setitem(globals(), "NET_OF_A_SCRIPT", Net())
    split_bn(model)


def bound(model: nn.Module) -> None:
    model.conv2.inner = model.conv2.forward
    model.conv2.forward = MethodType(lambda self, x: 2 * self.inner(x), model.conv2)  # type: ignore[method-assign]


def partly(model: nn.Module) -> None:
    model.conv2.forward = partial(nn.Conv2d.forward, model.conv2)  # type: ignore[method-assign]


def noting(model: nn.Module) -> None:
    seen: list[str] = []
    model.conv2.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))


def compiled_in_place(model: nn.Module) -> None:
    model.conv1.compile(backend="eager")


@pytest.mark.parametrize("change", [bound, partly, noting, compiled_in_place])
def test_what_is_copied_along_with_a_module_is_no_reason_to_refuse(change: Callable[[nn.Module], None]) -> None:
    model, ((x, _),) = wide(Net)(), batches(6)
    change(model)
    split = split_bn(model)
    assert torch.equal(split(x), model(x))
    split(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_plan_made_elsewhere_is_no_way_around_it_either() -> None:
    ((x, _),) = batches(6)
    plan = plan_fusion(wide(Net)(), x)
    model = wide(with_closure("forward"))().train()
    world = World(model)
    with pytest.raises(FusionError, match="a function that refers to the model"):
        fuse_bn(model, x, plan=plan)
    assert world.unchanged()


def test_bound_methods_are_copied() -> None:
    def make() -> nn.Module:
        model = Net()
        model.forward = types.MethodType(lambda self, x: 2 * Net.forward(self, x), model)  # type: ignore[method-assign]
        return model

    assert_same(wide(make), batches(6, 6, 6))


# What a pass leaves behind.


class Forgetting(Net):
    """Keeps its features in training mode, and puts them away in evaluation mode."""

    features: Tensor | None = None

    def neck(self, z: Tensor) -> Tensor:
        z = super().neck(z)
        self.features = z.detach() if self.training else None
        return z


class Deleting(Net):
    def neck(self, z: Tensor) -> Tensor:
        z = super().neck(z)
        if self.training:
            self.features = z.detach()
        elif hasattr(self, "features"):
            del self.features
        return z


class ExpandedAttribute(Net):
    """A plain tensor whose entries share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.full((1,), 0.1, dtype=torch.float64).expand(6)

    def neck(self, z: Tensor) -> Tensor:
        return super().neck(z + self.shift.view(-1, 1, 1).to(z))


class Caching(Net):
    """A weight that a trained gain makes, kept from the last training step for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.kept: Tensor | None = None

    def neck(self, z: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = self.conv2.weight * (3 * self.gain).view(-1, 1, 1, 1)
        return F.relu(self.bn2(F.conv2d(z, self.kept, padding=1)))


class Folding(Net):
    """Folds a weight at the first pass in evaluation mode, and keeps it until it trains again."""

    folded: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.folded = None

    def train(self, mode: bool = True) -> Folding:
        self.folded = None
        super().train(mode)
        return self

    def neck(self, z: Tensor) -> Tensor:
        if self.training:
            return F.relu(self.bn2(self.conv2(z)))
        if self.folded is None:
            self.folded = self.conv2.weight * (self.bn2.weight / (self.bn2.running_var + 1e-5).sqrt()).view(-1, 1, 1, 1)
        return F.relu(F.conv2d(z, self.folded, padding=1))


class FoldingInto(Folding):
    """The same, into a dictionary, or an attribute that is otherwise not there."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> FoldingInto:
        self.kept.clear()
        if hasattr(self, "other"):
            del self.other
        super().train(mode)
        return self

    def neck(self, z: Tensor) -> Tensor:
        if not self.training:
            self.kept.setdefault("weight", 2 * self.conv2.weight.detach())
            if not hasattr(self, "other"):
                self.other = self.bn2.weight.detach().clone()
            z = F.conv2d(z, self.kept["weight"], padding=1) * self.other.view(-1, 1, 1)
        return super().neck(z)


class Recurrent(Net):
    """An LSTM, which keeps a list of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def neck(self, z: Tensor) -> Tensor:
        z = super().neck(z)
        return self.lstm(z.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, z.shape[2:])


class Listing(Net):
    """Lists of its own parameters and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.gammas = [self.bn1.weight, self.bn2.weight]
        self.means = (self.bn1.running_mean, self.bn2.running_mean)


class Gridded(Net):
    """Grids by shape, made where they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[int, Tensor] = {}
        self.grid: Tensor | None = None

    def neck(self, z: Tensor) -> Tensor:
        if z.shape[-1] not in self.grids:
            self.grids[z.shape[-1]] = torch.linspace(0, 1, z.shape[-1], dtype=z.dtype)
        self.grid = self.grids[z.shape[-1]] if self.grid is None else self.grid
        return super().neck(z + self.grids[z.shape[-1]] + self.grid)


def used_in_inference_mode() -> nn.Module:
    model = Gridded().double().eval()
    with torch.inference_mode():
        model(batches(2)[0][0])
    return model


class Branching(Net):
    """Which way depends on the data, in torch's own words."""

    def neck(self, z: Tensor) -> Tensor:
        z = super().neck(z)
        return torch.cond(z.mean() > 0.1, lambda z: 2 * z, lambda z: z - 1, (z,))  # type: ignore[no-any-return]


@dataclass
class Settings:
    slope: float = 0.1
    later: list[int] = dataclasses.field(init=False)


@dataclass
class Nested:
    inner: Settings = dataclasses.field(default_factory=Settings)


class Plain:
    """Settings in an object of any class."""

    def __init__(self) -> None:
        self.slope = 0.1


class Calling(Plain):
    """The same, and it can be called."""

    def __call__(self) -> float:
        return self.slope


class Configured(Net):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        self.slope = getattr(self.config, "inner", self.config).slope
        return super().forward(x)


KEPT: dict[str, tuple[Build, dict[str, object]]] = {
    "features put away": (Forgetting, {}),
    "features deleted": (Deleting, {}),
    "expanded": (ExpandedAttribute, {}),
    "weight folded for evaluation": (Folding, {"lr": 1.0}),
    "values kept for evaluation": (FoldingInto, {"lr": 1.0}),
    "weight kept with its graph": (Caching, {"also": ("gain",), "lr": 1.0}),
    "list of parameters of a trained LSTM": (Recurrent, {"also": ("lstm.*",)}),
    "lists of parameters and buffers": (Listing, {}),
    "tensors of inference mode": (used_in_inference_mode, {}),
    "torch.cond": (Branching, {}),
    "field without a value": (lambda: Configured(Settings()), {}),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.cond's own
@pytest.mark.parametrize("name", KEPT)
def test_whatever_a_model_keeps(name: str) -> None:
    build, options = KEPT[name]
    assert_same(wide(build), batches(*[6] * 8), **options)  # a warning, that copies are no use, would be an error


@pytest.mark.parametrize(
    "config",
    [Settings, Nested, Plain, Calling, lambda: SimpleNamespace(slope=0.1), lambda: argparse.Namespace(slope=0.1)],
)
def test_settings_that_change_are_followed(config: Callable[[], object]) -> None:
    def change(_found: object, model: nn.Module) -> None:
        vars(getattr(model.config, "inner", model.config))["slope"] = -0.5

    assert_same(wide(lambda: Configured(config())), batches(6, 6), epochs=2, callbacks=[change])
    model = wide(lambda: Configured(config()))()
    before = signature(model)
    assert signature(model) == before
    change(None, model)
    assert signature(model) != before


def test_a_first_batch_of_one_settles_no_layout() -> None:
    class Pooled(Net):
        """Cannot be trained on one example alone."""

        def __init__(self) -> None:
            super().__init__()
            self.bn3 = nn.BatchNorm1d(6)

        def neck(self, z: Tensor) -> Tensor:
            return self.bn3(super().neck(z).mean((2, 3)))[:, :, None, None]

    layouts: dict[int, bool] = {}
    model = wide(Pooled)()
    model.register_forward_pre_hook(
        lambda module, inputs: (
            layouts.update({len(inputs[0]): inputs[0].is_contiguous(memory_format=torch.channels_last)})
            if module.training
            else None
        )
    )
    with pytest.warns(BNSurgeryWarning, match="one value per channel"):
        adv_finetune(model, batches(1, 6), epochs=1, attack=SHORT, progress=False)
    assert layouts[6]


# Classes that copy themselves.


class Remade(Net):
    def __deepcopy__(self, memo: dict[int, object]) -> Net:
        other = type(self)().to(self.head.weight.dtype)
        memo[id(self)] = other
        return other


class Reloaded(Net):
    """Its values are copied, nothing else."""

    def __deepcopy__(self, memo: dict[int, object]) -> Net:
        other = type(self)().to(self.head.weight.dtype)
        other.load_state_dict(self.state_dict())
        memo[id(self)] = other
        return other


def reloaded_with_hook() -> nn.Module:
    model = Reloaded()
    model.bn1.register_forward_hook(lambda _module, _inputs, output: 1.5 * output)
    return model


def reloaded_with_slope() -> nn.Module:
    model = Reloaded()
    model.slope = 0.9
    return model


@pytest.mark.parametrize("make", [Remade, reloaded_with_hook, reloaded_with_slope])
def test_a_copy_that_computes_something_else_is_not_attacked(make: Build) -> None:
    with pytest.warns(BNSurgeryWarning, match="live model.*does not compute what it does itself") as caught:
        fast, made = tuned(wide(make), batches(6, 6, 6))
    assert len(caught) == 1
    plain, seen = tuned(wide(make), batches(6, 6, 6), engine="plain")
    assert all(torch.allclose(one, other, rtol=0, atol=1e-9) for one, other in zip(made, seen, strict=True))
    assert all(torch.allclose(plain[key].double(), fast[key].double(), rtol=1e-7, atol=1e-9) for key in plain)


def test_a_model_is_not_run_where_torch_copies_it() -> None:
    model, ((x, _),) = wide(Recurrent)(), batches(6)
    calls: list[int] = []
    model.register_forward_hook(lambda module, _inputs, _output: calls.append(id(module)))
    replica_of(model, x)
    assert id(model) not in calls


# Numbers that a precision does not hold.


class Large(Net):
    """Activations that are infinite in float16."""

    def neck(self, z: Tensor) -> Tensor:
        return super().neck(3e5 * z)


def test_a_copy_whose_numbers_overflow_is_not_attacked() -> None:
    model, ((x, y),) = wide(Large)().float().eval(), batches(6, dtype=torch.float32)
    with pytest.warns(BNSurgeryWarning, match="own precision.*float16.*not finite"):
        replica = replica_of(model, x, dtype=torch.float16)
    made = craft_on_copy(replica, SHORT, x, y, generator=torch.Generator().manual_seed(3))
    plain = SHORT(model, x, y, generator=torch.Generator().manual_seed(3))
    assert float(((made - plain).abs() > 1e-6).double().mean()) < 0.01
    assert replica_of(model, x, dtype=torch.bfloat16).dtype == torch.bfloat16


# Captured steps: which one stands for which attack. (That they compute the same is tested on a GPU.)


class Recorded:
    """In the place of a captured step: what it was made of."""

    made = 0

    def __init__(self, function: Callable[..., object], inputs: tuple[Tensor, ...]) -> None:
        Recorded.made += 1
        self.outputs = function(*inputs)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    monkeypatch.setattr(bnsurgery._graphs, "Captured", Recorded)
    Recorded.made = 0
    return Steps(wide(Net)().eval(), list)


class Other(PGD):
    pass


def test_an_attack_that_is_the_same_uses_its_step_again(steps: Steps) -> None:
    ((x, y), (fewer, own)) = batches(6, 4)
    scaled = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 0.5, 1.0]}
    first = steps.captured(PGD(0.1, 3, **scaled), x, x, y, x.dtype)
    assert steps.captured(PGD(0.1, 3, **scaled), x, x, y, x.dtype) is first
    assert Recorded.made == 1
    assert steps.captured(PGD(0.1, 3, **scaled), fewer, fewer, own, x.dtype) is not first
    assert steps.captured(PGD(0.1, 3, **scaled), x, x, y, x.dtype) is first


class Remembering(PGD):
    """Keeps something from step to step."""

    def losses(self, *args: object, **options: object) -> Tensor:
        self._last = super().losses(*args, **options)  # type: ignore[arg-type]
        return self._last


def test_an_attack_with_steps_of_its_own_is_not_captured(steps: Steps) -> None:
    ((x, y),) = batches(6)
    assert steps.captured(Remembering(0.1, 3), x, x, y, x.dtype) is None
    assert Recorded.made == 0


def test_an_attack_that_changes_now_and_then_is_captured_again_and_again(steps: Steps) -> None:
    ((x, y),) = batches(6)
    for epoch in range(1, 20):
        assert steps.captured(PGD(0.01 * epoch, 3), x, x, y, x.dtype) is not None
        steps.captured(PGD(0.01 * epoch, 3), x, x, y, x.dtype)
    assert Recorded.made == 19


@pytest.mark.parametrize(
    "other",
    [
        PGD(0.2, 3),
        PGD(0.1, 3, targeted=True),
        PGD(0.1, 3, mean=[0.4] * 3, std=[1.0] * 3),
        Other(0.1, 3),
    ],
    ids=["eps", "targeted", "mean", "class"],
)
def test_another_attack_gets_a_step_of_its_own(other: PGD, steps: Steps) -> None:
    ((x, y),) = batches(6)
    first = steps.captured(PGD(0.1, 3), x, x, y, x.dtype)
    second = steps.captured(other, x, x, y, x.dtype)
    assert second is not first
    assert steps.captured(other, x, x, y, x.dtype) is second


def test_a_loss_that_may_know_the_batch_is_not_captured(steps: Steps) -> None:
    ((x, y),) = batches(6)
    attack = PGD(0.1, 3)
    assert steps.captured(attack, x, x, y, x.dtype) is not None
    attack.loss = lambda logits, y: F.cross_entropy(logits, y, reduction="none")
    assert steps.captured(attack, x, x, y, x.dtype) is None
    assert Recorded.made == 1


def test_an_attack_that_always_changes_is_not_captured_for_ever(steps: Steps) -> None:
    ((x, y),) = batches(6)
    found = [steps.captured(PGD(0.01 * eps, 3), x, x, y, x.dtype) for eps in range(1, 20)]
    assert Recorded.made == MOST_CAPTURES
    assert None not in found[:MOST_CAPTURES]
    assert found[MOST_CAPTURES:] == [None] * (19 - MOST_CAPTURES)


def test_large_data_that_a_model_keeps_is_looked_at_in_parts() -> None:
    model = Net()
    model.images, model.labels = np.zeros((3000, 64), np.uint8), list(range(10_000))  # type: ignore[assignment]
    before = signature(model)
    assert signature(model) == before
    assert (
        sum(len(part[-1]) for part in before if isinstance(part, tuple) and part and isinstance(part[-1], bytes))
        < 10_000
    )
    model.images[0] += 1  # type: ignore[operator]
    assert signature(model) != before


def test_sparse_buffers_and_those_that_are_not_numbers_come_back() -> None:
    model, ((x, _),) = wide(Net)(), batches(6)
    model.register_buffer("adjacency", torch.eye(3, dtype=torch.float64).to_sparse())
    model.register_buffer("unset", torch.full((2,), torch.nan, dtype=torch.float64))
    version = model.unset._version
    assert fuse_bn(model, x).fusion_plan.fused == (("conv1", "bn1"), ("conv2", "bn2"))  # type: ignore[union-attr]
    assert torch.equal(model.adjacency.to_dense(), torch.eye(3, dtype=torch.float64))  # type: ignore[operator]
    assert model.unset._version == version
