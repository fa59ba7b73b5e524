"""The engine held against attacks on the live model itself: odd models, changes in between, what may go wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

import bnsurgery._evaluating
import bnsurgery.engine
import bnsurgery.finetuning
from bnsurgery import PGD, BNSurgeryError, BNSurgeryWarning, Engine, StepRecord, adv_finetune, evaluate, fuse_bn
from bnsurgery._replica import Replica
from bnsurgery._replicas import Replicas, craft_on_copy
from bnsurgery.engine import dtype_for
from networks import LIGHT, SMALL, Case
from odd_networks import (
    KINDS,
    Attending,
    Build,
    Centring,
    Data,
    Functional,
    KeepingLogits,
    Net,
    OneSize,
    Touching,
    TouchingALittle,
    batches,
    images,
    trained,
    wide,
)
from reference import differences, record
from test_attacks import World, lived_in

SHORT = PGD(8 / 255, 2, 4 / 255)
Values = dict[str, Tensor]


def tuned(build: Build, data: Data, **options: object) -> tuple[Values, list[Tensor]]:
    """How a run ends, and what it trained on step by step."""
    model, given = build(), []
    # A copy is never in training mode: this sees the live model's training steps alone.
    watch = model.register_forward_pre_hook(
        lambda module, inputs: given.append(inputs[0].detach().clone()) if module.training else None
    )
    adv_finetune(model, data, **{"epochs": 1, "attack": SHORT, "lr": 0.1, "progress": False, **options})
    watch.remove()
    return model.state_dict(), given


def assert_same(
    build: Build, data: Data, change: Callable[[], dict[str, object]] = dict, atol: float = 1e-9, **options: object
) -> Values:
    """With the engine (or ``engine``) the same examples are trained on as without, and the run ends the same."""
    switched = options.pop("engine", "fast")
    plain, seen = tuned(build, data, engine="plain", **{"precision": "auto", **change(), **options})
    fast, made = tuned(build, data, engine=switched, **{**change(), **options})
    for index, (one, other) in enumerate(zip(seen, made, strict=True)):
        assert torch.allclose(one.double(), other.double(), rtol=0, atol=atol), f"step {index}"
    for name, tensor in plain.items():
        assert torch.allclose(tensor.double(), fast[name].double(), rtol=1e-7, atol=atol), name
    return plain


def replica_of(model: nn.Module, x: Tensor, engine: Engine | None = None, **options: object) -> Replica:
    replica = Replicas(model, engine or Engine(), **{"dtype": None, "compile": False, **options}).fresh(x)
    assert replica is not None
    return replica


def crafted(model: nn.Module, attack: PGD, x: Tensor, y: Tensor, **options: object) -> Tensor:
    return craft_on_copy(replica_of(model, x, **options), attack, x, y, generator=torch.Generator().manual_seed(3))


# The same results.


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_on_a_trained_network_differs_where_signs_hang_on_rounding(norm: str) -> None:
    (x, y), model = images(48), trained()
    eps = {"linf": 8 / 255, "l2": 0.5}[norm]
    attack = PGD(eps, 1, eps / 4, norm)
    ours, plain = crafted(model, attack, x, y), attack(model, x, y, generator=torch.Generator().manual_seed(3))
    assert float(((ours - plain).abs() > 1e-4 * eps).double().mean()) < 1e-3


@pytest.mark.parametrize("train", ["bn", "bn-params", "bn-stats", "all"])
def test_runs_in_float64_are_the_same(train: str) -> None:
    after = assert_same(wide(Net), batches(6, 6, 6), epochs=2, train=train)
    before = wide(Net)().state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("case", LIGHT, ids=repr)
def test_the_test_networks_are_tuned_the_same(case: Case) -> None:
    build = partial(case.build, torch.float64)
    data = list(zip(case.example(dtype=torch.float64).split(4), case.labels().split(4), strict=True))
    assert_same(build, data, train="bn-stats" if case.name == "affine_free" else "bn")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "engine",
    [
        *(Engine(fuse=fuse, channels_last=last) for fuse in (True, False) for last in (True, False)),
        *(Engine(chunk=size) for size in (1, 3, None, 100)),
        Engine(cuda_graph=False, keep_memory=False),
    ],
    ids=repr,
)
def test_each_switch_gives_the_same(engine: Engine, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and not (engine.fuse and engine.channels_last):
        pytest.skip("one compilation each is enough")
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert_same(wide(Net), batches(6, 6, 4), engine=engine, change=lambda: {"compile": compiled})


@pytest.fixture
def bfloat16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine, so that there is no warning."""
    monkeypatch.setattr(bnsurgery.engine, "fast_bfloat16", lambda _device: True)


@pytest.mark.usefixtures("bfloat16_is_fast")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_in_low_precision_ends_nearby(precision: str) -> None:
    def build() -> nn.Module:
        return wide(Net)().float()

    data = batches(32, 32, dtype=torch.float32)
    plain, _ = tuned(build, data, engine="plain", epochs=3)
    low, made = tuned(build, data, precision=precision, epochs=3)
    assert {tensor.dtype for tensor in (*made, low["conv1.weight"])} == {torch.float32}
    for name, tensor in plain.items():
        assert torch.allclose(tensor.double(), low[name].double(), rtol=0.05, atol=0.02), name


