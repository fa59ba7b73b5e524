"""The engine's copies against the live model: the same attacks, step by step, whatever changes in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchattacks
from cifar10 import floats, sample
from torch import Tensor, nn

import bnsurgery._evaluating
import bnsurgery._replica
import bnsurgery.engine
from bnsurgery import PGD, BNSurgeryWarning, Engine, adv_finetune, evaluate, fuse_bn
from bnsurgery._replicas import Replicas, can_attack_a_copy, craft_on_copy
from bnsurgery.engine import dtype_for
from networks import LIGHT, SHARED, SMALL, Case
from odd_networks import KINDS, Build, BySize, Data, Net, OneSize, Touching, batches, trained, wide
from test_attacks import World

PLAIN = PGD(8 / 255, 3, 4 / 255)


def finetuned(build: Build, data: Data, **options: object) -> dict[str, Tensor]:
    model = build()
    adv_finetune(model, data, **{"epochs": 2, "attack": PLAIN, "lr": 0.1, "progress": False, **options})
    return model.state_dict()


def assert_equal_runs(build: Build, data: Data, *, engine: object = "fast", **options: object) -> None:
    """In float64 rounding turns no sign: the two runs end alike."""
    plain, fast = (finetuned(build, data, engine=which, **options) for which in ("plain", engine))
    for name, tensor in plain.items():
        assert torch.allclose(tensor.double(), fast[name].double(), rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("name", KINDS)
def test_a_run_ends_as_without_the_engine(name: str) -> None:
    assert_equal_runs(wide(KINDS[name]), batches(6, 6, 6))


@pytest.mark.parametrize(
    "engine",
    [
        Engine(fuse=False),
        Engine(channels_last=False),
        Engine(chunk=1),
        Engine(chunk=4),
        Engine(chunk=None),
        Engine(keep_memory=False),
    ],
    ids=repr,
)
def test_each_switch_by_itself_changes_nothing(engine: Engine) -> None:
    plain, switched = (finetuned(wide(Net), batches(6, 6, 6), engine=which) for which in ("plain", engine))
    for name, tensor in plain.items():
        assert torch.allclose(tensor.double(), switched[name].double(), rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize(
    "attack",
    [
        PGD(0.5, 3, 0.2, "l2"),
        PGD(8 / 255, 3, 4 / 255, best=True),
        PGD(8 / 255, 0, best=True),
        PGD(0.1, 3, 0.05, bounds=(-1, 2), random_start=False),
        PGD(0.1, 2, 0.05, mean=[0.1, 0.2, 0.3], std=[1.2, 1.3, 1.4], bounds=(0, 2)),
        PGD(8 / 255, 2, bn="batch"),
        PGD(8 / 255, 2, bn="train"),
    ],
    ids=repr,
)
def test_options_of_the_attack_are_kept(attack: PGD) -> None:
    assert_equal_runs(wide(Net), batches(6, 6), attack=attack)


@pytest.mark.parametrize("train", ["bn", "bn-params", "bn-stats", "all"])
def test_whatever_trains(train: str) -> None:
    assert_equal_runs(wide(Net), batches(6, 6, 6), train=train)


def test_batches_of_changing_sizes_and_shapes() -> None:
    mixed = [*batches(6, 5), *batches(4, shape=(3, 17, 23)), *batches(6, 1), *batches(3, shape=(3, 5, 4)), *batches(6)]
    assert_equal_runs(wide(Net), mixed)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)), (7,)),
        (
            lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4)),
            (2, 8),
        ),
        (
            lambda: nn.Sequential(nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5), nn.ReLU(), nn.Flatten(), nn.Linear(40, 4)),
            (2, 4, 4, 4),
        ),
    ],
    ids=["linear", "1d", "3d"],
)
def test_inputs_that_are_no_images(make: Build, shape: tuple[int, ...]) -> None:
    assert_equal_runs(wide(make), batches(6, 4, shape=shape))


@pytest.mark.parametrize("case", [*LIGHT, SHARED], ids=repr)
def test_the_copy_computes_what_the_model_does_and_follows_it_in_place(case: Case) -> None:
    model, x = case.build(), case.example()
    replicas = Replicas(model, Engine(), dtype=None, compile=False)
    replica = replicas.fresh(x)
    assert replica is not None
    held = {name: tensor.data_ptr() for name, tensor in replica.net.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1 + 0.05 * torch.rand(tensor.shape, generator=generator))
        world = World(model)
        assert replicas.fresh(x) is replica
        assert world.unchanged()
        assert {name: tensor.data_ptr() for name, tensor in replica.net.state_dict().items()} == held
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(x)
            assert torch.allclose(replica.net(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_refresh_writes_what_fuse_bn_computes_to_the_bit() -> None:
    model, x = trained(), torch.rand(4, 3, 32, 32)
    replicas = Replicas(model, Engine(), dtype=None, compile=False)
    replicas.fresh(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    replica = replicas.fresh(x)
    assert replica is not None
    fused = fuse_bn(model, plan=replica.plan).state_dict()
    own = {name.removeprefix("run."): tensor for name, tensor in replica.net.state_dict().items()}
    assert fused.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in fused.items())


def test_in_float32_one_step_differs_by_rounding_alone() -> None:
    images, labels = sample(train=False)
    x, y = floats(images[:64]), labels[:64]
    model, attack = trained(), PGD(8 / 255, 1, 2 / 255)
    replica = Replicas(model, Engine(), dtype=None, compile=False).fresh(x)
    assert replica is not None
    ours = craft_on_copy(replica, attack, x, y, generator=torch.Generator().manual_seed(3))
    plain = attack(model, x, y, generator=torch.Generator().manual_seed(3))
    assert float(((ours - plain).abs() > 1e-6).double().mean()) < 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("make", [trained, KINDS["functional"]], ids=["resnet20", "functional"])
def test_low_precision_goes_mostly_the_same_way(make: Build, precision: str) -> None:
    model = make()
    images, labels = sample(train=False)
    x, y = floats(images[:32]), labels[:32] % 4
    attack = PGD(8 / 255, 1, 2 / 255, random_start=False)
    replica = Replicas(model, Engine(), dtype=getattr(torch, precision), compile=False).fresh(x)
    assert replica is not None
    assert replica.dtype == getattr(torch, precision)
    ours, plain = craft_on_copy(replica, attack, x, y, generator=torch.Generator()), attack(model, x, y)
    same = ((ours - x).sign() == (plain - x).sign()).double().mean()
    assert float(same) > 0.85
    assert ours.dtype == torch.float32
    assert float((ours - x).abs().max()) <= 8 / 255 + 1e-6


def test_low_precision_is_for_float32_models_and_pgd_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = partial(dtype_for, precision="auto", lower=True)
    monkeypatch.setattr(bnsurgery.engine, "fast_bfloat16", lambda _device: True)
    assert lower(Net()) == torch.bfloat16
    assert lower(Net().double()) is None
    assert lower(Net().half()) is None
    assert lower(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))) is None
    assert dtype_for(Net(), "auto", lower=False) is None
    monkeypatch.setattr(bnsurgery.engine, "fast_bfloat16", lambda _device: False)
    assert lower(Net()) is None
    with pytest.warns(BNSurgeryWarning, match="no fast bfloat16"):
        assert dtype_for(Net(), "bfloat16", lower=True) == torch.bfloat16


def scale(model: nn.Module) -> None:
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)  # type: ignore[union-attr, operator]


def scale_data(model: nn.Module) -> None:
    model.conv1.weight.data.mul_(1.5)  # type: ignore[union-attr, operator]


def rebind(model: nn.Module) -> None:
    model.conv2.weight = nn.Parameter(1.5 * model.conv2.weight.detach(), requires_grad=False)  # type: ignore[union-attr, operator]


def attribute(model: nn.Module) -> None:
    model.slope = 0.5  # type: ignore[assignment]


def hook(model: nn.Module) -> None:
    model.conv2.register_forward_hook(lambda _module, _inputs, output: 2 * output)  # type: ignore[union-attr, operator]


def another(model: nn.Module) -> None:
    model.bn2 = nn.Identity()


CHANGES = [scale, scale_data, rebind, attribute, hook, another]


@pytest.mark.parametrize("when", ["callbacks", "on_step"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_callback_changes_is_attacked(change: Callable[[nn.Module], None], when: str) -> None:
    def once() -> Callable[[object, nn.Module], None]:
        calls = []

        def callback(_record: object, model: nn.Module) -> None:
            calls.append(1)
            if len(calls) == 1:
                change(model)

        return callback

    plain, fast = (
        finetuned(wide(Net), batches(6, 6), engine=engine, also="head.*", **{when: once()})
        for engine in ("plain", "fast")
    )
    untouched = finetuned(wide(Net), batches(6, 6), engine="plain", also="head.*")
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in untouched.items() if name in plain)
    for name, tensor in plain.items():
        assert torch.allclose(tensor.double(), fast[name].double(), rtol=1e-7, atol=1e-9), name


def test_a_callback_may_change_the_attack() -> None:
    ends = []
    for engine in ("plain", "fast"):
        attack = PGD(8 / 255, 3, 4 / 255)

        def callback(_record: object, _model: nn.Module, attack: PGD = attack) -> None:
            attack.eps = 0.2

        ends.append(finetuned(wide(Net), batches(6, 6), engine=engine, attack=attack, callbacks=callback))
    assert all(
        torch.allclose(a.double(), b.double(), rtol=1e-7) for a, b in zip(*(e.values() for e in ends), strict=True)
    )


def test_a_model_that_changes_with_each_step_is_attacked_itself() -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.calls += 1
            return super().forward(x)

    with pytest.warns(BNSurgeryWarning, match="attacks run on the live model.*change with each batch") as caught:
        fast = finetuned(wide(Counting), batches(*[4] * 6))
    assert len(caught) == 1
    plain = finetuned(wide(Counting), batches(*[4] * 6), engine="plain")
    assert all(torch.allclose(plain[name].double(), fast[name].double(), rtol=1e-7) for name in plain)


def test_a_model_that_cannot_be_copied_is_attacked_itself() -> None:
    class Unique(Net):
        def __deepcopy__(self, memo: object) -> Unique:
            raise TypeError("there can be only one")

    with pytest.warns(BNSurgeryWarning, match="attacks run on the live model.*only one") as caught:
        fast = finetuned(wide(Unique), batches(6, 6))
    assert len(caught) == 1
    plain = finetuned(wide(Unique), batches(6, 6), engine="plain")
    assert all(torch.allclose(plain[name].double(), fast[name].double(), rtol=1e-9) for name in plain)


def test_who_attacks_the_model_itself() -> None:
    model = Net()
    around, elsewhere = nn.Sequential(nn.Identity(), model), Net()

    class Mine(PGD):
        def search(self, *_args: object, **_kwargs: object) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    assert can_attack_a_copy(PGD(), model)
    assert can_attack_a_copy(torchattacks.PGD(model), model)
    assert can_attack_a_copy(torchattacks.PGD(elsewhere), model)
    assert not can_attack_a_copy(torchattacks.PGD(around), model)
    assert not can_attack_a_copy(PGD(bn="batch"), model)
    assert not can_attack_a_copy(PGD(bn="train"), model)
    assert not can_attack_a_copy(Mine(), model)
    assert not can_attack_a_copy(lambda _model, x, _y: x, model)
    in_training = torchattacks.PGD(model)
    in_training.set_model_training_mode(model_training=True)
    assert not can_attack_a_copy(in_training, model)


def test_callables_are_given_the_model_itself() -> None:
    model, given = Net(), []

    def attack(seen: nn.Module, x: Tensor, _y: Tensor) -> Tensor:
        given.append(seen)
        return x

    data = [(x.float(), y) for x, y in batches(6)]
    adv_finetune(model, data, epochs=1, attack=attack, progress=False)
    evaluate(model, data, attacks=[attack], progress=False)
    assert given
    assert all(seen is model for seen in given)


def test_torchattacks_make_the_same_examples() -> None:
    def attacked(model: nn.Module) -> object:
        return torchattacks.PGD(model, eps=8 / 255, alpha=4 / 255, steps=2)

    for around in (lambda model: model, lambda _model: Net(), lambda model: nn.Sequential(nn.Identity(), model)):
        ends = []
        for engine in ("plain", "fast"):
            model = wide(Net)()
            adv_finetune(model, batches(6, 6), epochs=1, attack=attacked(around(model)), progress=False, engine=engine)
            ends.append(model.state_dict())
        assert all(torch.allclose(ends[0][n].double(), ends[1][n].double(), rtol=1e-7, atol=1e-9) for n in ends[0])


def test_the_engine_leaves_no_trace_in_the_model() -> None:
    model = SMALL.build().train()
    x, y = SMALL.example(), SMALL.labels()
    replicas = Replicas(model, Engine(), dtype=torch.bfloat16, compile=False)
    world = World(model)
    for _ in range(2):
        replica = replicas.fresh(x)
        assert replica is not None
        craft_on_copy(replica, PLAIN, x, y, generator=torch.Generator())
    assert world.unchanged()


def test_no_recompilation_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    counts: list[int] = []
    model = wide(Net)()
    adv_finetune(
        model,
        batches(*[6] * 5),
        epochs=2,
        attack=PLAIN,
        progress=False,
        compile=True,
        on_step=lambda *_: counts.append(len(compilations)),  # type: ignore[arg-type, return-value]
    )
    torch.compiler.reset()
    assert counts[0] >= 2  # the copy and the training step
    assert set(counts[1:]) == {counts[1]}
    assert counts[1] - counts[0] <= 1
    plain = finetuned(wide(Net), batches(*[6] * 5), engine="plain", lr=0.05)
    assert all(
        torch.allclose(plain[n].double(), t.double(), rtol=1e-7, atol=1e-9) for n, t in model.state_dict().items()
    )


def test_the_training_step_keeps_nothing_for_frozen_convolutions() -> None:
    model = wide(Net)()
    kept: list[tuple[int, ...]] = []
    seen: dict[str, int] = {}
    model.conv1.register_forward_pre_hook(lambda _module, inputs: seen.update(images=inputs[0].data_ptr()))
    pointers: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        pointers.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adv_finetune(model, batches(6), epochs=1, attack=None, train="bn", progress=False)
    assert kept
    assert seen["images"] not in pointers  # needed by the first convolution's weight alone
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "quick"}, "engine must be 'fast', 'plain' or an Engine, got 'quick'"),
        ({"precision": "int8"}, "precision must be one of 'auto', 'float32'"),
        ({"engine": "plain", "precision": "bfloat16"}, "engine='plain' has none"),
    ],
)
def test_unknown_switches_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adv_finetune(Net(), batches(6), epochs=1, progress=False, **options)  # type: ignore[arg-type]
    if "precision" not in options:
        with pytest.raises(ValueError, match=message):
            evaluate(Net(), batches(6)[0], attacks=["pgd-2"], progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "all"])
def test_a_chunk_holds_at_least_one_example(chunk: object) -> None:
    with pytest.raises(ValueError, match="chunk must be 'auto', None or a whole number"):
        Engine(chunk=chunk)  # type: ignore[arg-type]


def test_a_batch_is_cut_where_its_examples_do_not_touch() -> None:
    x = batches(12)[0][0]
    for make, parts in ((Net, 4), (Touching, 1), (KINDS["BN without statistics"], 1), (OneSize, 1)):
        replica = Replicas(wide(make)(), Engine(chunk=3), dtype=None, compile=False).fresh(
            x[:6] if make is OneSize else x
        )
        assert replica is not None
        assert replica.chunks(x) == parts, make


def test_a_batch_of_one_does_not_settle_that_larger_ones_stay_whole() -> None:
    copies = Replicas(wide(Net)(), Engine(chunk=3), dtype=None, compile=False)
    ((one, _), (twelve, _)) = batches(1, 12)
    first, second = copies.fresh(one), copies.fresh(twelve)
    assert first is second
    assert second is not None
    assert second.chunks(twelve) == 4


@pytest.mark.parametrize("chunk", ["auto", 2, 3, None])
def test_a_path_that_hangs_on_the_number_of_examples_is_taken(chunk: int | None) -> None:
    # Below 4 examples BySize goes another way: parts of 2 would, of a batch of 7, and a plan made on two examples.
    assert_equal_runs(wide(BySize), batches(7, 2, 7), engine=Engine(chunk=chunk))


def test_copies_are_shared_by_batches_of_all_sizes() -> None:
    copies = Replicas(wide(Net)(), Engine(), dtype=None, compile=False)
    found = [copies.fresh(x) for x, _ in batches(6, 1, 4, 6)]
    assert all(replica is found[0] for replica in found)


def hook_with_a_view() -> nn.Module:
    model = Net()
    model.bn2.register_forward_hook(lambda _module, _inputs, output: output.view(len(output), -1).view_as(output))
    return model


def test_a_hook_that_takes_one_memory_format_is_no_obstacle() -> None:
    assert_equal_runs(wide(hook_with_a_view), batches(6, 6))


def test_an_attack_bound_around_a_model_in_float64_is_refused_in_words() -> None:
    model = wide(Net)()
    x, y = batches(6)[0]
    for engine in ("plain", "fast"):
        inner = torchattacks.PGD(model, steps=1)
        assert evaluate(model, (x, y), attacks=[inner], engine=engine, progress=False).examples == 6
        around = torchattacks.PGD(nn.Sequential(nn.Identity(), model), steps=1)
        with pytest.raises(ValueError, match=r"torchattacks.PGD is bound to a module around the model"):
            evaluate(model, (x, y), attacks=[around], engine=engine, progress=False)


@pytest.mark.parametrize("attacks", [["pgd-5"], ["apgd-ce", "square"]], ids=str)
def test_evaluation_counts_the_same_examples(attacks: list[str]) -> None:
    images, labels = sample(train=False)
    pair = floats(images[:24]), labels[:24]
    model = trained()
    plain, fast = (
        evaluate(model, pair, attacks=attacks, eps=1 / 255, engine=engine, progress=False)
        for engine in ("plain", "fast")
    )
    assert torch.equal(plain.correct, fast.correct)
    assert 0 < int(plain.robust.sum()) < int(plain.correct.sum())
    assert int(plain.robust.sum()) == int(fast.robust.sum())


def test_what_only_the_copy_gets_wrong_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bnsurgery._replica._Net.forward
    monkeypatch.setattr(bnsurgery._replica._Net, "forward", lambda net, x: -original(net, x))
    model = SMALL.build().eval()
    x = SMALL.example()
    with torch.no_grad():
        y = model(x).argmax(1)
    result = evaluate(
        model, (x, y), attacks=[torchattacks.PGD(model, eps=1e-4, alpha=1e-4, steps=1)], eps=1e-4, progress=False
    )
    assert result.robust_error == 0
