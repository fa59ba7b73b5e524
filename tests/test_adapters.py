"""Any attack, by one way in: the model that is meant is attacked, and nothing else is left changed."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pyautoattack
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnsurgery
from bnsurgery import PGD, BNSurgeryError, MissingExtraError, autoattack
from bnsurgery.adapters import (
    AUTOATTACK_PARTS,
    check_attack,
    craft,
    describe_attack,
    is_autoattack,
    is_torchattacks,
    run_autoattack,
)
from networks import SMALL
from test_attacks import Bomb, Normalize, World, lived_in, tracing

X = SMALL.example()
with torch.no_grad():  # right, so that there is something to attack
    Y = SMALL.build().eval()(X).argmax(1)


@pytest.fixture
def traced() -> Iterator[None]:
    with tracing():
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weak_autoattack(model: nn.Module, parts: tuple[str, ...] = ("apgd-ce", "square"), eps: float = 0.3) -> object:
    """An AutoAttack object of pyautoattack's, with few iterations."""
    attack = pyautoattack.AutoAttack(model, eps=eps, version="custom", attacks=list(parts), seed=0)
    for part in (attack.apgd, attack.apgd_targeted, attack.fab):
        part.n_iter = part.n_restarts = 2
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = 5
    attack.square.n_queries = 5
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 2
    return attack


def one_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FGSM with a random start, as anybody would write it down."""
    x_adv = (x + 0.02 * torch.rand_like(x)).clamp(0, 1).requires_grad_()
    F.cross_entropy(model(x_adv), y).backward()
    return (x_adv + 0.02 * x_adv.grad.sign()).clamp(0, 1).detach()


def vandal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Changes all that it can lay hands on, and returns inputs that are fit to return."""
    made = x.detach().flip(0).clone()
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.reset_running_stats()
            module.running_var.fill_(torch.nan)
            module.num_batches_tracked.add_(100)
            module.momentum = None
            module.track_running_stats = False
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    x.fill_(torch.nan)
    y.zero_()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.enabled = False
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic
    sys.settrace(None)
    return made


def awake(model: nn.Module) -> object:
    """A torchattacks PGD that itself puts all layers in training mode."""
    attack = torchattacks.PGD(model, steps=2)
    attack.set_model_training_mode(True, True, True)
    return attack


def multi(model: nn.Module) -> object:
    return torchattacks.MultiAttack([torchattacks.PGD(model, eps=1e-4, steps=2), torchattacks.FGSM(model, eps=0.3)])


# Name, the attack for a model, and a forward pass in its middle.
ATTACKS: dict[str, tuple[Callable[[nn.Module], object], int]] = {
    "PGD, bn=eval": (lambda _: PGD(steps=3), 2),
    "PGD, bn=batch": (lambda _: PGD(steps=3, bn="batch"), 2),
    "PGD, bn=train": (lambda _: PGD(steps=3, bn="train"), 2),
    "PGD, l2, best": (lambda _: PGD(0.5, 3, 0.2, "l2", best=True), 4),
    "torchattacks.PGD": (lambda model: torchattacks.PGD(model, steps=3), 2),
    "torchattacks.PGD in training mode": (awake, 2),
    "torchattacks.MultiAttack": (multi, 2),
    "torchattacks.Square": (lambda model: torchattacks.Square(model, eps=0.6, n_queries=50), 3),
    "torchattacks.AutoAttack": (lambda model: torchattacks.AutoAttack(model, eps=0.3, n_classes=10), 4),
    # Its checks take seven forward passes, the seventh of them with a trace function of its own.
    "AutoAttack": (weak_autoattack, 10),
    "AutoAttack, in its check": (weak_autoattack, 7),
    "AutoAttack, targeted": (lambda model: weak_autoattack(model, ("apgd-t", "fab-t")), 12),
    "callable": (lambda _: one_step, 1),
    "vandal": (lambda _: vandal, 1),
}