@pytest.mark.parametrize(
    ("precision", "confidence"),
    [
        (torch.bfloat16, 1),
        (torch.bfloat16, 3),
        (torch.float16, 1),
        (torch.float16, 3),
    ],
    ids=str,
)
def test_low_precision_keeps_the_direction(precision: torch.dtype, confidence: int) -> None:
    # BUG in src where this fails: float16 gradients of examples that are right by far vanish, since they are scaled up
    # where the inputs are float16, not where the copy is.
    (x, y), model = images(48), trained()
    with torch.no_grad():
        for tensor in [module for module in model.modules() if isinstance(module, nn.Linear)][-1].parameters():
            tensor.mul_(confidence)
    attack = PGD(8 / 255, 1, 2 / 255, random_start=False)
    ours, plain = crafted(model, attack, x, y, dtype=precision), attack(model, x, y)
    assert float(((ours - x).sign() == (plain - x).sign()).double().mean()) > 0.85


# Models of all kinds.


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_all_kinds(kind: str) -> None:
    assert_same(wide(KINDS[kind]), batches(6, 6, 6, 6))


def test_a_model_that_keeps_its_logits_when_nothing_but_statistics_move() -> None:
    # BUG in src where this fails: as for kept features.
    assert_same(wide(KeepingLogits), batches(6, 6, 6, 6), train="bn-stats")


@pytest.mark.parametrize("kind", ["view", "view first"])
def test_a_view_is_no_obstacle_to_evaluation(kind: str) -> None:
    # BUG in src where this fails: layouts are not tried before they are chosen.
    model, (pair,) = wide(KINDS[kind])().float(), batches(8, dtype=torch.float32)
    plain, fast = (
        evaluate(model, pair, attacks=["pgd-2"], engine=engine, progress=False) for engine in ("plain", "fast")
    )
    assert plain.robust_error == fast.robust_error


def test_a_model_without_bn() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4))

    assert_same(wide(make), batches(6, 6), train="all")
    (pair,) = batches(6)
    assert len(evaluate(wide(make)(), pair, attacks=["pgd-2"], progress=False).rows) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    # A start and two steps of random sign move the same pixels, up to one rounding each.
    def build() -> nn.Module:
        return wide(Net)().to(dtype)

    (_, plain), (after, fast) = (
        tuned(build, batches(6, 6, dtype=dtype), engine=engine, lr=0.01) for engine in ("plain", "fast")
    )
    assert {tensor.dtype for tensor in (*fast, after["conv1.weight"])} == {dtype}
    near = ((plain[0] - fast[0]).abs() < 2 / 255).double().mean()
    assert float(near) > 0.9
    assert float((plain[0] - fast[0]).abs().max()) <= 2 * (8 / 255) + 0.01


def block(convolution: type[nn.Module], norm: type[nn.Module], pool: nn.Module) -> Build:
    return lambda: nn.Sequential(
        convolution(2, 5, 3), norm(5), nn.ReLU(), convolution(5, 5, 1), norm(5), pool, nn.Flatten(), nn.Linear(5, 4)
    )


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)), (7,)),
        (block(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveMaxPool1d(1)), (2, 9)),
        (block(nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveMaxPool3d(1)), (2, 4, 5, 3)),
        (Net, (3, 17, 23)),
        (Net, (3, 1, 1)),
    ],
    ids=["linear", "1d", "3d", "17 by 23", "1 by 1"],
)
@pytest.mark.parametrize("chunk", ["auto", 2])
def test_inputs_of_all_shapes(make: Build, shape: tuple[int, ...], chunk: int) -> None:
    assert_same(wide(make), batches(6, 5, shape=shape), engine=Engine(chunk=chunk))


@pytest.mark.parametrize("chunk", ["auto", 2])
def test_batches_of_changing_sizes_and_shapes_in_one_run(chunk: int) -> None:
    data = [*batches(6, 1), *batches(4, shape=(3, 17, 23)), *batches(7, 6), *batches(3, shape=(3, 5, 4)), *batches(1)]
    assert_same(wide(Net), data, epochs=2, engine=Engine(chunk=chunk))


def test_a_last_batch_of_one_value_per_channel_is_left_out() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))

    for engine in ("plain", "fast"):
        model = wide(make)()
        with pytest.warns(BNSurgeryWarning, match="one value per channel"):
            run = adv_finetune(model, batches(6, 1, shape=(7,)), epochs=1, engine=engine, progress=False)
        assert run.history[0].left_out == 1


@pytest.mark.parametrize(("make", "parts"), [(Net, 3), (Touching, 1), (TouchingALittle, 1), (OneSize, 1)])
def test_batches_are_cut_unless_their_examples_touch(make: Build, parts: int) -> None:
    # BUG in src where this fails: examples that touch by less than a hundredth of the logits are cut all the same.
    ((x, _),) = batches(6)
    assert replica_of(wide(make)(), x, Engine(chunk=2)).chunks(x) == parts


