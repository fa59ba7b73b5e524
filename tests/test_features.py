"""Input gradients, transfer and sets of features, against formulas worked out image by image."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from bnsurgery import PGD, BNSurgeryError, evaluate, keep_branch, split_bn, use_branch
from bnsurgery.analysis import (
    FeatureSet,
    GradientSimilarity,
    TransferMatrix,
    feature_dataset,
    input_gradient_similarity,
    outputs,
    transfer_matrix,
)
from networks import RESNET20, SHARED, SMALL, TIMM, Case, shake

ENGINES = ["fast", "plain"]


def cosine(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, mean: Any = 0.0, std: Any = 1.0) -> float:
    """Of one image in pixels (C, H, W), in NumPy's float64, by gradients of torch's of that image alone."""
    found = []
    for pixels in (x, x + noise):
        pixels = pixels.double().requires_grad_()
        F.cross_entropy(model(((pixels - mean) / std)[None]), y[None]).backward()
        found.append(reference.array(pixels.grad).ravel())
    return float(found[0] @ found[1] / np.sqrt((found[0] @ found[0]) * (found[1] @ found[1])))


def noise_of(x: Tensor, sigma: float, seed: int, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([sigma * torch.randn(part.shape, generator=generator) for part in torch.split(x, batch_size)])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [SMALL, RESNET20, SHARED, TIMM], ids=repr)
def test_cosines_are_those_of_each_image_by_itself(case: Case, engine: Any) -> None:
    model = case.build(torch.float64).train()
    x, y = case.example(7, torch.float64), case.labels(7)
    found = input_gradient_similarity(model, (x, y), sigma=0.05, batch_size=3, seed=4, engine=engine)
    alone = copy.deepcopy(model).eval()
    expected = [cosine(alone, *row) for row in zip(x, y, noise_of(x, 0.05, 4, 3), strict=True)]
    assert np.allclose(reference.array(found.cosines), expected, atol=1e-9)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-9)
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / math.sqrt(7), abs=1e-9)
    assert (found.examples, found.zero, found.nonfinite) == (7, 0, 0)
    assert model.training
    single = input_gradient_similarity(model.float(), (x.float(), y), sigma=0.05, batch_size=3, seed=4, engine=engine)
    assert np.allclose(reference.array(single.cosines), expected, atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_of_normalised_data_noise_and_gradients_are_of_the_pixels(engine: Any) -> None:
    model = SMALL.build(torch.float64)
    pixels, y = SMALL.example(5, torch.float64), SMALL.labels(5)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.5, 0.1]
    columns = [torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std)]
    x = (pixels - columns[0]) / columns[1]
    found = input_gradient_similarity(model, (x, y), mean=mean, std=std, engine=engine)
    noise = noise_of(x, 0.01, 0, 250)
    expected = [cosine(model.eval(), *row, *columns) for row in zip(pixels, y, noise, strict=True)]
    assert np.allclose(reference.array(found.cosines), expected, atol=1e-9)


def test_each_gradient_is_one_forward_and_one_backward_pass_of_a_batch() -> None:
    model = SMALL.build()
    calls: Counter[str] = Counter()
    model.register_forward_hook(lambda _module, inputs, _outputs: calls.update({f"forward {len(inputs[0])}": 1}))
    model.register_full_backward_hook(lambda *_: calls.update({"backward": 1}))
    input_gradient_similarity(model, (SMALL.example(10), SMALL.labels(10)), batch_size=4, engine="plain")
    assert calls == {"forward 4": 4, "forward 2": 2, "backward": 6}


class Dead(nn.Module):
    """No gradient for inputs whose first entry is below 0.3, and NaN above 0.7."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1].detach()
        x = torch.where(first < 0.3, x.detach(), x)
        return self.logits(x * torch.where(first > 0.7, math.nan, 1.0))