def any_attack(argument: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(argument, ATTACKS.values(), ids=ATTACKS.keys())


# No trace.


@any_attack("kind")
def test_no_attack_leaves_a_trace(kind: tuple[Callable[[nn.Module], object], int], traced: None) -> None:
    model = lived_in(SMALL.build())
    attack, x, y = kind[0](model), X.clone(), Y.clone()
    world = World(model)
    made = craft(attack, model, x, y, generator=seeded())
    assert world.unchanged()
    assert made.shape == X.shape
    assert not made.requires_grad
    assert not torch.equal(made, X)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


@any_attack("kind")
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_no_attack_leaves_a_trace_when_it_breaks(
    kind: tuple[Callable[[nn.Module], object], int],
    error: BaseException,
    traced: None,
) -> None:
    bomb = Bomb(kind[1], error)
    model = nn.Sequential(lived_in(SMALL.build()), bomb)
    attack = kind[0](model)
    world = World(model)
    with pytest.raises(type(error)):
        craft(attack, model, X, Y, generator=seeded())
    assert bomb.calls == kind[1]
    assert world.unchanged()


def test_an_attack_that_breaks_after_all_its_damage_leaves_no_trace(traced: None) -> None:
    def last_straw(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        vandal(model, x, y)
        raise KeyboardInterrupt

    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(KeyboardInterrupt):
        craft(last_straw, model, X, Y, generator=seeded())
    assert world.unchanged()


def test_statistics_that_an_attack_takes_off_a_layer_are_put_back() -> None:
    # The usual way to make a layer normalise by the batch also in evaluation mode (Tent, for one).
    def tent(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        return one_step(model, x, y)

    model = lived_in(SMALL.build())
    world = World(model)
    craft(tent, model, X, Y, generator=seeded())
    assert world.unchanged()


def test_statistics_that_an_attack_replaces_are_put_back() -> None:
    def replace(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model[1].running_mean = torch.zeros(8)
        return x

    model = lived_in(SMALL.build())
    world = World(model)
    craft(replace, model, X, Y, generator=seeded())
    assert world.unchanged()


# What an attack finds.


def test_a_callable_finds_the_model_ready_and_its_own_copies() -> None:
    model = lived_in(SMALL.build())
    seen = []

    def look(given: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(
            (
                given is model,
                any(module.training for module in given.modules()),
                any(parameter.requires_grad for parameter in given.parameters()),
                torch.is_grad_enabled(),
                x.data_ptr() == X.data_ptr() or y.data_ptr() == Y.data_ptr(),
                torch.equal(x, X) and torch.equal(y, Y),
            )
        )
        return x

    with torch.no_grad():
        craft(look, model, X, Y, generator=seeded())
    assert seen == [(True, False, False, True, False, True)]


@pytest.mark.parametrize("name", ["PGD, bn=eval", "torchattacks.PGD", "AutoAttack", "callable"])
def test_all_randomness_comes_from_the_generator(name: str) -> None:
    model = SMALL.build()
    attack = ATTACKS[name][0](model)
    made = []
    for seed, elsewhere in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(elsewhere)
        np.random.seed(elsewhere)
        random.seed(elsewhere)
        made.append(craft(attack, model, X, Y, generator=seeded(seed)))
    assert torch.equal(made[0], made[1])
    # AutoAttack sets its own seed.
    assert torch.equal(made[0], made[2]) == (name == "AutoAttack")


def test_python_and_numpy_are_seeded_too_and_anew_in_each_call() -> None:
    def noisy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, random.random() + np.random.rand() + float(torch.rand(())))

    generator = seeded()
    made = [float(craft(noisy, SMALL.build(), X, Y, generator=generator)[0, 0, 0, 0]) for _ in range(3)]
    generator = seeded()
    assert made == [float(craft(noisy, SMALL.build(), X, Y, generator=generator)[0, 0, 0, 0]) for _ in range(3)]
    assert len(set(made)) == 3


def test_a_pgd_is_run_as_it_is() -> None:
    model = SMALL.build()
    attack = PGD(0.05, 3, 0.02, "l2")
    assert torch.equal(craft(attack, model, X, Y, generator=seeded(4)), attack(model, X, Y, generator=seeded(4)))


@pytest.mark.parametrize(
    "build",
    [lambda model: torchattacks.PGD(model, steps=3, random_start=False), lambda model: multi(model)],
    ids=["PGD", "MultiAttack"],
)
def test_a_torchattacks_object_gives_what_it_gives_by_hand(build: Callable[[nn.Module], object]) -> None:
    model = SMALL.build().eval()
    attack = build(model)
    attack.random_start = False
    for part in getattr(attack, "attacks", ()):
        part.random_start = False
    assert torch.equal(craft(attack, model, X, Y, generator=seeded()), attack(X, Y))


def test_an_autoattack_object_gives_what_it_gives_by_hand() -> None:
    model = SMALL.build().eval()
    attack = weak_autoattack(model)
    expected, _ = attack.run_standard_evaluation(X, Y, batch_size=4)
    assert torch.equal(craft(attack, model, X, Y, generator=seeded(), batch_size=4), expected)


def test_results_come_back_in_the_dtype_of_the_input_and_detached() -> None:
    def double(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x.double().requires_grad_() * 1

    made = craft(double, SMALL.build(), X, Y, generator=seeded())
    assert made.dtype == torch.float32
    assert not made.requires_grad


def test_the_batch_size_reaches_autoattack_alone() -> None:
    model = SMALL.build()
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    craft(weak_autoattack(model), model, X, Y, generator=seeded(), batch_size=4)
    assert max(sizes) == 4
    sizes.clear()
    craft(weak_autoattack(model), model, X, Y, generator=seeded())
    assert max(sizes) == 6
    sizes.clear()
    craft(one_step, model, X, Y, generator=seeded(), batch_size=4)
    assert sizes == [6]


# Objects that are bound to another model.


def other_model() -> nn.Module:
    torch.manual_seed(9)
    return SMALL.make().train()


BOUND: dict[str, Callable[[nn.Module], object]] = {
    "torchattacks.PGD": lambda model: torchattacks.PGD(model, steps=2),
    "torchattacks.MultiAttack": multi,
    "nested MultiAttack": lambda model: torchattacks.MultiAttack([multi(model), torchattacks.FGSM(model, eps=0.3)]),
    "torchattacks.AutoAttack": lambda model: torchattacks.AutoAttack(model, eps=0.3, n_classes=4),
    "AutoAttack": lambda model: weak_autoattack(model, ("apgd-ce", "apgd-t", "fab-t", "square")),
}


def parts_of(attack: object) -> list[object]:
    if is_autoattack(attack):
        return [attack, attack.apgd, attack.apgd_targeted, attack.fab, attack.square]
    parts, found = [attack], []
    while parts:
        part = parts.pop()
        found.append(part)
        parts += [*getattr(part, "attacks", ()), *([part._autoattack] if hasattr(part, "_autoattack") else [])]
    return found


def held(attack: object) -> list[tuple[int, ...]]:
    names = ("model", "predict", "device")
    return [tuple(id(vars(part)[name]) for name in names if name in vars(part)) for part in parts_of(attack)]


@pytest.mark.parametrize("build", BOUND.values(), ids=BOUND.keys())
def test_an_attack_on_another_model_is_lent_the_right_one(build: Callable[[nn.Module], object]) -> None:
    model, other = SMALL.build().eval(), other_model()
    calls = []
    other.register_forward_pre_hook(lambda *_: calls.append(1))
    attack, world = build(other), World(other)
    before = held(attack)
    made = craft(attack, model, X, Y, generator=seeded())
    assert torch.equal(made, craft(build(model), model, X, Y, generator=seeded()))
    assert not torch.equal(made, X)
    assert held(attack) == before
    assert calls == []
    assert world.unchanged()


@pytest.mark.parametrize("build", BOUND.values(), ids=BOUND.keys())
def test_an_attack_gets_its_own_model_back_after_an_error(build: Callable[[nn.Module], object]) -> None:
    model, other = nn.Sequential(SMALL.build(), Bomb(1, KeyboardInterrupt())), other_model()
    attack = build(other)
    before = held(attack)
    with pytest.raises(KeyboardInterrupt):
        craft(attack, model, X, Y, generator=seeded())
    assert held(attack) == before


@pytest.mark.parametrize(
    "build",
    [lambda model: torchattacks.PGD(model, eps=0.03, steps=2), lambda model: weak_autoattack(model, ("apgd-ce",))],
    ids=["torchattacks", "autoattack"],
)
def test_an_attack_on_a_wrapper_of_the_model_goes_through_the_wrapper(build: Callable[[nn.Module], object]) -> None:
    model = lived_in(SMALL.build())
    wrapper = nn.Sequential(Normalize([0.5] * 3, [0.2] * 3), model)
    with torch.no_grad():
        y = wrapper.eval()(X).argmax(1)
    lived_in(model)
    attack, world = build(wrapper), World(wrapper)
    before = held(attack)
    made = craft(attack, model, X, y, generator=seeded())
    assert world.unchanged()
    assert held(attack) == before
    assert torch.equal(made, craft(build(wrapper), wrapper, X, y, generator=seeded()))
    assert not torch.equal(made, craft(build(model), model, X, y, generator=seeded()))
    assert not torch.equal(made, X)


def test_an_autoattack_object_on_a_function_is_used_as_it_is() -> None:
    model = lived_in(SMALL.build())
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(model.training)
        return model(x)

    attack, world = weak_autoattack(forward, ("apgd-ce",)), World(model)
    made = craft(attack, model, X, Y, generator=seeded())
    assert world.unchanged()
    assert set(calls) == {False}
    assert attack.model is forward
    assert torch.equal(made, craft(weak_autoattack(model, ("apgd-ce",)), model, X, Y, generator=seeded()))


# Refusals.


@pytest.mark.parametrize(
    "attack",
    [3, None, "pgd-20", torchattacks.PGD, PGD, object()],
    ids=lambda value: type(value).__name__ + getattr(value, "__name__", ""),
)
def test_what_is_no_attack_is_refused(attack: object) -> None:
    message = "an attack must be a PGD, a torchattacks or AutoAttack object, or a callable attack(model, x, y), got "
    with pytest.raises(TypeError, match=re.escape(message + repr(attack))):
        craft(attack, SMALL.build(), X, Y, generator=seeded())
    with pytest.raises(TypeError, match=re.escape(message + repr(attack))):
        check_attack(attack)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, Y[:4], "y must have shape (6,) to go with x (6, 3, 8, 8), got (4,)"),
        ((255 * X).to(torch.uint8), Y, "x must be floating point, got torch.uint8"),
        (X, Y.float(), "y must hold integer labels, got torch.float32"),
    ],
)
def test_wrong_shapes_are_refused_before_the_attack_runs(x: Tensor, y: Tensor, message: str) -> None:
    calls = []
    with pytest.raises(ValueError, match=re.escape(message)):
        craft(lambda *_: calls.append(1), SMALL.build(), x, y, generator=seeded())
    assert calls == []


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "a NoneType"),
        (X[:3], "a tensor (3, 3, 8, 8) of torch.float32"),
        ((X, Y), "a tuple of 2 (a tensor (6, 3, 8, 8) of torch.float32, a tensor (6,) of torch.int64)"),
        (X.numpy(), "a ndarray"),
    ],
    ids=["None", "too few", "tuple", "ndarray"],
)
def test_an_attack_that_returns_something_else_is_refused(returned: object, what: str) -> None:
    def careless(model: nn.Module, x: Tensor, y: Tensor) -> object:
        return returned

    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(
        BNSurgeryError, match=re.escape(f"careless must return inputs of shape (6, 3, 8, 8), got {what}")
    ):
        craft(careless, model, X, Y, generator=seeded())
    assert world.unchanged()