@pytest.mark.parametrize("make", [Touching, TouchingALittle, OneSize])
def test_what_must_not_be_cut_gives_the_same(make: Build) -> None:
    # BUG in src where this fails: as above.
    assert_same(wide(make), batches(6, 6, 6), engine=Engine(chunk=2))


class Single(nn.Module):
    """Refuses to be copied."""

    def __deepcopy__(self, memo: object) -> Single:
        raise TypeError("there is one of me")

    def forward(self, x: Tensor) -> Tensor:
        return x


class Sharing(nn.Module):
    """Gives itself for its copy, as teachers that many students share do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def __deepcopy__(self, memo: object) -> Sharing:
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


def test_a_model_that_cannot_be_copied_is_attacked_itself() -> None:
    build = wide(lambda: nn.Sequential(Single(), Net()))
    with pytest.warns(BNSurgeryWarning, match="attacks run on the live model.*there is one of me") as caught:
        fast, made = tuned(build, batches(6, 6, 6))
    assert len(caught) == 1
    plain, seen = tuned(build, batches(6, 6, 6), engine="plain")
    assert all(torch.allclose(one, other, rtol=0, atol=1e-9) for one, other in zip(made, seen, strict=True))
    assert all(torch.allclose(plain[name].double(), fast[name].double(), rtol=1e-7, atol=1e-9) for name in plain)


@pytest.mark.filterwarnings("ignore::bnsurgery.BNSurgeryWarning")
def test_a_copy_that_shares_a_part_with_the_model_does_not_change_it() -> None:
    # BUG in src where this fails: the shared part is put into evaluation mode, fused and rounded.
    model = wide(lambda: nn.Sequential(Sharing(), Net()))().float().train()
    world = World(model)
    ((x, _),) = batches(6, dtype=torch.float32)
    Replicas(model, Engine(), dtype=torch.bfloat16, compile=False).fresh(x)
    assert world.unchanged()


@pytest.mark.parametrize("make", [Functional, Attending])
def test_models_that_bfloat16_must_go_another_way_in(make: Build) -> None:
    ((x, y),) = batches(32, dtype=torch.float32)
    model, attack = wide(make)().float().eval(), PGD(8 / 255, 1, 2 / 255, random_start=False)
    replica = replica_of(model, x, dtype=torch.bfloat16)
    assert replica.dtype == torch.bfloat16
    ours = craft_on_copy(replica, attack, x, y, generator=torch.Generator())
    assert float(((ours - x).sign() == (attack(model, x, y) - x).sign()).double().mean()) > 0.8


@pytest.mark.usefixtures("bfloat16_is_fast")
def test_a_model_that_cannot_be_rounded_is_attacked_in_its_own_precision() -> None:
    class Strict(Net):
        def neck(self, z: Tensor) -> Tensor:
            return super().neck(z) + (self.head.weight.float() @ z.mean((0, 2, 3)).double().float()).sum() * 0

        def forward(self, x: Tensor) -> Tensor:
            if self.conv1.weight.dtype != torch.float64:
                raise TypeError("in float64 alone")
            return super().forward(x)

    with pytest.warns(BNSurgeryWarning, match="the model's own precision.*in float64 alone") as caught:
        after, _ = tuned(wide(Strict), batches(6, 6), precision="bfloat16")
    assert len(caught) == 1
    plain, _ = tuned(wide(Strict), batches(6, 6), engine="plain")
    assert all(torch.allclose(plain[name], after[name], rtol=1e-7) for name in plain)


# What changes in between.


@dataclass
class Config:
    gain: float = 1.0


class Configured(Net):
    """Plain values in containers, and functions, that its forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.array = Config(), np.array([1.0])
        self.numbers, self.options, self.act = [0.1], {"scale": 1.0}, F.relu
        self.flags: set[str] = set()
        self.tensors = [torch.tensor(1.0, dtype=torch.float64)]

    def neck(self, z: Tensor) -> Tensor:
        z = self.act(
            self.config.gain * float(self.array[0]) * self.bn2(self.conv2(z)) * self.options["scale"] + self.numbers[0]
        )
        return z * self.tensors[0].to(z.dtype) * (-1 if "negated" in self.flags else 1)


def in_place(model: Net) -> None:
    with torch.no_grad():
        model.conv1.weight.mul_(-1.5)


def through_data(model: Net) -> None:
    model.conv1.weight.data.mul_(-1.5)


def rebinding_data(model: Net) -> None:
    model.conv1.weight.data = -1.5 * model.conv1.weight.data


def rebinding(model: Net) -> None:
    model.conv2.weight = nn.Parameter(-1.5 * model.conv2.weight.detach(), requires_grad=False)


def statistics(model: Net) -> None:
    model.bn1.running_mean.add_(0.5)
    model.bn1.eps = 0.5


def statistics_anew(model: Net) -> None:
    model.bn1.running_var = 3 * model.bn1.running_var


def attribute(model: Net) -> None:
    model.slope = -0.5


def adding_a_hook(model: Net) -> None:
    model.conv2.register_forward_hook(lambda _module, _inputs, output: -2 * output)