def test_what_has_no_gradient_is_left_out_and_counted() -> None:
    x = torch.rand(6, 4)
    x[:, 0] = torch.tensor([0.1, 0.5, 0.9, 0.5, 0.2, 0.5])
    found = input_gradient_similarity(Dead(), (x, torch.arange(6)), sigma=1e-4, engine="plain")
    assert (len(found.cosines), found.zero, found.nonfinite, found.examples) == (3, 2, 1, 6)
    none = input_gradient_similarity(Dead(), (x[:1], torch.arange(1)), sigma=1e-4, engine="plain")
    assert math.isnan(none.mean)
    assert none.record() == {"mean": None, "standard_error": None, "examples": 1, "zero": 1, "nonfinite": 0}
    assert repr(found).startswith("GradientSimilarity(mean=")


def test_gradients_of_the_smallest_size_have_their_cosine() -> None:
    model = nn.Sequential(nn.Linear(4, 10, bias=False)).double()
    x, y = torch.rand(3, 4, dtype=torch.float64), torch.arange(3)
    tiny = nn.Sequential(nn.Linear(4, 10, bias=False))
    with torch.no_grad():
        tiny[0].weight.copy_(model[0].weight)
        tiny[0].weight.mul_(1e-30)
    found = input_gradient_similarity(tiny, (x.float(), y), engine="plain")
    assert found.zero == found.nonfinite == 0
    assert bool((found.cosines > 0.99).all())


