"""PGD: against torchattacks and formulas written out here, and that it leaves no trace."""

from __future__ import annotations

import copy
import math
import pickle
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnsurgery
from bnsurgery import PGD, BNSurgeryError
from bnsurgery._geometry import check_norm, distance
from bnsurgery.attacks import attacking
from networks import SMALL

F64 = torch.float64


# What other test files use too: all that a call must leave as it found it.


def bits(tensor: Tensor) -> bytes:
    """The very bytes of a tensor, so that -0.0 is not 0.0 and NaN is itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class World:
    """A model and the process as they are now; ``unchanged`` says what differs later."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.before = self._look()

    def _look(self) -> dict[str, object]:
        cudnn = torch.backends.cudnn
        numpy = np.random.get_state()
        seen: dict[str, object] = {
            "torch's random state": bits(torch.get_rng_state()),
            "NumPy's random state": (numpy[0], numpy[1].tobytes(), *numpy[2:]),
            "Python's random state": random.getstate(),
            "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
            "default dtype": torch.get_default_dtype(),
            "trace": sys.gettrace(),
            "grad mode": torch.is_grad_enabled(),
        }
        if self.model is None:
            return seen
        for name, module in self.model.named_modules():
            seen[f"mode of {name!r}"] = module.training
            seen[f"hooks of {name!r}"] = [list(hooks) for key, hooks in sorted(vars(module).items()) if "hooks" in key]
            if isinstance(module, _BatchNorm):
                own_train = vars(module).get("train")
                seen[f"settings of {name!r}"] = (module.momentum, module.track_running_stats, module.eps, own_train)
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            seen[f"tensor {name!r}"] = id(tensor)
            seen[f"values of {name!r}"] = (tensor.dtype, bits(tensor))
            seen[f"requires_grad of {name!r}"] = tensor.requires_grad
            seen[f"grad of {name!r}"] = None if tensor.grad is None else (id(tensor.grad), bits(tensor.grad))
        return seen

    def unchanged(self) -> bool:
        now = self._look()
        assert [key for key in self.before | now if self.before.get(key) != now.get(key)] == []
        return True


def lived_in(model: nn.Module) -> nn.Module:
    """A model in the middle of somebody's work: modes, flags and settings mixed, gradients here and there."""
    model.train()
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    layers[0].eval()
    layers[0].momentum = 0.3
    layers[-1].bias.requires_grad_(False)
    parameters = list(model.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 0.5)
    parameters[-1].grad = torch.full_like(parameters[-1], -0.25)
    parameters[-2].requires_grad_(False)
    return model


class Bomb(nn.Module):
    """Passes its input on, until the call at which it raises."""

    def __init__(self, call: int, error: BaseException) -> None:
        super().__init__()
        self.call, self.error, self.calls = call, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return x


class Normalize(nn.Module):
    """Normalisation inside a model, written apart from the library's."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        channels = [(x[:, i] - m) / s for i, (m, s) in enumerate(zip(self.mean, self.std, strict=True))]
        return torch.stack(channels, 1)


@contextmanager
def tracing() -> Iterator[None]:
    """A trace function of the user's own (a debugger's, say), so that losing it shows."""
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    yield
    sys.settrace(before)


@pytest.fixture
def traced() -> Iterator[None]:
    with tracing():
        yield


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def to_input(pixels: Tensor, mean: list[float] = MEAN, std: list[float] = STD) -> Tensor:
    shape = (1, -1, *[1] * (pixels.dim() - 2))
    return (pixels - torch.tensor(mean, dtype=pixels.dtype).view(shape)) / torch.tensor(std, dtype=pixels.dtype).view(
        shape
    )


def to_pixels(x: Tensor, mean: list[float] = MEAN, std: list[float] = STD) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * torch.tensor(std, dtype=x.dtype).view(shape) + torch.tensor(mean, dtype=x.dtype).view(shape)


def case(dtype: torch.dtype = F64) -> tuple[nn.Module, Tensor, Tensor]:
    return SMALL.build(dtype).eval(), SMALL.example(dtype=dtype), SMALL.labels()


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy from its definition."""
    logits = model(x)
    return torch.logsumexp(logits, 1) - logits[torch.arange(len(y)), y]