def adding_a_backward_hook(model: Net) -> None:
    model.conv2.register_full_backward_pre_hook(lambda _module, gradients: (-gradients[0],))


def replacing(model: Net) -> None:
    model.bn2 = nn.Identity()


def forward_of_its_own(model: Net) -> None:
    model.conv2.forward = lambda z: -z


def method_of_its_own(model: Net) -> None:
    model.neck = lambda z: -z


def in_a_list(model: Net) -> None:
    model.numbers[0] = -1.0


def in_a_dict(model: Net) -> None:
    model.options["scale"] = -1.0


def in_a_dataclass(model: Net) -> None:
    model.config.gain = -1.0


def in_an_array(model: Net) -> None:
    model.array[0] = -1.0


def a_function(model: Net) -> None:
    model.act = torch.sin


def in_a_set(model: Net) -> None:
    model.flags.add("negated")


def a_tensor_in_a_list(model: Net) -> None:
    model.tensors[0].mul_(-1)


CHANGES = [
    in_place,
    through_data,
    rebinding_data,
    rebinding,
    statistics,
    statistics_anew,
    attribute,
    adding_a_hook,
    replacing,
    forward_of_its_own,
    # BUGS in src where these fail: a change that is not seen, so that a model is attacked that is no more.
    adding_a_backward_hook,
    method_of_its_own,
    in_a_list,
    in_a_dict,
    in_a_dataclass,
    in_an_array,
    a_function,
    a_tensor_in_a_list,
    in_a_set,
]


def once(change: Callable[[Net], None], name: str) -> Callable[[], dict[str, object]]:
    """A callback under this name that changes the model after the first time."""

    def options() -> dict[str, object]:
        calls: list[object] = []

        def callback(found: object, model: Net) -> None:
            calls.append(found)
            if len(calls) == 1:
                change(model)

        return {name: callback}

    return options


@pytest.mark.parametrize("name", ["on_step", "callbacks"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_callback_changed_is_what_is_attacked(change: Callable[[Net], None], name: str) -> None:
    changed = assert_same(wide(Configured), batches(6, 6), once(change, name), epochs=2)
    untouched, _ = tuned(wide(Configured), batches(6, 6), engine="plain", epochs=2)
    assert any(not torch.equal(tensor, untouched[key]) for key, tensor in changed.items())


def test_an_attack_may_change() -> None:
    def options() -> dict[str, object]:
        attack = PGD(8 / 255, 2, 4 / 255)

        def grow(found: StepRecord, _model: nn.Module) -> None:
            attack.eps, attack.step_size, attack.steps = 0.1 * (found.step + 1), 0.05, 3

        return {"attack": attack, "on_step": grow}

    assert_same(wide(Net), batches(6, 6, 6), options)


def test_a_model_that_changes_with_each_step_is_attacked_itself_with_one_warning() -> None:
    def on_step(found: StepRecord, model: Net) -> None:
        model.slope = 0.1 * found.step

    with pytest.warns(BNSurgeryWarning, match="on the live model.*change with each batch") as caught:
        fast, made = tuned(wide(Net), batches(*[4] * 10), on_step=on_step)
    assert len(caught) == 1
    plain, seen = tuned(wide(Net), batches(*[4] * 10), on_step=on_step, engine="plain")
    assert all(torch.allclose(one, other, atol=1e-9) for one, other in zip(made, seen, strict=True))
    assert all(torch.allclose(plain[name].double(), fast[name].double(), rtol=1e-7, atol=1e-9) for name in plain)


def test_the_momentum_of_bn_is_no_change_to_what_is_attacked() -> None:
    # BUG in src where this fails (by a warning): momentum plays no part in evaluation mode, and is often scheduled.
    def on_step(_found: StepRecord, model: Net) -> None:
        model.bn1.momentum *= 0.9  # type: ignore[operator]

    assert_same(wide(Net), batches(*[4] * 10), on_step=on_step)


def test_a_loss_finds_the_live_model_as_without_the_engine() -> None:
    # BUG in src where this fails: a loss that calls the model, for its own clean logits say, finds it in training mode,
    # and moves its statistics.
    ends = []
    for engine in ("plain", "fast"):
        model = wide(Net)()
        ((x, y),) = batches(6)

        def loss(logits: Tensor, _y: Tensor, model: nn.Module = model, x: Tensor = x) -> Tensor:
            return F.kl_div(logits.log_softmax(1), model(x).softmax(1), reduction="none").sum(1)

        attack = PGD(8 / 255, 2, 4 / 255, loss=loss)
        adv_finetune(model, [(x, y)] * 3, epochs=1, attack=attack, engine=engine, progress=False)
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][n].double(), ends[1][n].double(), rtol=1e-7, atol=1e-9) for n in ends[0])


