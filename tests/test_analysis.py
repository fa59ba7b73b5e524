"""Records about networks, against formulas written out by hand and NumPy."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsurgery import PGD, BNSurgeryError, fold_bn
from bnsurgery.analysis import Histogram, histogram, outputs, weight_shift
from bnsurgery.folding import Affine
from networks import AFFINE_FREE, SMALL
from test_attacks import World, lived_in


def test_the_weight_shift_is_the_mean_over_layers_of_differences_of_means() -> None:
    model = lived_in(SMALL.build())
    before = fold_bn(model)
    with torch.no_grad():
        for number, layer in enumerate(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            layer.weight.mul_(1 - 0.1 * number)
            layer.running_var.add_(0.3)
    after = fold_bn(model)
    shift = weight_shift(before, after)
    by_hand = [
        np.mean(after[name].weight.double().numpy()) - np.mean(before[name].weight.double().numpy()) for name in before
    ]
    assert list(shift.layers) == list(before)
    assert list(shift.layers.values()) == pytest.approx(by_hand)
    assert shift.mean == pytest.approx(np.mean(by_hand))
    assert shift.mean != 0


def test_layers_of_unlike_width_count_alike() -> None:
    def affine(*values: float) -> Affine:
        return Affine(torch.tensor(values), torch.zeros(len(values)))

    before = {"wide": affine(1, 1, 1, 1), "narrow": affine(1)}
    after = {"wide": affine(2, 2, 2, 2), "narrow": affine(-1)}
    assert weight_shift(before, after).mean == pytest.approx((1 - 2) / 2)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"b": (2,)}, "before and after must have the same layers, got 'a', 'b' in one alone"),
        ({"a": (3,)}, "'a' must have the same channels before and after, got (2,) and (3,)"),
    ],
)
def test_networks_of_other_layers_are_refused(after: dict[str, tuple[int, ...]], message: str) -> None:
    def folded(shapes: dict[str, tuple[int, ...]]) -> dict[str, Affine]:
        return {name: Affine(torch.ones(shape), torch.ones(shape)) for name, shape in shapes.items()}

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        weight_shift(folded({"a": (2,)}), folded(after))
    with pytest.raises(ValueError, match="before holds no layer"):
        weight_shift({}, {})


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    return SMALL.example(count), SMALL.labels(count)


def test_clean_outputs_are_the_models_in_evaluation_mode() -> None:
    model = lived_in(SMALL.build())
    x, y = data()
    world = World(model)
    found = outputs(model, (x, y), batch_size=7)
    assert world.unchanged()
    with torch.no_grad():
        logits = model.eval()(x)
    assert torch.allclose(found.logits, logits, atol=1e-5)
    assert torch.equal(found.labels, y)
    assert torch.allclose(found.confidence.float(), F.softmax(logits, 1).max(1).values, atol=1e-5)
    assert torch.allclose(found.loss.float(), F.cross_entropy(logits, y, reduction="none"), atol=1e-5)
    assert found.error == pytest.approx(100 * float((logits.argmax(1) != y).double().mean()))


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("kind", ["PGD", "callable", "torchattacks"])
def test_every_example_is_attacked_and_nothing_changes(kind: str, engine: str) -> None:
    model = lived_in(SMALL.build())
    x, y = data()
    attack = {
        "PGD": PGD(0.1, 5, 0.04),
        "callable": lambda net, images, labels: PGD(0.1, 5, 0.04)(net, images, labels),
        "torchattacks": torchattacks.PGD(model, eps=0.1, alpha=0.04, steps=5),
    }[kind]
    world = World(model)
    clean, under = outputs(model, (x, y)), outputs(model, (x, y), attack=attack, engine=engine)
    assert world.unchanged()
    assert bool((under.loss > clean.loss).all())
    wrong = clean.logits.argmax(1) != y
    assert bool(wrong.any())  # evaluate would have left these alone
    assert under.error >= clean.error


def test_the_seed_decides_and_batches_and_max_examples_are_kept_to() -> None:
    model = lived_in(SMALL.build())
    x, y = data()
    attack = PGD(0.1, 2, 0.05)
    one, same, other = (outputs(model, (x, y), attack=attack, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.logits, same.logits)
    assert not torch.equal(one.logits, other.logits)
    few = outputs(model, [(x[:10], y[:10]), (x[10:], y[10:])], max_examples=12)
    assert torch.equal(few.labels, y[:12])
    assert torch.allclose(few.logits, outputs(model, (x, y)).logits[:12], atol=1e-5)


def test_a_float64_model_takes_float32_data() -> None:
    model = SMALL.build(torch.float64)
    found = outputs(model, data(), attack=PGD(0.1, 2, 0.05))
    assert found.logits.dtype == torch.float32
    assert bool(torch.isfinite(found.logits).all())


def test_normalised_data_is_attacked_in_pixels() -> None:
    x, y = data()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    inner = lived_in(SMALL.build())

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixels: Tensor) -> Tensor:
            shape = (1, 3, 1, 1)
            return self.inner((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))

    normalised = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    for attack in (None, PGD(0.1, 3, 0.05)):
        expected = outputs(Inside(), (x, y), attack=attack, engine="plain")
        found = outputs(inner, (normalised, y), attack=attack, mean=mean, std=std, engine="plain")
        assert torch.allclose(found.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("values", [2.0, -1.0, math.nan])
def test_what_is_no_input_is_refused_before_and_after_the_attack(values: float) -> None:
    x, y = data(4)
    with pytest.raises(ValueError, match=r"x must lie in bounds=\(0, 1\)"):
        outputs(SMALL.build(), (torch.full_like(x, values), y))
    with pytest.raises(BNSurgeryError, match=r"returned what is no input: x must lie in bounds=\(0, 1\)"):
        outputs(SMALL.build(), (x, y), attack=lambda model, images, labels: torch.full_like(images, values))


def test_attacks_that_evaluate_refuses_are_refused_here_too() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(2 * x)

    model, normalised = SMALL.build(), {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    around = torchattacks.PGD(Around(model), steps=1)
    with pytest.raises(ValueError, match="is bound to a module around the model"):
        outputs(model, data(4), attack=around, **normalised)
    with pytest.raises(ValueError, match=r"with outputs\(mean=, std=\) attacks are given pixels: pass it without"):
        outputs(model, data(4), attack=PGD(mean=(0.5,) * 3, std=(0.5,) * 3), **normalised)


def test_outputs_show_their_shapes() -> None:
    assert repr(outputs(SMALL.build(), data(4))) == "Outputs(logits=(4, 10), labels=(4,))"


def test_a_model_without_parameters_to_normalise_by_runs_too() -> None:
    x, y = AFFINE_FREE.example(6), AFFINE_FREE.labels(6)
    assert outputs(AFFINE_FREE.build(), (x, y)).logits.shape[0] == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"mean": (0.5,)}, ValueError, "mean and std go together: give both or neither"),
        ({"max_examples": 0}, ValueError, "max_examples must be at least 1, got 0"),
        ({"attack": 3}, TypeError, "a callable attack(model, x, y), got 3"),
        ({"engine": "slow"}, ValueError, "engine must be 'fast', 'plain' or an Engine, got 'slow'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        outputs(SMALL.build(), data(4), **options)
    with pytest.raises(ValueError, match="data has no examples"):
        outputs(SMALL.build(), [])


NUMBERS = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=1, max_size=60)


@given(values=NUMBERS, bins=st.integers(1, 30))
def test_a_histogram_is_numpys(values: list[float], bins: int) -> None:
    bounds = (-20.0, 20.0)
    found = histogram(torch.tensor(values, dtype=torch.float64), bins=bins, bounds=bounds)
    edges = np.linspace(*bounds, bins + 1)
    expected, _ = np.histogram(values, edges)
    assert found.edges == pytest.approx(edges, abs=1e-12)
    on_an_edge = any(np.abs(edges - value).min() < 1e-9 for value in values)
    assert on_an_edge or list(found.counts) == expected.tolist()
    assert found.outside + sum(found.counts) == len(values)
    assert found.outside == sum(not -20 <= value <= 20 for value in values)
    assert sum(found.shares) == pytest.approx(100 * (len(values) - found.outside) / len(values))


def test_without_bounds_a_histogram_holds_all_values() -> None:
    found = histogram(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), bins=4)
    assert found == Histogram((1.0, 2.0, 3.0, 4.0, 5.0), (1, 1, 1, 1))
    same = histogram(torch.full((3,), 7.0), bins=1)
    assert same == Histogram((6.5, 7.5), (3,))


def test_a_histograms_record_is_json_that_reads_back() -> None:
    found = histogram(torch.tensor([0.1, 0.7, 9.0]), bins=2, bounds=(0, 1))
    read = json.loads(json.dumps(found.record()))
    assert read == {"edges": [0.0, 0.5, 1.0], "counts": [1, 1], "outside": 1}
    assert Histogram(**read).shares == found.shares


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "values must be finite and at least one, got 0, 0 of them finite"),
        ([1.0, float("nan")], {}, "values must be finite and at least one, got 2, 1 of them finite"),
        ([1.0], {"bins": 0}, "bins must be at least 1, got 0"),
        ([1.0], {"bounds": (0, math.inf)}, "bounds must be finite, (low, high) with low < high, got (0, inf)"),
        ([1.0], {"bounds": (1, 1)}, "bounds must be finite, (low, high) with low < high, got (1, 1)"),
    ],
    ids=str,
)
def test_a_histogram_of_nothing_is_refused(values: list[float], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        histogram(torch.tensor(values), **options)