# Against torchattacks, with the same start, in float64: there no gradient's sign hangs on rounding.


@pytest.mark.parametrize("steps", range(1, 11))
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_linf_equals_torchattacks_step_for_step(steps: int, targeted: bool) -> None:
    model, x, y = case()
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=steps)
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    torch.manual_seed(5)
    expected = theirs(x, y)
    torch.manual_seed(5)
    start = (x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1)
    actual = PGD(8 / 255, steps, 2 / 255, targeted=targeted)(model, x, y, start=start)
    assert (actual - expected).abs().max() <= 1e-6
    assert (actual - start).abs().max() > 1e-3


@pytest.mark.parametrize("steps", range(1, 11))
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_l2_equals_torchattacks_step_for_step(steps: int, targeted: bool) -> None:
    model, x, y = case()
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.2, steps=steps)
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    torch.manual_seed(5)
    expected = theirs(x, y)
    torch.manual_seed(5)
    direction = torch.empty_like(x).normal_().flatten(1)
    radius = torch.zeros(len(x), 1, dtype=x.dtype).uniform_(0, 1)
    start = (x + (direction * (radius / direction.norm(dim=1, keepdim=True) * 0.5)).view_as(x)).clamp(0, 1)
    actual = PGD(0.5, steps, 0.2, "l2", targeted=targeted)(model, x, y, start=start)
    assert (actual - expected).abs().max() <= 1e-6
    assert (actual - start).abs().max() > 1e-3


# The ball and the bounds.


@st.composite
def threats(draw: st.DrawFn) -> tuple[PGD, torch.dtype]:
    low = draw(st.floats(-1, 0.5))
    normalised = draw(st.booleans())
    attack = PGD(
        eps=draw(st.just(0.0) | st.floats(1e-6, 1.5)),
        steps=draw(st.integers(0, 4)),
        step_size=draw(st.just(0.0) | st.floats(1e-6, 1.0)),
        norm=draw(st.sampled_from(["linf", "l2"])),
        random_start=draw(st.booleans()),
        best=draw(st.booleans()),
        targeted=draw(st.booleans()),
        bounds=(low, low + draw(st.floats(0.01, 1.5))),
        mean=MEAN if normalised else None,
        std=STD if normalised else None,
        seed=draw(st.integers(0, 1000)),
    )
    return attack, draw(st.sampled_from([torch.float32, torch.float64]))


@settings(max_examples=150, deadline=None)
@given(threats())
def test_never_leaves_the_ball_or_the_bounds(threat: tuple[PGD, torch.dtype]) -> None:
    attack, dtype = threat
    low, high = attack.bounds
    generator = torch.Generator().manual_seed(attack.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 4, dtype=dtype))
    pixels = low + (high - low) * torch.rand(3, 3, 3, 3, generator=generator, dtype=dtype)
    x = pixels if attack.mean is None else to_input(pixels)
    made = attack(model, x, torch.tensor([0, 1, 2]))
    assert made.dtype == dtype
    assert made.shape == x.shape
    assert not made.requires_grad
    # Measured in float64. What is left is the rounding of x + delta to float32: 1.2e-7 for numbers up to 2, and a few
    # times as much where inputs go through the normalisation and back.
    tolerance = 1e-6
    before, after = x.double(), made.double()
    if attack.mean is not None:
        before, after = to_pixels(before), to_pixels(after)
    moved = (after - before).flatten(1)
    length = moved.abs().amax(1) if attack.norm == "linf" else moved.square().sum(1).sqrt()
    assert length.max() <= attack.eps + tolerance
    assert low - tolerance <= after.min()
    assert after.max() <= high + tolerance


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 2, "best": True}, {"steps": 1}], ids=str)
def test_even_a_start_outside_the_ball_ends_inside(norm: str, options: dict[str, object]) -> None:
    model, x, y = case()
    far = torch.where(x > 0.5, 0.0, 1.0).to(F64)
    made = PGD(0.01, step_size=0.005, norm=norm, **options)(model, x, y, start=far)
    assert distance(x, made, norm).max() <= 0.01 + 1e-9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_is_not_idle(norm: str) -> None:
    model, x, y = case()
    eps = {"linf": 0.05, "l2": 0.8}[norm]
    made = PGD(eps, 10, eps / 4, norm)(model, x, y)
    assert (losses(model, made, y) > losses(model, x, y)).all()
    assert distance(x, made, norm).min() > 0.5 * eps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("best", [False, True])