def test_a_loss_that_knows_the_batch_gets_all_of_it() -> None:
    ends = []
    for engine in ("plain", Engine(chunk=2)):
        model = wide(Net)()
        ((x, y),) = batches(7)
        with torch.no_grad():
            clean = model.eval()(x).softmax(1)
        sizes = set()

        def loss(logits: Tensor, _y: Tensor, clean: Tensor = clean, sizes: set[int] = sizes) -> Tensor:
            sizes.add(len(logits))
            return F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)

        attack = PGD(8 / 255, 2, 4 / 255, loss=loss)
        adv_finetune(model, [(x, y)] * 2, epochs=1, attack=attack, engine=engine, progress=False)
        assert sizes == {7}
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][n].double(), ends[1][n].double(), rtol=1e-7, atol=1e-9) for n in ends[0])


def test_a_precision_that_no_copy_has_is_said_to_change_nothing() -> None:
    cases: list[tuple[object, str]] = [
        (lambda _model, x, _y: x, "function attacks the model itself"),
        (PGD(8 / 255, 2, 4 / 255, bn="train"), "PGD attacks the model itself"),
        (None, "there is no attack"),
    ]
    for attack, reason in cases:
        with pytest.warns(BNSurgeryWarning, match=f"precision='float32' changes nothing: {reason}"):
            adv_finetune(
                Net(),
                batches(6, dtype=torch.float32),
                epochs=1,
                attack=attack,
                precision="float32",
                progress=False,
            )


def test_an_attack_in_inference_mode_is_refused_in_words() -> None:
    # BUG in src where this fails: torch's own error comes instead.
    for engine in ("plain", "fast"):
        with torch.inference_mode(), pytest.raises(BNSurgeryError, match=r"leave torch\.inference_mode"):
            adv_finetune(Net(), batches(6, dtype=torch.float32), epochs=1, engine=engine, progress=False)


# The refresh.