# Names.


class Named:
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ("square", "square"),
        (PGD(0.5, 7, 0.1, "l2"), "PGD(eps=0.5, steps=7, step_size=0.1, norm='l2')"),
        (torchattacks.FGSM(SMALL.build()), "torchattacks.FGSM"),
        (multi(SMALL.build()), "torchattacks.MultiAttack"),
        (weak_autoattack(SMALL.build()), "AutoAttack"),
        (one_step, "one_step"),
        (Named(), "Named"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attacks_have_names_for_tables(attack: object, expected: str) -> None:
    assert describe_attack(attack) == expected
    assert is_torchattacks(attack) == expected.startswith("torchattacks.")
    assert is_autoattack(attack) == (expected == "AutoAttack")


# autoattack().


def test_autoattack_is_the_standard_one_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    model = SMALL.build().eval()
    attack = autoattack(model, eps=0.1, seed=3)
    assert isinstance(attack, pyautoattack.AutoAttack)
    assert tuple(attack.attacks_to_run) == AUTOATTACK_PARTS == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert (attack.epsilon, attack.norm, attack.seed, attack.version) == (0.1, "Linf", 3, "standard")
    assert (attack.apgd_targeted.n_target_classes, attack.fab.n_target_classes) == (9, 9)
    assert attack.square.n_queries == 5000
    attack.attacks_to_run = ["apgd-ce"]
    run_autoattack(attack, X, Y, batch_size=6)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("norm", "theirs"), [("linf", "Linf"), ("l2", "L2")])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_autoattack_knows_norms_and_versions(norm: str, theirs: str, version: str) -> None:
    attack = autoattack(SMALL.build(), norm=norm, version=version)
    assert attack.norm == attack.apgd.norm == attack.fab.norm == attack.square.norm == theirs
    assert attack.attacks_to_run == pyautoattack.AutoAttack(SMALL.build(), version=version).attacks_to_run