def test_eps_0_returns_the_input(norm: str, best: bool) -> None:
    model, x, y = case()
    made = PGD(0.0, 3, 0.1, norm, best=best)(model, x, y)
    assert torch.equal(made, x)
    assert made.data_ptr() != x.data_ptr()


def test_0_steps_return_the_start() -> None:
    model, x, y = case()
    assert torch.equal(PGD(0.1, 0, random_start=False)(model, x, y), x)
    start = (x + 0.05).clamp(0, 1)
    assert torch.allclose(PGD(0.1, 0)(model, x, y, start=start), start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_fills_the_ball(norm: str) -> None:
    x = torch.full((400, 1, 2, 2), 0.5, dtype=F64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, dtype=F64))
    delta = (PGD(0.1, 0, norm=norm)(model, x, torch.zeros(400, dtype=torch.long)) - x).flatten(1)
    if norm == "linf":  # uniform on [-0.1, 0.1] in each coordinate: mean 0, variance 0.2 ** 2 / 12
        assert abs(delta.mean()) < 0.005
        assert delta.var() == pytest.approx(0.2**2 / 12, rel=0.1)
    else:  # the radius is uniform on [0, 0.1]
        radius = delta.norm(dim=1)
        assert radius.mean() == pytest.approx(0.05, rel=0.1)
        assert radius.var() == pytest.approx(0.1**2 / 12, rel=0.2)
        assert (delta.mean(0).abs() < 0.01).all()


# Randomness.


def test_without_random_start_the_seed_does_not_matter() -> None:
    model, x, y = case()
    made = [PGD(seed=seed, random_start=False)(model, x, y) for seed in (0, 1)]
    assert torch.equal(*made)


def test_the_seed_fixes_call_after_call() -> None:
    model, x, y = case()
    first, second = PGD(steps=1, seed=3), PGD(steps=1, seed=3)
    runs = [[attack(model, x, y) for _ in range(2)] for attack in (first, second)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], PGD(steps=1, seed=4)(model, x, y))