@pytest.mark.parametrize("case", LIGHT, ids=repr)
@pytest.mark.parametrize("fuse", [True, False])
def test_the_refresh_follows_the_live_model_in_place(case: Case, fuse: bool) -> None:
    model, x = lived_in(case.build(torch.float64)) if case.name != "affine_free" else case.build(torch.float64), None
    x = case.example(dtype=torch.float64)
    replicas = Replicas(model, Engine(fuse=fuse), dtype=None, compile=False)
    replica = replicas.fresh(x)
    assert replica is not None
    tensors = {name: (tensor.data_ptr(), id(tensor)) for name, tensor in replica.net.state_dict(keep_vars=True).items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
        world, before = World(model), record(model)
        assert replicas.fresh(x) is replica
        with torch.no_grad():
            ours = replica.net(x)
        assert world.unchanged()
        assert differences(before, record(model)) == []
        now = {name: (tensor.data_ptr(), id(tensor)) for name, tensor in replica.net.state_dict(keep_vars=True).items()}
        assert now == tensors
        with torch.no_grad():
            fused = fuse_bn(model, x)(x)
            assert torch.allclose(ours, fused, rtol=1e-9, atol=1e-9 * float(fused.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rounded_copy_follows_as_one_made_anew(dtype: torch.dtype) -> None:
    model, x = SMALL.build(), SMALL.example()
    replicas = Replicas(model, Engine(), dtype=dtype, compile=False)
    replicas.fresh(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(1.3 * tensor)
    followed = replicas.fresh(x)
    anew = replica_of(model, x, dtype=dtype)
    assert followed is not None
    with torch.no_grad():
        assert torch.equal(followed.net(x), anew.net(x))


def test_tensors_that_are_plain_attributes_are_followed_in_place() -> None:
    # BUG in src where this fails: a step captured in a CUDA graph reads the memory that it was captured with.
    model, ((x, _),) = wide(Centring)().eval(), batches(6)
    replicas = Replicas(model, Engine(), dtype=None, compile=False)
    replica = replicas.fresh(x)
    assert replica is not None
    (copied,) = (module for module in replica.net.modules() if isinstance(module, Centring))
    address = copied.mean.data_ptr()
    for mean in (0.5, 0.6):
        model.mean.fill_(mean)  # type: ignore[operator, union-attr]
        assert replicas.fresh(x) is replica
        assert copied.mean.data_ptr() == address
        with torch.no_grad():
            assert torch.allclose(replica.net(x), model(x), atol=1e-9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_images_are_laid_out_in_each_precision(dtype: torch.dtype | None) -> None:
    # BUG in src where this fails: the layout is tried without the hooks that cast, and so given up in low precision.
    ((x, _),) = batches(6, dtype=torch.float32)
    replica = replica_of(wide(Net)().float(), x, dtype=dtype)
    assert replica.laid_out(x).is_contiguous(memory_format=torch.channels_last)
    replica = replica_of(wide(Net)().float(), x, Engine(channels_last=False), dtype=dtype)
    assert replica.laid_out(x).is_contiguous()


def test_optimizer_steps_build_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Replica] = []
    original = Replica.__init__

    def counting(self: Replica, *args: object, **options: object) -> None:
        built.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(Replica, "__init__", counting)
    tuned(wide(Net), batches(6, 6, 6, 3), epochs=2)
    assert len(built) == 1
    tuned(wide(Net), [*batches(6, 6), *batches(4, shape=(3, 5, 5))], epochs=2)
    assert len(built) == 2  # the same path for both shapes, and so one copy


def test_copies_go_with_the_call() -> None:
    found: list[weakref.ref[nn.Module]] = []
    original = Replicas.fresh

    class Watched(Replicas):
        def fresh(self, x: Tensor) -> Replica | None:
            replica = original(self, x)
            found.extend([] if replica is None else [weakref.ref(replica.net)])
            return replica

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bnsurgery.finetuning, "Replicas", Watched)
        model = wide(Net)()
        adv_finetune(model, batches(6, 6), epochs=1, progress=False)
    gc.collect()
    assert found
    assert all(reference() is None for reference in found)


def test_nothing_of_a_lived_in_model_changes_but_what_trains() -> None:
    model = lived_in(SMALL.build())
    fixed = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".num" not in name}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    adv_finetune(model, [(SMALL.example(), SMALL.labels())] * 2, epochs=1, train="bn-stats", progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or (id(parameter.grad) == gradient[0] and torch.equal(parameter.grad, gradient[1]))
    assert all(
        "running" in name or torch.equal(tensor, fixed[name])
        for name, tensor in model.state_dict().items()
        if name in fixed
    )
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == [0] * 12


# Compilation, and memory.


def test_nothing_is_compiled_anew_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    counts: list[int] = []

    def on_step(_found: StepRecord, _model: nn.Module) -> None:
        counts.append(len(compiled))

    assert_same(wide(Net), batches(*[6] * 4), epochs=3, change=lambda: {"compile": True, "on_step": on_step})
    counts = counts[12:]  # the first twelve are those of the run without the engine
    torch.compiler.reset()
    assert counts[1] == counts[-1]
    assert counts[1] - counts[0] <= 1


def kept_by_a_step(model: nn.Module, train: str, names: list[str]) -> tuple[set[str], set[str]]:
    """Which of the named layers' inputs and outputs the graph of one training step keeps."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    kept: set[int] = set()
    for name in names:
        # They are held on to, so that no other tensor gets their memory.
        model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: found.update({name: (inputs[0].detach(), output.detach())})
        )

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adv_finetune(model, batches(6), epochs=1, train=train, attack=None, progress=False)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in model.parameters())
    return (
        {name for name, (given, _) in found.items() if given.data_ptr() in kept},
        {name for name, (_, output) in found.items() if output.data_ptr() in kept},
    )


def test_a_training_step_keeps_for_frozen_layers_only_what_bn_and_relu_keep() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        )

    layers = ["0", "2", "3", "5", "8"]
    inputs, outputs = kept_by_a_step(wide(make)(), "bn", layers)
    # The images and the input of the linear layer are not kept; the second convolution's is what ReLU keeps.
    assert inputs & {"0", "3", "8"} == {"3"}
    assert {"0", "2", "3", "5"} <= outputs  # for BN and ReLU
    assert {"0", "3", "8"} <= kept_by_a_step(wide(make)(), "all", layers)[0]


def test_frozen_weights_get_no_gradient_in_a_step() -> None:
    model = wide(Net)()

    class Looking(torch.optim.SGD):
        with_gradient: frozenset[str] = frozenset()

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            Looking.with_gradient |= {name for name, p in model.named_parameters() if p.grad is not None}

    adv_finetune(model, batches(6, 6), epochs=1, optimizer=lambda own: Looking(own, lr=0.1), progress=False)
    assert Looking.with_gradient == {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}


# Evaluation.


def sure_of_itself(case: Case = SMALL, count: int = 12) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small model, and labels that it gets right but for every fourth."""
    model, x = case.build().eval(), case.example(count)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::4] = (y[::4] + 1) % case.classes
    return model, (x, y)


@pytest.fixture
def brief_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack with fewer iterations, to save time."""
    original = bnsurgery._evaluating.autoattack

    def brief(*args: object, **options: object) -> object:
        attack = original(*args, **options)
        attack.apgd.n_iter, attack.square.n_queries = 20, 400
        return attack

    monkeypatch.setattr(bnsurgery._evaluating, "autoattack", brief)


@pytest.mark.usefixtures("brief_autoattack")
@pytest.mark.parametrize(("attack", "eps"), [("pgd-5", 0.2), ("apgd-ce", 0.2), ("square", 0.4)])
def test_evaluation_finds_the_same_with_and_without(attack: str, eps: float) -> None:
    model, pair = sure_of_itself()
    found = {}
    for engine in ("plain", "fast"):
        world = World(model)
        found[engine] = evaluate(model, pair, attacks=[attack], eps=eps, engine=engine, batch_size=5, progress=False)
        assert world.unchanged()
    plain, fast = found["plain"], found["fast"]
    assert torch.equal(plain.correct, fast.correct)
    assert int(plain.correct.sum()) == 9
    assert 0 < int(plain.robust.sum()) < 9  # so that there is something to tell apart
    assert int(plain.robust.sum()) == int(fast.robust.sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "bounds": (0.0, 1.0)}],
    ids=["pixels", "normalised"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_evaluation_of_normalised_data_and_other_dtypes(options: dict[str, object], dtype: torch.dtype) -> None:
    model, (x, y) = sure_of_itself()
    model = model.to(dtype)
    if options:
        mean, std = (torch.tensor(options[name]).view(-1, 1, 1) for name in ("mean", "std"))
        x = (x - mean) / std
    plain, fast = (
        evaluate(model, (x.to(dtype), y), attacks=["pgd-5"], eps=0.2, engine=engine, progress=False, **options)
        for engine in ("plain", "fast")
    )
    assert plain.record()["robust_error"] == fast.record()["robust_error"]
    assert torch.equal(plain.correct, fast.correct)


def test_evaluation_with_every_switch_off_or_on() -> None:
    model, pair = sure_of_itself()
    run = partial(evaluate, model, pair, attacks=["pgd-5"], eps=0.2, progress=False)
    errors = {
        run(engine=engine).robust_error
        for engine in ("plain", Engine(fuse=False), Engine(channels_last=False), Engine(chunk=1), Engine(chunk=None))
    }
    assert len(errors) == 1


@pytest.mark.parametrize("made", ["far", "near"])
def test_nothing_counts_as_broken_that_the_model_gets_right(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = sure_of_itself()
    with torch.no_grad():
        y = model(x).argmax(1)
    asked: list[Tensor] = []

    def wrong(net: nn.Module, inputs: Tensor) -> Tensor:
        asked.append(inputs)
        logits: Tensor = -net.part(inputs)
        return logits if made == "far" else torch.roll(logits, 1, 1)

    monkeypatch.setattr(bnsurgery._replica._Net, "forward", wrong)
    attack = torchattacks.FGSM(model, eps=1e-6)
    result = evaluate(model, (x, y), attacks=[attack], eps=1e-6, progress=False)
    assert asked
    assert result.robust_error == 0
    assert bool(result.robust.all())


def test_kept_examples_are_those_that_the_model_gets_wrong() -> None:
    model, (x, y) = sure_of_itself()
    result = evaluate(model, (x, y), attacks=["pgd-5"], eps=0.2, keep_adversarial=True, progress=False)
    assert result.adversarial is not None
    with torch.no_grad():
        assert torch.equal(model(result.adversarial).argmax(1) == y, result.robust)


def called(model: nn.Module) -> tuple[list[str], nn.Module]:
    """Names of those that ran, the live model among them, from now on."""
    seen: list[str] = []
    model.register_forward_hook(lambda module, _inputs, _output: seen.append("live" if module is model else "copy"))
    return seen, model


@pytest.mark.parametrize(
    ("bind", "runs"),
    [
        (lambda model: model, {"copy"}),
        (lambda _model: Net(), {"copy"}),
        (lambda model: nn.Sequential(nn.Identity(), model), {"live"}),
        (lambda model: nn.DataParallel(model), {"copy"}),
    ],
    ids=["itself", "another", "a wrapper with parts of its own", "a mere wrapper"],
)
def test_torchattacks_run_on_what_they_are_bound_to(bind: Callable[[nn.Module], nn.Module], runs: set[str]) -> None:
    data = batches(6, 6)

    def attack(model: nn.Module) -> object:
        return torchattacks.PGD(bind(model), eps=8 / 255, alpha=4 / 255, steps=2)

    ends = []
    for engine in ("plain", "fast"):
        model = wide(Net)()
        seen, _ = called(model)
        adv_finetune(model, data, epochs=1, attack=attack(model), engine=engine, progress=False)
        assert set(seen) == ({"live"} if engine == "plain" else {"live", *runs})
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][n].double(), ends[1][n].double(), rtol=1e-7, atol=1e-9) for n in ends[0])
    model = wide(Net)().float().eval()
    results = [
        evaluate(model, [(x.float(), y) for x, y in data], attacks=[attack(model)], engine=engine, progress=False)
        for engine in ("plain", "fast")
    ]
    assert results[0].robust_error == results[1].robust_error


class Searching(PGD):
    def search(self, model: Callable[[Tensor], Tensor], *args: object, **options: object) -> Tensor:  # type: ignore[override]
        assert isinstance(model, Net)
        return super().search(model, *args, **options)  # type: ignore[arg-type]


class Calling(PGD):
    def __call__(self, model: nn.Module, *args: object, **options: object) -> Tensor:  # type: ignore[override]
        assert isinstance(model, Net)
        return super().__call__(model, *args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "attack", [Searching(), Calling(), PGD(bn="batch"), PGD(bn="train"), lambda model, x, _y: x + 0 * model(x).sum()]
)
def test_these_attack_the_model_itself(attack: Callable[..., Tensor]) -> None:
    seen, model = called(wide(Net)().float())
    data = batches(6, 6, dtype=torch.float32)
    adv_finetune(model, data, epochs=1, attack=attack, progress=False)
    evaluate(model, data, attacks=[attack], progress=False)
    assert set(seen) == {"live"}


def test_callables_are_given_the_very_model() -> None:
    model, given = wide(Net)().float(), []

    def attack(own: nn.Module, x: Tensor, _y: Tensor) -> Tensor:
        given.append(own)
        return x

    data = batches(6, dtype=torch.float32)
    adv_finetune(model, data, epochs=1, attack=attack, progress=False)
    evaluate(model, data, attacks=[attack], progress=False)
    assert len(given) == 2
    assert all(own is model for own in given)


# Random numbers.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("still", [{"steps": 0}, {"steps": 2, "step_size": 0.0}], ids=["no step", "steps of no length"])
def test_the_same_random_starts_are_drawn(norm: str, still: dict[str, float]) -> None:
    data = [*batches(6, 5), *batches(4, shape=(3, 5, 5))]
    attack = PGD(0.1, norm=norm, **still)  # type: ignore[arg-type]
    starts = [tuned(wide(Net), data, attack=attack, engine=engine, epochs=2)[1] for engine in ("plain", "fast")]
    clean = [x for x, _ in data] * 2
    for one, other, x in zip(*starts, clean, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
        assert float((one - x).abs().max()) > 1e-3
    assert not torch.equal(starts[0][0], starts[0][3])  # other ones in each epoch


def test_the_process_is_as_before() -> None:
    world = World()
    adv_finetune(wide(Net)(), batches(6, 6), epochs=1, progress=False)
    (pair,) = batches(6, dtype=torch.float32)
    evaluate(wide(Net)().float(), pair, attacks=["pgd-2"], progress=False)
    assert world.unchanged()


# What is refused, and what is chosen.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "quick"}, "engine must be 'fast', 'plain' or an Engine, got 'quick'"),
        ({"engine": None}, "engine must be 'fast', 'plain' or an Engine, got None"),
        ({"precision": "int8"}, "precision must be one of .*, got 'int8'"),
        ({"engine": "plain", "precision": "float32"}, "precision='float32' .* engine='plain' has none"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, str], message: str) -> None:
    model = Net()
    before = record(model)
    with pytest.raises(ValueError, match=message):
        adv_finetune(model, batches(6, dtype=torch.float32), epochs=1, progress=False, **options)
    if "precision" not in options:
        with pytest.raises(ValueError, match=message):
            evaluate(model, batches(6, dtype=torch.float32), progress=False, **options)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("chunk", [0, -3, 2.0, "all"])
def test_a_bad_chunk_is_named(chunk: object) -> None:
    with pytest.raises(ValueError, match="chunk must be 'auto', None or a whole number of at least 1, got"):
        Engine(chunk=chunk)  # type: ignore[arg-type]


def test_labels_out_of_range_are_named_as_without_the_engine() -> None:
    data = [(x, y + 2) for x, y in batches(6)]
    messages = []
    for engine in ("plain", "fast"):
        with pytest.raises(ValueError, match="label") as error:
            adv_finetune(wide(Net)(), data, epochs=1, engine=engine, progress=False)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6))


@pytest.mark.parametrize(
    ("make", "fast", "lower", "expected"),
    [
        (Net, True, True, torch.bfloat16),
        (Net, False, True, None),
        (Net, True, False, None),
        (lambda: Net().double(), True, True, None),
        (lambda: Net().half(), True, True, None),
        (lambda: Net().bfloat16(), True, True, None),
        (lambda: nn.Sequential(Net(), nn.Linear(4, 4).double()), True, True, None),
        (depthwise, True, True, None),
        (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=2)), True, True, torch.bfloat16),
        (lambda: nn.Sequential(nn.Conv2d(1, 6, 3)), True, True, torch.bfloat16),
        (nn.Flatten, True, True, None),
    ],
)
def test_what_auto_stands_for(
    make: Build, fast: bool, lower: bool, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnsurgery.engine, "fast_bfloat16", lambda _device: fast)
    assert dtype_for(make(), "auto", lower=lower) == expected


@pytest.mark.parametrize("attack", [PGD(8 / 255, 1), "torchattacks", None], ids=["PGD", "torchattacks", "none"])
def test_auto_takes_fewer_digits_for_pgd_alone(attack: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnsurgery.engine, "fast_bfloat16", lambda _device: True)
    dtypes: list[torch.dtype | None] = []
    original = Replicas.__init__

    def noting(self: Replicas, *args: object, dtype: torch.dtype | None, **options: object) -> None:
        dtypes.append(dtype)
        original(self, *args, dtype=dtype, **options)

    monkeypatch.setattr(Replicas, "__init__", noting)
    model = wide(Net)().float()
    if attack == "torchattacks":
        attack = torchattacks.FGSM(model)
    pair = batches(6, dtype=torch.float32)
    adv_finetune(model, pair, epochs=1, attack=attack, progress=False)
    evaluate(model, pair, attacks=["pgd-1"], progress=False)
    assert dtypes == [torch.bfloat16 if isinstance(attack, PGD) else None, None]


def test_a_precision_that_the_device_is_slow_in_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnsurgery.engine, "fast_bfloat16", lambda _device: False)
    with pytest.warns(BNSurgeryWarning, match="no fast bfloat16"):
        assert dtype_for(Net(), "bfloat16", lower=False) == torch.bfloat16
    assert dtype_for(Net(), "float16", lower=False) == torch.float16
    assert dtype_for(Net().double(), "float32", lower=False) == torch.float32