def test_autoattack_has_fewer_targets_where_there_are_fewer_classes() -> None:
    attack = autoattack(SMALL.build(), classes=5)
    assert (attack.apgd_targeted.n_target_classes, attack.fab.n_target_classes) == (4, 4)


def test_autoattack_refuses_other_norms() -> None:
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', got 'L1'"):
        autoattack(SMALL.build(), norm="L1")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes it look as if, of the two packages with AutoAttack, only these were installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        if name in ("pyautoattack", "autoattack"):
            return object() if name in names else None
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    message = re.escape("AutoAttack needs pyautoattack: pip install 'bnsurgery[autoattack]'")
    with pytest.raises(MissingExtraError, match=message):
        autoattack(SMALL.build())
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(ImportError, match=message):
        bnsurgery.evaluate(model, (X, Y), attacks="autoattack", progress=False)
    assert world.unchanged()


class OriginalAutoAttack:
    """With the signatures of https://github.com/fra31/auto-attack, package ``autoattack``, at its version 0.1."""

    def __init__(
        self,
        model,
        norm="Linf",
        eps=0.3,
        seed=None,
        verbose=True,
        attacks_to_run=[],  # noqa: B006 - as it is there
        version="standard",
        is_tf_model=False,
        device="cuda",
        log_path=None,
    ):
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t", "square"]
        self.version, self.device, self.sizes = version, device, []
        self.apgd, self.square = SimpleNamespace(model=model), SimpleNamespace(predict=model)
        self.apgd_targeted = SimpleNamespace(model=model, n_target_classes=9)
        self.fab = SimpleNamespace(predict=model, n_target_classes=9)

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        if self.verbose:
            print("using standard version")  # noqa: T201 - as it is there
        self.sizes.append(bs)
        wrong = self.square.predict(x_orig).max(1)[1] != y_orig
        assert self.model is self.square.predict is self.apgd.model is self.apgd_targeted.model is self.fab.predict
        return torch.where(wrong.view(-1, 1, 1, 1), x_orig, (x_orig + self.epsilon).clamp(0, 1))


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("autoattack")
    module.AutoAttack = OriginalAutoAttack
    monkeypatch.setitem(sys.modules, "autoattack", module)
    installed(monkeypatch, "autoattack")