def test_a_generator_takes_the_place_of_the_own_one() -> None:
    model, x, y = case()
    attack = PGD(steps=1, seed=3)
    one = attack(model, x, y, generator=torch.Generator().manual_seed(8))
    two = attack(model, x, y, generator=torch.Generator().manual_seed(8))
    assert torch.equal(one, two)
    assert not torch.equal(one, attack(model, x, y, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(attack(model, x, y), PGD(steps=1, seed=3)(model, x, y))


def test_the_global_generator_is_not_read() -> None:
    model, x, y = case()
    torch.manual_seed(1)
    one = PGD()(model, x, y)
    torch.manual_seed(2)
    assert torch.equal(one, PGD()(model, x, y))


def test_copies_draw_for_themselves() -> None:
    model, x, y = case()
    attack = PGD(0.04, 1, 0.01, "l2", best=True, mean=MEAN, std=STD, seed=3)
    x = to_input(x)
    attack(model, x, y)
    expected = PGD(0.04, 1, 0.01, "l2", best=True, mean=MEAN, std=STD, seed=3)
    expected(model, x, y)
    for other in (copy.deepcopy(attack), copy.deepcopy(attack), pickle.loads(pickle.dumps(PGD(seed=3)))):
        other(model, x.clamp(0, 1), y)
    assert repr(copy.deepcopy(attack)) == repr(attack)
    assert torch.equal(attack(model, x, y), expected(model, x, y))


# best=, loss=, targeted=.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_best_is_the_highest_of_all_iterates(norm: str, targeted: bool) -> None:
    model, x, y = case()
    # Steps so long that the loss goes up and down.
    eps = {"linf": 0.1, "l2": 1.5}[norm]
    start = (x + 0.2 * eps * torch.sin(torch.arange(x.numel(), dtype=F64)).view_as(x) / len(x[0])).clamp(0, 1)
    options = {"eps": eps, "step_size": 2 * eps, "norm": norm, "targeted": targeted}
    iterates = [start] + [PGD(steps=steps, **options)(model, x, y, start=start) for steps in range(1, 6)]
    sign = -1 if targeted else 1
    table = torch.stack([sign * losses(model, iterate, y) for iterate in iterates])
    expected = torch.stack(iterates)[table.argmax(0), torch.arange(len(x))]
    made = PGD(steps=5, best=True, **options)(model, x, y, start=start)
    assert len(table.argmax(0).unique()) > 1
    assert torch.allclose(made, expected, rtol=0, atol=1e-9)
    assert (sign * losses(model, made, y) >= table.amax(0) - 1e-9).all()


def test_targets_become_more_likely() -> None:
    model, x, y = case()
    target = (y + 1) % 10
    made = PGD(0.1, 20, 0.02, targeted=True)(model, x, target)
    assert (losses(model, made, target) < losses(model, x, target)).all()


def test_any_loss_of_each_example_is_climbed() -> None:
    model, x, y = case()

    def margin(logits: Tensor, y: Tensor) -> Tensor:
        right = F.one_hot(y, 10).bool()
        return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]

    start, made = x, x
    for _ in range(4):  # written out here
        made = made.detach().requires_grad_()
        margin(model(made), y).sum().backward()
        made = (x + (made + 0.01 * made.grad.sign() - x).clamp(-0.03, 0.03)).clamp(0, 1)
    actual = PGD(0.03, 4, 0.01, loss=margin)(model, x, y, start=start)
    assert torch.allclose(actual, made.detach(), rtol=0, atol=1e-9)
    assert not torch.allclose(actual, PGD(0.03, 4, 0.01)(model, x, y, start=start), rtol=0, atol=1e-3)


# mean= and std=.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_mean_and_std_equal_normalisation_inside_the_model(norm: str, kind: type) -> None:
    model, pixels, y = case()
    eps = {"linf": 0.03, "l2": 0.5}[norm]
    start = (pixels + eps / 100).clamp(0, 1)
    expected = PGD(eps, 5, eps / 4, norm)(nn.Sequential(Normalize(MEAN, STD), model).eval(), pixels, y, start=start)
    attack = PGD(eps, 5, eps / 4, norm, mean=kind(MEAN), std=kind(STD))
    actual = attack(model, to_input(pixels), y, start=to_input(start))
    assert torch.allclose(to_pixels(actual), expected, rtol=0, atol=1e-6)


# Batch normalization while attacking.


def test_eval_attacks_each_example_as_if_it_were_alone() -> None:
    model, x, y = case()
    start = (x + 0.01).clamp(0, 1)
    attack = PGD(steps=4)
    together = attack(model, x, y, start=start)
    alone = [attack(model, x[i : i + 1], y[i : i + 1], start=start[i : i + 1]) for i in range(len(x))]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-9)