def test_similarity_leaves_the_model_and_the_random_state_alone() -> None:
    model = SMALL.build().train()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    for _ in range(2):
        input_gradient_similarity(model, [(SMALL.example(), SMALL.labels())])
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_similarity_is_of_the_branch_in_use() -> None:
    split = split_bn(SMALL.build())
    shake(split)
    data = SMALL.example(), SMALL.labels()
    with use_branch(split, "adv"):
        found = input_gradient_similarity(split, data)
    assert found.mean == pytest.approx(input_gradient_similarity(keep_branch(split, "adv"), data).mean, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be finite and above 0, got 0.0"),
        ({"sigma": math.nan}, "sigma must be finite and above 0, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_examples": 0}, "max_examples must be at least 1, got 0"),
        ({"mean": [0.5]}, "mean and std go together"),
        ({"mean": [0.5], "std": [0.0]}, "std must be above 0"),
        ({"mean": [0.5] * 2, "std": [0.5] * 2}, r"mean must hold 3 values to go with x \(6, 3, 8, 8\), got 2"),
        ({"engine": "slow"}, "engine must be"),
    ],
)
def test_wrong_arguments_of_similarity_are_said(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        input_gradient_similarity(SMALL.build(), (SMALL.example(), SMALL.labels()), **options)


def test_labels_out_of_range_and_no_data_are_said() -> None:
    with pytest.raises(ValueError, match=r"y must lie in 0 \.\.\. 9"):
        input_gradient_similarity(SMALL.build(), (SMALL.example(), SMALL.labels() + 10))
    for call in (
        lambda: input_gradient_similarity(SMALL.build(), []),
        lambda: transfer_matrix({"a": SMALL.build()}, [], attack=PGD()),
        lambda: feature_dataset(SMALL.build(), [], "random"),
    ):
        with pytest.raises(ValueError, match="data has no examples"):
            call()


def test_the_precision_of_the_model_and_the_range_of_its_inputs_count() -> None:
    model, x, y = SMALL.build(torch.float64), SMALL.example(5), SMALL.labels(5)
    found = input_gradient_similarity(model, (x, y))  # float32 images
    expected = [cosine(model.eval(), *row) for row in zip(x, y, noise_of(x, 0.01, 0, 250), strict=True)]
    assert np.allclose(reference.array(found.cosines), expected, atol=1e-9)
    with pytest.raises(ValueError, match=r"x must lie in bounds=\(0, 1\), got values from .* to 25"):
        input_gradient_similarity(model, (255 * x, y))
    assert input_gradient_similarity(model, (255 * x, y), bounds=(0, 255)).examples == 5


def test_batches_of_our_own_take_one_branch() -> None:
    split = split_bn(SMALL.build())
    data = SMALL.example(), SMALL.labels()
    with use_branch(split, torch.tensor([0, 1] * 3)):
        for call in (
            lambda: input_gradient_similarity(split, data),
            lambda: feature_dataset(split, data, "random", progress=False),
            lambda: outputs(split, data),
            lambda: evaluate(split, data, attacks=["pgd-1"], progress=False),
        ):
            with pytest.raises(BNSurgeryError, match="choose one branch by its name"):
                call()


# Transfer.


def three(x: Tensor) -> dict[str, nn.Module]:
    """Networks that put x in several classes."""
    models = {}
    for number, case in enumerate((SMALL, SHARED, SMALL)):
        torch.manual_seed(number)
        model = models[f"net {number}"] = shake(case.make()).eval()
        with torch.no_grad():
            [part for part in model.modules() if isinstance(part, nn.Linear)][-1].bias -= model(x).mean(0)
    return models


@pytest.mark.parametrize("engine", ENGINES)
def test_the_counts_are_those_of_each_pair(engine: Any) -> None:
    x = SMALL.example(60)
    models, attack = three(x), PGD(0.1, steps=3, step_size=0.05, random_start=False)
    with torch.no_grad():
        predicted = [model(x).argmax(1) for model in models.values()]
    y = torch.stack(predicted)[torch.arange(60) % 3, torch.arange(60)]  # so that each is right on some
    found = transfer_matrix(models, (x, y), attack=attack, batch_size=7, engine=engine)
    with torch.no_grad():
        right = [model(x).argmax(1) == y for model in models.values()]
    for i, source in enumerate(models.values()):
        made = attack(source, x, y)
        for j, target in enumerate(models.values()):
            with torch.no_grad():
                wrong = target(made).argmax(1) != y
            assert found.wrong[i][j] == int(wrong.sum())
            assert found.broken[i][j] == int((wrong & right[j]).sum())
            assert found.error[i][j] == pytest.approx(100 * float(wrong.double().mean()))
            if right[j].any():
                assert found.rate[i][j] == pytest.approx(100 * float(wrong[right[j]].double().mean()))
    assert found.clean_wrong == tuple(int((~flags).sum()) for flags in right)
    assert all(0 < wrong <= 40 for wrong in found.clean_wrong)
    assert all(sum(row) > 0 for row in found.broken)
    assert found.models == tuple(models)
    assert TransferMatrix.read(json.loads(json.dumps(found.record()))) == found


def test_the_start_is_the_same_for_each_model() -> None:
    x = SMALL.example(60)
    model = three(x)["net 0"]
    with torch.no_grad():
        data = x, model(x).argmax(1)
    noise = PGD(0.3, steps=1, step_size=1e-6)  # the random start is nearly all of it
    found = [
        transfer_matrix({"one": model, "same": copy.deepcopy(model)}, data, attack=noise, seed=seed).wrong
        for seed in range(4)
    ]
    assert all(wrong[0] == wrong[1] for wrong in found)
    assert len(set(found)) > 1  # it does depend on the start


def test_a_model_that_is_right_on_nothing_has_no_rate() -> None:
    found = TransferMatrix(("a",), 4, (4,), ((4,),), ((0,),))
    assert math.isnan(found.rate[0][0])
    assert found.error == ((100.0,),)


def test_wrong_arguments_of_transfer_are_said() -> None:
    data = SMALL.example(), SMALL.labels()
    with pytest.raises(ValueError, match="models must be a mapping from names to modules, at least one, got a list"):
        transfer_matrix([SMALL.build()], data, attack=PGD())
    with pytest.raises(ValueError, match="at least one, got none"):
        transfer_matrix({}, data, attack=PGD())
    with pytest.raises(TypeError, match=r"models\['a'\] must be a torch\.nn\.Module, got a int"):
        transfer_matrix({"a": 3}, data, attack=PGD())
    with pytest.raises(TypeError, match="an attack must be"):
        transfer_matrix({"a": SMALL.build()}, data, attack=3)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and None"):
        transfer_matrix({"a": SMALL.build()}, data, attack=PGD(), batch_size=0)
    attack = PGD(mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="normalisation of its own"):
        transfer_matrix({"a": SMALL.build()}, data, attack=attack, mean=[0.5], std=[0.5])
    with pytest.raises(BNSurgeryError, match="returned what is no input: x must lie in"):
        transfer_matrix({"a": SMALL.build()}, data, attack=lambda _model, x, _y: x + 2)


# Sets of features.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["random", "deterministic", "conflicting"])
def test_a_targeted_set_is_that_of_the_attack(kind: Any, engine: Any) -> None:
    model, x, y = SMALL.build().eval(), SMALL.example(20), SMALL.labels(20)
    made = feature_dataset(
        model, (x, y), kind, eps=1.0, steps=5, step_size=0.3, batch_size=8, seed=11, engine=engine,
        precision="auto" if engine == "plain" else "float32", progress=False,
    )  # fmt: skip
    if kind == "random":
        assert len(set(made.labels.tolist())) > 3
        assert made.labels.tolist() != y.tolist()
    else:
        assert made.labels.tolist() == ((y + 1) % 10).tolist()
    attack = PGD(1.0, 5, 0.3, "l2", random_start=False, targeted=True)
    expected = attack(model, x, made.labels)
    assert torch.allclose(made.images, expected, atol=1e-4)
    assert float((made.images - x).flatten(1).norm(dim=1).max()) <= 1.0 + 1e-4
    assert torch.equal(made.sources, y)
    with torch.no_grad():
        assert made.reached == int((model(made.images).argmax(1) == made.labels).sum())
    assert (made.kind, made.examples, made.nonfinite, made.distance) == (kind, 20, 0, None)
    assert made.record() == {"kind": kind, "examples": 20, "nonfinite": 0, "reached": made.reached, "distance": None}
    assert repr(made) == f"FeatureSet(kind={kind!r}, examples=20, nonfinite=0, reached={made.reached}, distance=None)"


def test_random_targets_are_of_all_classes_alike_and_go_by_the_seed() -> None:
    model, x, y = SMALL.build(), SMALL.example(400), SMALL.labels(400)
    first, again, other = (
        feature_dataset(model, (x, y), "random", steps=0, seed=seed, progress=False).labels for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    counts = torch.bincount(first, minlength=10).double()
    assert float((counts - 40).square().sum() / 40) < 27.9  # chi-squared with 9 degrees of freedom, 99.9 %
    assert 15 < int((first == y).sum()) < 70  # the own class too


class Linear(nn.Module):
    """Features are a known linear map of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.logits = nn.Linear(6, 3, bias=False), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.body(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_matching_walks_from_the_start_towards_the_features(engine: Any) -> None:
    model, x, y = Linear(), torch.rand(9, 6), torch.arange(9)
    starts = torch.rand(9, 6)
    options = {"steps": 4, "step_size": 0.05, "starts": starts, "batch_size": 4, "progress": False}
    precision = "auto" if engine == "plain" else "float32"
    made = feature_dataset(model, (x, y), "matched", **options, engine=engine, precision=precision)
    a = reference.array(model.body.weight)
    current, wanted = reference.array(starts), reference.array(x) @ a.T
    for _ in range(4):
        gradient = 2 * (current @ a.T - wanted) @ a
        current = np.clip(current - 0.05 * gradient / np.linalg.norm(gradient, axis=1, keepdims=True), 0, 1)
    assert np.allclose(reference.array(made.images), current, atol=1e-5)
    assert torch.equal(made.labels, y)
    before, after = (np.linalg.norm(z @ a.T - wanted, axis=1).sum() for z in (reference.array(starts), current))
    length = np.linalg.norm(wanted, axis=1).sum()
    assert made.distance == pytest.approx((before / length, after / length), rel=1e-4)
    assert made.distance[1] < made.distance[0]
    assert made.reached is None


@pytest.mark.parametrize("engine", ENGINES)
def test_matched_images_have_the_features_of_their_labels_image(engine: Any) -> None:
    model, x, y = RESNET20.build().eval(), RESNET20.example(6), RESNET20.labels(6)
    made = feature_dataset(model, (x, y), "matched", steps=60, engine=engine, batch_size=4, progress=False)
    assert made.distance is not None
    assert made.distance[1] < 0.5 * made.distance[0]
    assert float(made.images.min()) >= 0
    assert float(made.images.max()) <= 1
    # By default the starts are the inputs in another order: none of them is near where it began.
    assert float((made.images - x).flatten(1).norm(dim=1).mean()) > 1


def test_another_layer_can_be_matched() -> None:
    model, x, y = SMALL.build(), SMALL.example(), SMALL.labels()
    near = {
        layer: feature_dataset(model, (x, y), "matched", features=layer, steps=3, progress=False).distance
        for layer in ("3", "7", None)
    }
    assert near[None] == feature_dataset(model, (x, y), "matched", features="10", steps=3, progress=False).distance
    assert len(set(near.values())) == 3


def test_of_normalised_data_images_are_normalised_and_eps_is_of_the_pixels() -> None:
    model, pixels, y = SMALL.build(), SMALL.example(8), SMALL.labels(8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.5, 0.1]
    columns = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    x = (pixels - columns[0]) / columns[1]
    for kind in ("deterministic", "matched"):
        made = feature_dataset(model, (x, y), kind, eps=0.3, steps=3, mean=mean, std=std, progress=False)
        back = made.images * columns[1] + columns[0]
        assert float(back.min()) >= -1e-5
        assert float(back.max()) <= 1 + 1e-5
        if kind == "deterministic":
            assert float((back - pixels).flatten(1).norm(dim=1).max()) <= 0.3 + 1e-4
            assert float((back - pixels).flatten(1).norm(dim=1).min()) > 0.1


def test_what_is_not_finite_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    search = PGD.search

    def spoiled(self: PGD, *args: Any, **options: Any) -> Tensor:
        made = search(self, *args, **options)
        made[1] = math.nan
        return made

    monkeypatch.setattr(PGD, "search", spoiled)
    x, y = SMALL.example(), SMALL.labels()
    made = feature_dataset(SMALL.build(), (x, y), "deterministic", steps=1, engine="plain", progress=False)
    assert (made.examples, made.nonfinite, len(made.images), len(made.labels)) == (6, 1, 5, 5)
    assert torch.equal(made.sources, torch.cat([y[:1], y[2:]]))


class Spoiled(nn.Module):
    """Features that are not numbers where the first pixel is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.logits = nn.Linear(4, 3), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.body(x) * torch.where(x[:, :1] > 0.9, math.nan, 1.0))


def test_what_a_network_has_no_numbers_for_is_left_out_and_counted() -> None:
    x = 0.8 * torch.rand(6, 4)
    x[2, 0] = 0.95
    starts = 0.5 * torch.rand(6, 4)
    made = feature_dataset(Spoiled(), (x, torch.arange(6)), "matched", steps=2, starts=starts, progress=False)
    assert (made.examples, made.nonfinite, len(made.images)) == (6, 1, 5)
    assert made.labels.tolist() == [0, 1, 3, 4, 5]
    assert made.distance is not None
    assert all(math.isfinite(value) for value in made.distance)
    made = feature_dataset(Spoiled(), (x, torch.arange(6)), "deterministic", eps=0.01, steps=2, progress=False)
    assert (made.nonfinite, made.labels.tolist()) == (1, [1, 2, 4, 5, 6])


def test_starts_out_of_bounds_and_models_that_do_not_fit_are_named() -> None:
    x, y = SMALL.example(), SMALL.labels()
    with pytest.raises(ValueError, match=r"starts must lie in bounds=\(0\.0, 1\.0\), got values from 2 to 2"):
        feature_dataset(SMALL.build(), (x, y), "matched", starts=torch.full_like(x, 2.0), progress=False)
    few = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(ValueError, match=r"models\['few'\]: y must lie in 0 \.\.\. 1"):
        transfer_matrix({"all": SMALL.build(), "few": few}, (x, y), attack=PGD())


def test_making_a_set_leaves_the_model_and_the_random_state_alone() -> None:
    model = SMALL.build().train()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    for kind in ("random", "matched"):
        feature_dataset(model, (SMALL.example(), SMALL.labels()), kind, steps=2, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(input=x)


def test_a_layer_that_is_called_by_name_has_features_too() -> None:
    model, x, y = Named(), torch.rand(6, 4), torch.arange(6)
    plain = nn.Sequential(model.logits)
    made = [feature_dataset(net, (x, y), "matched", steps=3, progress=False) for net in (model, plain)]
    assert torch.equal(made[0].images, made[1].images)


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits, self.never = nn.Linear(4, 10), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


@pytest.mark.parametrize(
    ("model", "kind", "options", "error", "message"),
    [
        (SMALL.build(), "robust", {}, ValueError, "kind must be one of 'random', 'deter.* got 'robust'"),
        (SMALL.build(), "random", {"features": "7"}, ValueError, "features and starts go with kind='matched'"),
        (SMALL.build(), "matched", {"features": "11"}, ValueError, "features='11' matches nothing; the nearest"),
        (SMALL.build(), "matched", {"features": "*"}, ValueError, r"features='\*' must be one layer, and is 11, '0'"),
        (nn.Sequential(nn.Flatten()), "matched", {}, ValueError, "no linear layer: say features="),
        (SMALL.build(), "matched", {"starts": torch.rand(2, 3)}, ValueError, "starts must have the shape of the"),
        (SMALL.build(), "random", {"eps": -1.0}, ValueError, "eps must be finite and at least 0"),
        (SMALL.build(), "random", {"steps": -1}, ValueError, "steps must be finite and at least 0"),
        (SMALL.build(), "random", {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_a_set_are_said(model: Any, kind: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        feature_dataset(model, (SMALL.example(), SMALL.labels()), kind, progress=False, **options)


def test_a_layer_that_is_not_reached_is_said() -> None:
    with pytest.raises(BNSurgeryError, match="'never' is not reached by a forward pass: name another layer"):
        feature_dataset(Unreached(), (torch.rand(4, 4), torch.arange(4)), "matched", engine="plain", progress=False)


def test_a_network_trained_on_a_conflicting_set_tells_which_features_it_goes_by() -> None:
    """Two features: a large one, that an attack of this radius leaves alone, and a small one, that it turns."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    sign = 2.0 * y - 1
    x = torch.stack([0.5 + 0.4 * sign, 0.5 + 0.05 * sign], 1) + 0.01 * torch.randn(200, 2, generator=generator)
    small_alone = nn.Linear(2, 2)
    with torch.no_grad():
        small_alone.weight.copy_(torch.tensor([[0.0, -20.0], [0.0, 20.0]]))
        small_alone.bias.copy_(torch.tensor([10.0, -10.0]))
    made = feature_dataset(small_alone, (x.clamp(0, 1), y), "conflicting", eps=0.1, steps=20, progress=False)
    assert made.reached == 200
    assert torch.equal(made.labels, 1 - y)
    large = (made.images[:, 0] > 0.5).long()
    small = (made.images[:, 1] > 0.5).long()
    assert torch.equal(large, y)  # the large feature goes with the label before
    assert torch.equal(small, made.labels)  # the small one with the label that is trained


def test_records_are_plain() -> None:
    found = input_gradient_similarity(SMALL.build(), (SMALL.example(), SMALL.labels()))
    assert isinstance(found, GradientSimilarity)
    assert json.loads(json.dumps(found.record())) == found.record()
    made = feature_dataset(SMALL.build(), (SMALL.example(), SMALL.labels()), "matched", steps=1, progress=False)
    assert isinstance(made, FeatureSet)
    assert json.loads(json.dumps(made.record())) == made.record()
    assert outputs(SMALL.build(), (made.images, made.labels)).logits.shape == (6, 10)