def test_the_original_package_serves_too(original: None, capsys: pytest.CaptureFixture[str]) -> None:
    model = lived_in(SMALL.build())
    attack = autoattack(model, eps=0.1, norm="l2", seed=5, classes=7)
    assert isinstance(attack, OriginalAutoAttack)
    assert is_autoattack(attack)
    assert describe_attack(attack) == "AutoAttack"
    assert (attack.norm, attack.epsilon, attack.seed, attack.verbose, attack.device) == ("L2", 0.1, 5, False, "cpu")
    assert (attack.apgd_targeted.n_target_classes, attack.fab.n_target_classes) == (6, 6)
    with torch.no_grad():
        right = model.eval()(X).argmax(1) == Y
    lived_in(model)
    world = World(model)
    made = craft(attack, model, X, Y, generator=seeded(), batch_size=4)
    assert world.unchanged()
    assert torch.equal(made, torch.where(right.view(-1, 1, 1, 1), (X + 0.1).clamp(0, 1), X))
    assert attack.sizes == [4]
    assert capsys.readouterr() == ("", "")


def test_an_object_of_the_original_package_is_lent_the_model(original: None) -> None:
    model, other = SMALL.build(), other_model()
    attack = autoattack(other, eps=0.1)
    before = held(attack)
    made = craft(attack, model, X, Y, generator=seeded())
    assert torch.equal(made, craft(autoattack(model, eps=0.1), model, X, Y, generator=seeded()))
    assert held(attack) == before


def test_evaluate_runs_on_the_original_package(original: None) -> None:
    model = SMALL.build()
    result = bnsurgery.evaluate(model, (X, Y), eps=0.1, batch_size=4, progress=False)
    assert [row.attack for row in result.rows] == list(AUTOATTACK_PARTS)
    with torch.no_grad():
        right = model.eval()(X).argmax(1) == Y
        robust = right & (model((X + 0.1).clamp(0, 1)).argmax(1) == Y)
    assert torch.equal(result.robust, robust)
    assert torch.equal(result.correct, right)


def test_where_both_are_installed_pyautoattack_is_taken(original: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "autoattack", "pyautoattack")
    assert isinstance(autoattack(SMALL.build()), pyautoattack.AutoAttack)