def test_eval_attacks_the_model_in_evaluation_mode_whatever_its_mode() -> None:
    model, x, y = case()
    expected = PGD()(model, x, y)
    assert torch.equal(PGD()(model.train(), x, y), expected)


@pytest.mark.parametrize("bn", ["batch", "train"])
def test_batch_attacks_through_batch_statistics(bn: str) -> None:
    model, x, y = case()
    reference = copy.deepcopy(model)
    for layer in reference.modules():
        if isinstance(layer, _BatchNorm):  # without buffers torch itself normalises by the batch, also in evaluation
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False
    start = (x + 0.01).clamp(0, 1)
    expected = PGD(steps=4)(reference, x, y, start=start)
    actual = PGD(steps=4, bn=bn)(model, x, y, start=start)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(actual, PGD(steps=4)(model, x, y, start=start), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("bn", "bn_training", "dropout_training"),
    [("eval", False, False), ("batch", True, False), ("train", True, True)],
)
def test_modes_during_the_attack(bn: str, bn_training: bool, dropout_training: bool) -> None:
    layer, dropout = nn.BatchNorm1d(12), nn.Dropout()
    model = nn.Sequential(nn.Flatten(), layer, dropout, nn.Linear(12, 3))
    seen = []
    dropout.register_forward_pre_hook(lambda *_: seen.append((layer.training, dropout.training)))
    PGD(steps=2, bn=bn)(model, torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))
    assert seen == [(bn_training, dropout_training)] * 2


def test_attacking_asks_no_parameter_for_a_gradient_and_puts_all_back() -> None:
    model = lived_in(SMALL.build())
    world = World(model)
    with attacking(model, "batch"):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model(SMALL.example())
    assert world.unchanged()


# No trace.


