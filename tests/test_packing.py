"""Examples that are broken leave the batch: the others are attacked as before, and what broke them is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnsurgery._evaluating
from bnsurgery import Engine, evaluate
from bnsurgery._geometry import Norm, distance
from bnsurgery._packing import Packed
from odd_networks import Touching, TouchingALittle, images, trained, wide

EPS: dict[Norm, float] = {"linf": 0.8 / 255, "l2": 0.15}
"""Some examples of the shipped network are broken within these, others not."""


class Counting(nn.Module):
    """Counts what passes through."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sizes = net, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.net(x)
        return logits


def packed(eps: float = 0.1) -> tuple[Counting, Packed, Tensor, Tensor]:
    """Around a linear network: the class is 0 where the mean is below a half, else 1; it is never 2."""
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4, [0.0] * 4]))
        linear.bias.copy_(torch.tensor([2.0, -2.0, -10.0]))
    x = torch.tensor([[0.1] * 4, [0.4] * 4, [0.48] * 4])
    net = Counting(nn.Sequential(nn.Flatten(), linear))
    y = torch.zeros(3, dtype=torch.long)
    model = Packed(net, x, y, lambda x, made: distance(x, made, "linf") <= eps + 1e-6, "linf", 1e-4)
    return net, model, x, y


def test_an_example_leaves_once_it_is_broken() -> None:
    net, model, x, _ = packed()
    assert torch.equal(model(x), net.net(x))
    moved = x + 0.05
    assert torch.equal(model(moved), net.net(moved))
    assert model.broken.tolist() == [False, False, True]
    assert torch.equal(model.found, torch.stack([x[0], x[1], moved[2]]))
    found = model(x + 0.1)
    assert net.sizes == [3, 3, 2]
    assert torch.equal(found[:2], net.net(x + 0.1)[:2])
    assert torch.equal(found[2], net.net(moved)[2])
    assert torch.equal(model.found[2], moved[2])


def test_parts_of_the_batch_are_known_again() -> None:
    net, model, x, _ = packed()
    model(x + 0.05)
    assert torch.equal(model(x[[0, 2]] + 0.02), torch.stack([net.net(x + 0.02)[0], net.net(x + 0.05)[2]]))
    assert net.sizes[-1] == 1
    model(x[1:] - 0.02)
    assert net.sizes[-1] == 1
    model(x[:2] - 0.02)
    assert net.sizes[-1] == 2


def test_gradients_are_those_of_the_examples_that_are_left() -> None:
    net, model, x, _ = packed()
    model(x + 0.05)
    moved = (x + 0.01).requires_grad_()
    (gradient,) = torch.autograd.grad(model(moved).square().sum(), moved)
    (expected,) = torch.autograd.grad(net.net(moved).square().sum(), moved)
    assert torch.equal(gradient[:2], expected[:2])
    assert torch.equal(gradient[2], torch.zeros(4))
    last = (x[2:] + 0.01).requires_grad_()
    before = len(net.sizes)
    (gradient,) = torch.autograd.grad(model(last).square().sum(), last)
    assert torch.equal(gradient, torch.zeros(1, 4))
    assert len(net.sizes) == before


def test_points_out_of_reach_break_nothing() -> None:
    net, model, x, _ = packed(eps=0.05)
    wrong = torch.full((3, 4), 0.9)
    assert torch.equal(model(wrong), net.net(wrong))
    assert torch.equal(model(wrong[:2]), net.net(wrong[:2]))
    assert not model.broken.any()
    assert torch.equal(model.found, x)


def test_what_hangs_on_rounding_breaks_nothing() -> None:
    _, model, x, _ = packed()
    model(x + torch.tensor([[0.0], [0.0], [0.0200001]]))
    assert not model.broken.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_that_cannot_be_told_apart_stay_together(norm: Norm) -> None:
    net, _, x, _ = packed()
    gap = {"linf": 0.08, "l2": 0.16}[norm]
    assert Packed.suits(net, x, gap / 2 * 0.99, norm, 1e-4)
    assert not Packed.suits(net, x, gap / 2 * 1.01, norm, 1e-4)
    assert not Packed.suits(net, x[:1], 0.001, norm, 1e-4)


def test_one_example_alone_must_give_logits_of_a_batch() -> None:
    _, _, x, _ = packed()
    assert not Packed.suits(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), Squeezed()), x, 0.001, "linf", 1e-4)


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze()


@pytest.mark.parametrize("make", [Touching, TouchingALittle])
def test_examples_that_touch_stay_together(make: type[nn.Module]) -> None:
    model = wide(make)().float().eval()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not Packed.suits(model, x, 1e-4, "linf", 1e-4)


@pytest.mark.parametrize(
    ("part", "norm", "count", "batch_size"),
    [
        ("apgd-ce", "linf", 24, 64),
        ("apgd-ce", "linf", 24, 10),
        ("apgd-ce", "l2", 24, 64),
        ("apgd-t", "linf", 8, 64),
    ],
)
def test_the_same_examples_are_broken_with_less_work(
    part: str, norm: Norm, count: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = trained(), images(count)
    passed: list[int] = []
    original = Packed._run

    def counted(self: Packed, x: Tensor) -> Tensor:
        passed.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Packed, "_run", counted)

    def broken(engine: object) -> tuple[Tensor, int]:
        passed.clear()
        options = {"attacks": [part], "eps": EPS[norm], "norm": norm, "batch_size": batch_size}
        result = evaluate(model, (x, y), **options, engine=engine, keep_adversarial=True, progress=False)
        assert result.adversarial is not None
        with torch.no_grad():
            assert not (model(result.adversarial).argmax(1) == y)[~result.robust].any()
        assert bool((distance(x, result.adversarial, norm) <= EPS[norm] + 2e-6).all())
        return result.robust, result.rows[0].tried

    robust, tried = broken("fast")
    runs = 1 if part == "apgd-ce" else 9
    assert 100 * int(robust.sum()) * runs <= sum(passed)
    assert sum(passed) < (100 * (0.2 * tried + 0.8 * int(robust.sum())) + 10 * tried) * runs
    plain, _ = broken("plain")
    assert not passed
    assert torch.equal(robust, plain)
    assert 0 < int(robust.sum()) < tried


def test_what_is_wrong_on_the_copy_alone_is_attacked_to_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = trained(), images(12)
    options = {"attacks": ["apgd-ce"], "eps": EPS["linf"], "progress": False}
    plain = evaluate(model, pair, engine="plain", **options)

    def wrong(self: Packed, x: Tensor, rows: Tensor, logits: Tensor) -> None:
        """Takes the first point of each example for one that breaks it."""
        self.broken[rows] = True
        self._logits = torch.zeros((len(self._y), 10)) if self._logits is None else self._logits
        self.found[rows] = x

    monkeypatch.setattr(Packed, "_note", wrong)
    assert torch.equal(evaluate(model, pair, **options).robust, plain.robust)


def test_attack_objects_of_the_users_own_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnsurgery._evaluating, "Packed", None)
    from bnsurgery import autoattack

    model, pair = trained(), images(8)
    attack = autoattack(model, eps=EPS["linf"])
    attack.attacks_to_run = ["apgd-ce"]
    assert evaluate(model, pair, attacks=[attack], eps=EPS["linf"], engine=Engine(), progress=False).examples == 8