@pytest.mark.parametrize("bn", ["eval", "batch", "train"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_leaves_no_trace(bn: str, norm: str, traced: None) -> None:
    model = lived_in(SMALL.build())
    x, y = SMALL.example().requires_grad_(), SMALL.labels()
    copies = x.detach().clone(), y.clone()
    world = World(model)
    PGD(0.1, 2, 0.05, norm, best=True, bn=bn)(model, x, y)
    assert world.unchanged()
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    assert x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("bn", ["eval", "batch", "train"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_leaves_no_trace_when_it_breaks_in_the_middle(bn: str, error: BaseException) -> None:
    model = nn.Sequential(lived_in(SMALL.build()), Bomb(2, error))
    world = World(model)
    with pytest.raises(type(error)):
        PGD(bn=bn)(model, SMALL.example(), SMALL.labels())
    assert world.unchanged()


def test_dropout_awake_in_the_attack_does_not_move_the_random_state() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(), nn.Linear(12, 3))
    world = World(model)
    PGD(steps=2, bn="train")(model, torch.full((4, 3, 2, 2), 0.5), torch.tensor([0, 1, 2, 0]))
    assert world.unchanged()


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_a_graph_that_the_caller_holds_can_still_go_backward(bn: str) -> None:
    model, x, y = case()
    loss = losses(model, x, y).sum()
    PGD(steps=2, bn=bn)(model, x, y)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_works_inside_no_grad() -> None:
    model, x, y = case()
    expected = PGD()(model, x, y)
    with torch.no_grad():
        assert torch.equal(PGD()(model, x, y), expected)


# Inputs of all sorts.


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_empty_batch_gives_an_empty_batch(norm: str) -> None:
    model, x, y = case()
    made = PGD(norm=norm)(model, x[:0], y[:0])
    assert made.shape == (0, 3, 8, 8)
    assert made.dtype == F64


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.flip(0)[::2].repeat_interleave(2, 0).flip(0)[1::2].expand(3, -1, -1, -1),
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
    ids=["channels_last", "transposed", "strided", "expanded"],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_layout_in_memory_does_not_matter(layout: object, norm: str) -> None:
    model, x, y = case()
    odd = layout(x)
    y = y[: len(odd)]
    expected = PGD(norm=norm)(model, odd.clone(memory_format=torch.contiguous_format), y)
    assert torch.allclose(PGD(norm=norm)(model, odd, y), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 12), (5, 2, 6), (5, 2, 2, 3), (5, 2, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inputs_of_any_rank(shape: tuple[int, ...], norm: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(shape)
    channels = shape[1]
    for options in ({}, {"mean": [0.5] * channels, "std": [0.5] * channels, "bounds": (0.5, 1.0)}):
        made = PGD(norm=norm, best=True, **options)(model, x, torch.tensor([0, 1, 2, 0, 1]))
        assert made.shape == shape
        assert not torch.equal(made, x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    model, x, y = case()
    assert torch.equal(PGD()(model, x, y.to(dtype)), PGD()(model, x, y))


# Refusals.

X, Y = SMALL.example(), SMALL.labels()
HIGHEST = X.max() == X


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.where(HIGHEST, torch.nan, X), Y, "x must lie in bounds=(0, 1), got values from nan to nan"),
        (torch.where(HIGHEST, torch.inf, X), Y, "x must lie in bounds=(0, 1), got values from 0.0"),
        (X + 1, Y, "x must lie in bounds=(0, 1), got values from 1"),
        (X - 0.5, Y, "or say mean= and std= if they are normalised"),
        ((255 * X).to(torch.uint8), Y, "x must be floating point, got torch.uint8: scale images to [0, 1] first"),
        (X[0, 0, 0], Y, "x must have shape (N, ...), got (8,)"),
        (X, Y[:5], "y must have shape (6,) to go with x (6, 3, 8, 8), got (5,)"),
        (X, Y[:, None], "y must have shape (6,) to go with x (6, 3, 8, 8), got (6, 1)"),
        (X, Y.float(), "y must hold integer labels, got torch.float32"),
        (X, F.one_hot(Y, 10), "y must have shape (6,) to go with x (6, 3, 8, 8), got (6, 10)"),
        (X, torch.full((6,), 10), "y must lie in 0 ... 9, got labels from 10 to 10"),
        (X, torch.tensor([0, 1, 2, 3, -1, 4]), "y must lie in 0 ... 9, got labels from -1 to 4"),
        (X.numpy(), Y, "x and y must be tensors, got a ndarray and a tensor (6,) of torch.int64"),
        (X, Y.tolist(), "x and y must be tensors, got a tensor (6, 3, 8, 8) of torch.float32 and a list of 6"),
    ],
)
def test_wrong_inputs_are_refused_with_what_came_and_what_is_expected(x: object, y: object, message: str) -> None:
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        PGD()(model, x, y)
    assert world.unchanged()


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start must have the shape of x, \(6, 3, 8, 8\), got \(3, 8, 8\)"):
        PGD()(SMALL.build(), X, Y, start=X[0])


def test_a_mean_of_another_number_of_channels_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"mean.*3"):
        PGD(mean=[0.5, 0.5], std=[0.2, 0.2])(SMALL.build(), X, Y)


def test_a_model_that_returns_no_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model must return logits \(6, classes\), got \(6, 8, 8, 8\)"):
        PGD()(SMALL.build()[:3], X, Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be finite and at least 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be finite and at least 0, got nan"),
        ({"eps": float("inf")}, "eps must be finite and at least 0, got inf"),
        ({"steps": -1}, "steps must be finite and at least 0, got -1"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"step_size": -1}, "step_size must be finite and at least 0, got -1"),
        ({"norm": "l1"}, "norm must be one of 'linf', 'l2', got 'l1'"),
        ({"norm": "Linf"}, "norm must be one of 'linf', 'l2', got 'Linf'"),
        ({"bn": "frozen"}, "bn must be 'eval', 'batch' or 'train', got 'frozen'"),
        ({"bounds": (1, 0)}, "bounds must be (low, high) with low < high, got (1, 0)"),
        ({"bounds": (0, 0)}, "bounds must be (low, high) with low < high, got (0, 0)"),
        ({"mean": [0.5]}, "mean and std go together: give both or neither"),
        ({"std": [0.5]}, "mean and std go together: give both or neither"),
        ({"mean": [0.5], "std": [0.0]}, "std must be above 0, got [0.0]"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PGD(**options)


def test_check_norm_says_what_there_is() -> None:
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', got 'l7'"):
        check_norm("l7")


# The small things.


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (PGD(), "PGD(eps=0.0313725, steps=10, step_size=0.00784314, norm='linf')"),
        (
            PGD(0.5, 7, 0.1, "l2", best=True, targeted=True, bn="train", seed=3, random_start=False),
            (
                "PGD(eps=0.5, steps=7, step_size=0.1, norm='l2', random_start=False, best=True, targeted=True, "
                "bn='train', seed=3)"
            ),
        ),
        (
            PGD(1, 1, 1, loss=losses, bounds=(-1, 1), mean=[0.5], std=[0.25]),
            "PGD(eps=1, steps=1, step_size=1, norm='linf', loss='losses', bounds=(-1.0, 1.0), mean=[0.5], std=[0.25])",
        ),
    ],
    ids=["defaults", "l2", "rest"],
)
def test_repr_says_what_is_not_by_default(attack: PGD, expected: str) -> None:
    assert repr(attack) == expected


def test_distance_is_the_norm_of_each_example() -> None:
    x = torch.zeros(2, 1, 1, 3)
    other = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, -2.0]]).view(2, 1, 1, 3)
    assert distance(x, other, "linf").tolist() == [4, 2]
    assert distance(x, other, "l2").tolist() == [5, 2]


def test_pgd_is_public() -> None:
    assert bnsurgery.PGD is PGD
    assert "PGD" in bnsurgery.__all__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_are_attacked_in_float32(dtype: torch.dtype) -> None:
    seen = []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return logits.sum(1)

    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).to(dtype)
    x = torch.full((2, 3, 3, 3), 0.5, dtype=dtype)
    # Ten steps of less than half a unit in the last place: in half precision itself none of them would move anything.
    small = torch.finfo(dtype).eps / 8
    made = PGD(1, 10, small, random_start=False, loss=loss)(model, x, torch.tensor([0, 1]))
    assert made.dtype == dtype
    assert (made != x).any()
    assert set(seen) == {torch.float32}


def test_small_gradients_do_not_shorten_the_steps_of_l2() -> None:
    x, y = torch.full((2, 3, 3, 3), 0.5), torch.tensor([0, 1])
    weight = torch.randn(4, 27, generator=torch.Generator().manual_seed(0))
    moved = []
    for scale in (1.0, 1e-12, 1e-30):
        made = PGD(0.1, 1, 0.1, "l2", random_start=False, loss=lambda logits, y: logits[:, 0])(
            Linear(weight * scale), x, y
        )
        moved.append((made - x).flatten(1).norm(dim=1))
    for length in moved:
        assert length == pytest.approx([0.1, 0.1], abs=1e-6)


class Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_gradients_that_are_not_numbers_leave_an_example_within_the_ball() -> None:
    x, y = torch.full((2, 3, 3, 3), 0.5), torch.tensor([0, 1])
    for norm in ("linf", "l2"):
        made = PGD(0.1, 2, 0.1, norm, loss=lambda logits, y: logits.sum(1) * math.nan)(Linear(torch.ones(4, 27)), x, y)
        assert torch.isfinite(made).all()


def test_inference_mode_is_refused_with_the_remedy() -> None:
    with torch.inference_mode(), pytest.raises(BNSurgeryError, match=r"leave torch\.inference_mode\(\)"):
        PGD()(SMALL.build(), SMALL.example(), SMALL.labels())
