"""Re-estimated statistics are those of plain formulas, however the samples were split; or nothing has happened."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import ranks
from bnsurgery import (
    PGD,
    BNSurgeryError,
    BNSurgeryWarning,
    NoBatchNormError,
    freeze_except_bn,
    recalibrate_bn,
    reset_bn_stats,
)
from bnsurgery._moments import Joined, Moments, Sample
from networks import AFFINE_FREE, HEAVY, LIGHT, NETWORK_1D, NETWORK_3D, RESNET20, SHARED, SMALL, TIMM, Case, small
from reference import (
    batch_norm,
    batch_statistics,
    changed,
    differences,
    layer_inputs,
    moments,
    norm_layers,
    pooled,
    record,
    same,
    training_twin,
)
from strategies import splits

ESTIMATORS = ("pooled", "exact", "ema")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
F64 = torch.float64


def samples(case: Case, count: int, dtype: torch.dtype = F64) -> Tensor:
    return case.example(count, dtype)


def found(model: nn.Module) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        name: (layer.running_mean.double().numpy().copy(), layer.running_var.double().numpy().copy())
        for name, layer in norm_layers(model).items()
        if layer.running_mean is not None
    }


def assert_close(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, (mean, variance) in expected.items():
        scale = np.sqrt(variance)
        assert np.abs(got[name][0] - mean).max() <= tolerance * max(np.abs(mean).max(), scale.max()), name
        assert np.abs(got[name][1] / variance - 1).max() <= tolerance, name


def whole_set(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """One training-mode pass over everything as a single batch, momentum 1: torch's own statistics of the whole set."""
    twin = training_twin(model, momentum=1.0)
    with torch.no_grad():
        twin(x)
    return found(twin)


class Flaky:
    """Batches, and then an exception."""

    def __init__(self, batches: list[Tensor], error: BaseException) -> None:
        self.batches, self.error = batches, error

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        raise self.error


class Skipping(nn.Module):
    """A model with a BN layer that nothing ever reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Swaying(nn.Module):
    """A model that takes its BN layers in an order that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.low(x) if x.mean() < 0 else self.high(x)


# reset_bn_stats


@pytest.mark.parametrize("case", [*LIGHT, TIMM], ids=repr)
def test_reset_gives_the_initial_statistics_in_place_and_changes_nothing_else(case: Case) -> None:
    model = case.build()
    before = record(model)
    assert reset_bn_stats(model) == list(norm_layers(model))
    for layer in norm_layers(model).values():
        fresh = nn.BatchNorm1d(layer.num_features)
        assert all(same(getattr(layer, name), getattr(fresh, name)) for name in STATISTICS)
    assert {name.rsplit(".", 1)[1] for name in differences(before, record(model))} == {f"{n} value" for n in STATISTICS}


def test_reset_takes_names_and_globs_of_layers() -> None:
    model = RESNET20.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert reset_bn_stats(model, layers=["norm1", "stages.2.*.shortcut.*"]) == ["norm1", "stages.2.0.shortcut.1"]
    names = {f"{layer}.{name}" for layer in ("norm1", "stages.2.0.shortcut.1") for name in STATISTICS}
    assert changed(before, model.state_dict()) == names
    assert reset_bn_stats(model, layers="norm1") == ["norm1"]


def test_reset_of_an_unknown_layer_lists_the_nearest_names_and_changes_nothing() -> None:
    model = RESNET20.build()
    before = record(model)
    with pytest.raises(ValueError, match=r"layers='nrom1' matches nothing; the nearest names are 'norm1'"):
        reset_bn_stats(model, layers=["norm1", "nrom1"])
    assert differences(before, record(model)) == []


def test_reset_goes_by_the_buffers_and_not_by_the_flag() -> None:
    model = SMALL.build()
    for layer in norm_layers(model).values():
        layer.track_running_stats = False
    assert reset_bn_stats(model) == ["1", "4", "8"]
    assert model[4].running_var.tolist() == [1] * 12
    assert model[4].track_running_stats is False


def test_reset_of_layers_without_statistics_is_a_no_op_that_lists_them() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    model[0].running_mean.fill_(5)
    with pytest.warns(BNSurgeryWarning, match=r"^no running statistics to reset in '1'$") as seen:
        assert reset_bn_stats(model) == ["0"]
    assert seen[0].filename == __file__
    assert model[0].running_mean.tolist() == [0] * 3


def test_reset_without_bn_is_refused_or_on_request_warned_about() -> None:
    with pytest.raises(NoBatchNormError, match="Linear has no batch-normalization layer"):
        reset_bn_stats(nn.Linear(2, 2))
    with pytest.warns(BNSurgeryWarning, match="Linear has no batch-normalization layer"):
        assert reset_bn_stats(nn.Linear(2, 2), strict=False) == []


def test_reset_zeroes_the_counter_of_a_layer_that_averages_over_all_batches() -> None:
    model = small(momentum=None).train()
    model(SMALL.example())
    reset_bn_stats(model)
    model(SMALL.example())
    mean = batch_statistics(model[0](SMALL.example()))[0]
    assert model[1].running_mean.numpy() == pytest.approx(mean, abs=1e-6)


# moments


@given(st.data(), st.integers(2, 12), st.floats(-1e4, 1e4))
def test_merged_moments_are_those_of_all_elements_however_grouped(
    data: st.DataObject, count: int, offset: float
) -> None:
    x = torch.rand(count, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(count)) + offset
    parts = [Moments.of(part) for part in x.split(data.draw(splits(count)))]
    order = data.draw(st.permutations(parts))
    total = order[0]
    for part in order[1:]:
        total = total.merge(part)
    mean, variance = moments(x)
    assert total.count == 2 * count
    assert total.mean.numpy() == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert total.variance(unbiased=True).numpy() == pytest.approx(variance, rel=1e-6)
    assert total.variance(unbiased=False).numpy() == pytest.approx(variance * (2 * count - 1) / (2 * count), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_of_low_precision_inputs_are_taken_in_more(dtype: torch.dtype) -> None:
    x = (torch.rand(64, 2, 64, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    mean, variance = moments(x)
    got = Moments.of(x)
    assert got.mean.dtype == got.m2.dtype == F64
    assert got.mean.numpy() == pytest.approx(mean, rel=1e-6)
    assert got.variance(unbiased=True).numpy() == pytest.approx(variance, rel=1e-4)


# the estimators against independent references


@pytest.mark.parametrize("case", [*LIGHT, *HEAVY], ids=repr)
def test_pooled_statistics_are_the_moments_of_all_that_each_layer_saw(case: Case) -> None:
    model = case.build(F64)
    batches = list(samples(case, 7).split([3, 2, 2]))
    expected, inputs = pooled(model, batches), layer_inputs(model, batches)
    result = recalibrate_bn(model, batches)
    assert_close(found(model), expected, 1e-10)
    assert (result.layers, result.kept) == (tuple(norm_layers(model)), ())
    assert (result.batches, result.left_out, result.estimator) == (3, 0, "pooled")
    elements = {name: sum(x.numel() // x.shape[1] for x in parts) for name, parts in inputs.items()}
    assert result.elements == elements


FIRST = {SMALL: "1", SHARED: "bn0", RESNET20: "norm1", NETWORK_1D: "1", NETWORK_3D: "1", AFFINE_FREE: "1"}


@settings(max_examples=15)
@pytest.mark.parametrize("case", FIRST, ids=repr)
@given(data=st.data())
def test_pooled_statistics_of_a_first_layer_are_the_same_for_any_split(case: Case, data: st.DataObject) -> None:
    x = samples(case, 9)
    model = case.build(F64)
    recalibrate_bn(model, x.split(data.draw(splits(9, least=2))))
    name = FIRST[case]
    mean, variance = moments(layer_inputs(model, [x])[name][0])
    assert_close({name: found(model)[name]}, {name: (mean, variance)}, 1e-10)


@settings(max_examples=8)
@pytest.mark.parametrize("case", LIGHT, ids=repr)
@given(data=st.data())
def test_exact_statistics_of_every_layer_are_those_of_one_batch_for_any_split(case: Case, data: st.DataObject) -> None:
    x = samples(case, 6)
    model = case.build(F64)
    batches = x.split(data.draw(splits(6)))
    result = recalibrate_bn(model, batches, estimator="exact")
    assert_close(found(model), pooled(model, [x]), 1e-8)
    if case is not SHARED:
        assert_close(found(model), whole_set(model, x), 1e-8)
    assert (result.batches, result.left_out, result.kept) == (len(batches), 0, ())


@pytest.mark.parametrize("case", [case for case in HEAVY if case.name not in ("densenet121", "googlenet")], ids=repr)
def test_exact_statistics_of_a_deep_network_are_those_of_one_batch(case: Case) -> None:
    model = case.build(F64)
    x = samples(case, 5)
    recalibrate_bn(model, x.split([3, 1, 1]), estimator="exact")
    assert_close(found(model), whole_set(model, x), 1e-8)


def test_a_deep_layers_pooled_statistics_do_depend_on_the_split_and_exact_ones_are_the_remedy() -> None:
    x = samples(SMALL, 12)
    results = {}
    for estimator in ("pooled", "exact"):
        models = [SMALL.build(F64) for _ in range(2)]
        for model, sizes in zip(models, ([12], [2] * 6), strict=True):
            recalibrate_bn(model, x.split(sizes), estimator=estimator)
        results[estimator] = [found(model)["8"][1] for model in models]
    assert np.abs(results["pooled"][0] / results["pooled"][1] - 1).max() > 1e-2
    assert np.abs(results["exact"][0] / results["exact"][1] - 1).max() < 1e-8


@pytest.mark.parametrize("case", [*LIGHT, *HEAVY], ids=repr)
def test_ema_is_torchs_own_loop_bit_for_bit(case: Case) -> None:
    model = case.build()
    batches = list(samples(case, 7, torch.float32).split([3, 2, 2]))
    twin = training_twin(model)
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    recalibrate_bn(model, batches, estimator="ema")
    assert changed(twin.state_dict(), model.state_dict()) == set()


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_ema_follows_each_layers_momentum(momentum: float | None) -> None:
    model = small(momentum=momentum)
    twin = training_twin(model)
    batches = list(SMALL.example().split(3))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    recalibrate_bn(model, batches, estimator="ema")
    assert changed(twin.state_dict(), model.state_dict()) == set()
    assert model[1].momentum == momentum


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_momentum_has_no_part_in_the_moments(estimator: str, momentum: float | None) -> None:
    models = [SMALL.build(F64) for _ in range(2)]
    for layer in norm_layers(models[1]).values():
        layer.momentum = momentum
    for model in models:
        recalibrate_bn(model, samples(SMALL, 6).split(3), estimator=estimator)
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()
    assert models[1][1].momentum == momentum


@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_the_former_statistics_have_no_part_in_the_moments(estimator: str) -> None:
    models = [SMALL.build(F64) for _ in range(2)]
    for layer in norm_layers(models[1]).values():
        layer.running_mean.fill_(1e3)
        layer.running_var.fill_(1e-3)
    for model in models:
        recalibrate_bn(model, samples(SMALL, 6).split(3), estimator=estimator)
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()


def test_with_the_exact_statistics_evaluation_is_training_on_the_whole_set() -> None:
    model, x = SMALL.build(F64), samples(SMALL, 40)
    recalibrate_bn(model, x.split(7), estimator="exact")
    got = model[:2](x) if not model.training else model.eval()[:2](x)
    first = model[0](x)
    mean, variance = moments(first)
    expected = batch_norm(first, mean, variance, model[1].weight, model[1].bias)
    assert got.detach().numpy() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_models_get_statistics_as_good_as_their_dtype(estimator: str, dtype: torch.dtype) -> None:
    model = NETWORK_1D.build(dtype)
    batches = list(samples(NETWORK_1D, 64, dtype).split(16))
    mean, variance = moments(*layer_inputs(model, batches)["1"])
    for layer in norm_layers(model).values():
        layer.momentum = None
    reset_bn_stats(model)
    recalibrate_bn(model, batches, estimator=estimator)
    bn = model[1]
    assert bn.running_mean.dtype == bn.running_var.dtype == dtype
    rounding = torch.finfo(dtype).eps * (1 if estimator != "ema" else 8)
    assert bn.running_mean.double().numpy() == pytest.approx(mean, rel=rounding, abs=rounding)
    assert bn.running_var.double().numpy() == pytest.approx(variance, rel=rounding if estimator != "ema" else 0.05)


# what it leaves alone


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", LIGHT, ids=repr)
def test_only_the_statistics_change_whatever_state_the_model_is_in(case: Case, estimator: str) -> None:
    model = case.build().train()
    F.cross_entropy(model(case.example()), case.labels()).backward()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    next(iter(norm_layers(model).values())).track_running_stats = False
    before, random_state = record(model), torch.get_rng_state()
    recalibrate_bn(model, case.example().split(3), estimator=estimator)
    statistics = {f"{layer}.{name} value" for layer in norm_layers(model) for name in STATISTICS}
    assert set(differences(before, record(model))) == statistics
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_inputs_are_left_as_they_were(estimator: str) -> None:
    x = SMALL.example()
    values = x.clone()
    recalibrate_bn(SMALL.build(), x.split(3), estimator=estimator)
    assert same(x, values)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dropout_is_off_and_no_random_number_is_drawn(estimator: str) -> None:
    plain = SMALL.build(F64)
    model = nn.Sequential(*[part for layer in copy.deepcopy(plain) for part in (layer, nn.Dropout(0.5))]).train()
    state = torch.get_rng_state()
    for each in (plain, model):
        recalibrate_bn(each, samples(SMALL, 6).split(3), estimator=estimator)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found(model)) == ["2", "8", "16"]
    for one, other in zip(found(plain).values(), found(model).values(), strict=True):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_flag_flipped_while_the_buffers_stay_changes_nothing_about_the_result(estimator: str) -> None:
    models = [SMALL.build() for _ in range(2)]
    for layer in norm_layers(models[1]).values():
        layer.track_running_stats = False
    for model in models:
        recalibrate_bn(model, SMALL.example().split(3), estimator=estimator)
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()
    assert [layer.track_running_stats for layer in norm_layers(models[1]).values()] == [False] * 3


@pytest.mark.parametrize("stats", ["update", "frozen", "batch"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_under_a_freeze_gets_the_same_statistics_and_stays_frozen(estimator: str, stats: str) -> None:
    models = [SMALL.build().train() for _ in range(2)]
    freeze_except_bn(models[1], stats=stats)
    for model in models:
        recalibrate_bn(model, SMALL.example().split(3), estimator=estimator)
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()
    models[1].train()
    assert all(layer.training == (stats != "frozen") for layer in norm_layers(models[1]).values())


@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_the_counter_becomes_the_number_of_batches(estimator: str) -> None:
    model = SHARED.build()
    recalibrate_bn(model, SHARED.example().split(2), estimator=estimator)
    assert {int(layer.num_batches_tracked) for layer in norm_layers(model).values()} == {3}


def test_the_counter_of_ema_goes_on_from_where_it_was() -> None:
    model = SMALL.build()
    recalibrate_bn(model, SMALL.example().split(2), estimator="ema")
    assert {int(layer.num_batches_tracked) for layer in norm_layers(model).values()} == {7 + 3}


# all or nothing


def failing_forward(error: BaseException) -> Callable[[nn.Module, Tensor], None]:
    calls = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        calls.append(1)
        if len(calls) > 2:
            raise error

    return forward


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["loader", "forward", "attack"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", [SMALL, SHARED], ids=repr)
def test_an_exception_in_the_middle_leaves_the_model_bit_identical(
    case: Case, estimator: str, where: str, error: BaseException
) -> None:
    model = case.build().train()
    F.cross_entropy(model(case.example()), case.labels()).backward()
    norm_layers(model).popitem()[1].training = False
    before = record(model)
    batches: Any = list(case.example().split(2))
    options: dict[str, Any] = {}
    if where == "loader":
        batches = Flaky(batches, error)
    elif where == "forward":
        options["forward"] = failing_forward(error)
    else:
        batches = list(zip(batches, case.labels().split(2), strict=True))
        calls: list[Tensor] = []

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            calls.append(x)
            model.train()
            model(x)
            if len(calls) > 2:
                raise error
            return x

        options["attack"] = attack
    with pytest.raises(type(error)):
        recalibrate_bn(model, batches, estimator=estimator, **options)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_loader_is_an_error_and_leaves_the_model_bit_identical(estimator: str) -> None:
    model = SMALL.build().train()
    before = record(model)
    with pytest.raises(ValueError, match=r"^data yielded no batch$"):
        recalibrate_bn(model, [], estimator=estimator)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", [SMALL, SHARED, NETWORK_3D], ids=repr)
def test_inputs_that_are_not_finite_leave_the_model_bit_identical(case: Case, estimator: str, value: float) -> None:
    model = case.build().train()
    before = record(model)
    x = case.example()
    x[-1, 0, 0] = value
    message = r"the statistics of '.*' \(BatchNorm.d\) over \d+ values per channel are not finite: look for NaN or inf"
    with pytest.raises(BNSurgeryError, match=message):
        recalibrate_bn(model, x.split(2), estimator=estimator)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_statistics_that_overflow_in_the_models_dtype_leave_it_bit_identical(estimator: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    before = record(model)
    x = torch.tensor([[-400.0, 1.0], [400.0, 2.0]], dtype=torch.float16)  # variance 320,000; float16 ends at 65,504
    with pytest.raises(BNSurgeryError, match="not finite"):
        recalibrate_bn(model, [x], estimator=estimator)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_data_with_one_value_per_channel_in_all_is_an_error_and_leaves_the_model_bit_identical(estimator: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = record(model)
    if estimator == "exact":
        message = r"'0' \(BatchNorm1d\) over 1 values per channel are not finite: .* more data"
        with pytest.raises(BNSurgeryError, match=message):
            recalibrate_bn(model, [torch.rand(1, 3)], estimator=estimator)
    else:
        with (
            pytest.warns(BNSurgeryWarning, match="one value per channel"),
            pytest.raises(ValueError, match=r"no batch but 1 with one value per channel, which were left out"),
        ):
            recalibrate_bn(model, [torch.rand(1, 3)], estimator=estimator)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_of_no_samples_is_no_batch(estimator: str) -> None:
    models = [SMALL.build(F64) for _ in range(2)]
    x = samples(SMALL, 6)
    recalibrate_bn(models[0], [x[:3], x[3:]], estimator=estimator)
    recalibrate_bn(models[1], [x[:3], x[:0], x[3:]], estimator=estimator)
    assert_close(found(models[1]), found(models[0]), 1e-12)


def test_inputs_of_another_width_than_a_layers_leave_the_model_bit_identical() -> None:
    # Training-mode BN without parameters and statistics takes any width: nothing but the buffers' shape tells.
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(3, affine=False))
    before = record(model)
    with pytest.raises((ValueError, BNSurgeryError, RuntimeError)):
        recalibrate_bn(model, [torch.rand(4, 5)])
    assert differences(before, record(model)) == []


# batches with one value per channel


@pytest.mark.parametrize("estimator", ["pooled", "ema"])
def test_a_batch_with_one_value_per_channel_is_left_out_with_one_warning(estimator: str) -> None:
    models = [SMALL.build() for _ in range(2)]
    x = SMALL.example()
    message = r"a BN layer was given one value per channel, \(1, 16\), which has no variance: that batch is left out"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = recalibrate_bn(models[0], x.split([2, 1, 2, 1]), estimator=estimator)
    assert len(seen) == 1
    assert issubclass(seen[0].category, BNSurgeryWarning)
    with pytest.raises(BNSurgeryWarning, match=message):
        warnings.warn(seen[0].message, stacklevel=1)
    assert seen[0].filename == __file__
    assert (result.batches, result.left_out) == (2, 2)
    recalibrate_bn(models[1], [x[:2], x[3:5]], estimator=estimator)
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()


def test_exact_uses_every_sample_whatever_the_size_of_its_batch() -> None:
    model = SMALL.build(F64)
    x = samples(SMALL, 4)
    result = recalibrate_bn(model, x.split(1), estimator="exact")
    assert (result.batches, result.left_out) == (4, 0)
    assert_close(found(model), whole_set(model, x), 1e-8)


# layers not reached, or without statistics


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_never_reached_keeps_its_statistics_and_is_listed(estimator: str) -> None:
    model = Skipping()
    model.unused.running_mean.fill_(5)
    model.unused.num_batches_tracked.fill_(5)
    before = record(model)
    result = recalibrate_bn(model, [torch.rand(4, 3)], estimator=estimator)
    assert (result.layers, result.kept) == (("used",), ("unused",))
    assert list(result.elements) == ["used"]
    assert set(differences(before, record(model))) == {f"used.{name} value" for name in STATISTICS}


@pytest.mark.parametrize("estimator", ["pooled", "ema"])
def test_a_layer_without_statistics_is_listed_as_kept(estimator: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    x = torch.rand(8, 3, dtype=F64)
    result = recalibrate_bn(model.double(), [x], estimator=estimator)
    assert (result.layers, result.kept) == (("1",), ("0",))
    assert model[0].running_mean is None
    assert model[0].track_running_stats is False
    if estimator == "pooled":
        expected = moments(torch.from_numpy(batch_norm(x, *batch_statistics(x))))
        assert_close(found(model), {"1": expected}, 1e-10)


def test_exact_refuses_a_layer_without_statistics_by_name() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = record(model)
    message = r"estimator='exact' needs running statistics, and '1' \(BatchNorm1d\) has none"
    with pytest.raises(BNSurgeryError, match=message):
        recalibrate_bn(model, [torch.rand(4, 3)], estimator="exact")
    assert differences(before, record(model)) == []


def test_exact_refuses_a_model_whose_course_depends_on_the_data_and_pooled_takes_it() -> None:
    model = Swaying()
    before = record(model)
    x = torch.rand(4, 3)
    message = r"order of the layers depends on the data \('low' \(BatchNorm1d\), 'high' .*\): use estimator='pooled'"
    with pytest.raises(BNSurgeryError, match=message):
        recalibrate_bn(model, [x - 5, x + 5], estimator="exact")
    assert differences(before, record(model)) == []
    recalibrate_bn(model, [x - 5, x + 5])
    assert_close(found(model), {"low": moments(x - 5), "high": moments(x + 5)}, 1e-5)


class Paths(nn.Module):
    """A path for each size of batch, some twice over the same layer, over layers of several widths and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.avg_pool2d(torch.cat([x, x**2], 1), 2)
        one, two = self.one, self.two
        for layer in ((), (one,), (two,), (one, two), (two, one), (one, two, one), (two, two))[len(x) % 7]:
            x = layer(x**3 + 1)
        return x


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(2, 15), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_layers_that_only_some_batches_reach_pool_what_they_see(sizes: list[int], seed: int) -> None:
    x = torch.randn(sum(sizes), 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))
    model, batches = Paths().double(), list(x.split(sizes))
    inputs = {name: parts for name, parts in layer_inputs(model, batches).items() if parts}
    result = recalibrate_bn(model, batches)
    assert result.elements == {
        name: sum(part.numel() // part.shape[1] for part in parts) for name, parts in inputs.items()
    }
    got = {name: value for name, value in found(model).items() if name in inputs}
    assert_close(got, {name: moments(*parts) for name, parts in inputs.items()}, 1e-9)


def test_what_writes_to_the_buffers_later_in_a_batch_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    model[2].running_mean = model[0].running_mean  # the second layer's is what it will hold
    batches = list(torch.rand(20, 3, dtype=F64).split(5))
    inputs = layer_inputs(model, batches)

    def twice(network: nn.Module, batch: Tensor) -> None:
        network(batch)
        for buffer in network.buffers():
            buffer.fill_(7)

    recalibrate_bn(model, batches, forward=twice)
    (_, first), (mean, second) = moments(*inputs["0"]), moments(*inputs["2"])
    assert_close(found(model), {"0": (mean, first), "2": (mean, second)}, 1e-10)


def test_statistics_on_lent_buffers_are_read_while_they_are_lent() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    batches = list(torch.rand(20, 3, dtype=F64).split(5))
    expected = pooled(model, batches)

    def lent(network: nn.Module, batch: Tensor) -> Tensor:
        values = {name: value.clone() for name, value in network.state_dict().items()}
        return torch.func.functional_call(network, values, (batch,))

    recalibrate_bn(model, batches, forward=lent)
    assert_close(found(model), expected, 1e-10)


def test_a_batch_that_is_left_out_leaves_no_nan_behind() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).double()
    batches = list(torch.rand(12, 3, 4, 4, dtype=F64).split(4))
    expected = pooled(model, batches)
    bad = torch.full((1, 3, 4, 4), torch.inf, dtype=F64)
    with pytest.warns(BNSurgeryWarning, match="one value per channel"):
        result = recalibrate_bn(model, [batches[0], bad, *batches[1:]])
    assert (result.batches, result.left_out) == (3, 1)
    assert_close(found(model), expected, 1e-10)


class Halting(nn.Module):
    """Puts a layer into evaluation mode itself, as where a stage is to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stays, self.moves = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.stays.eval()
        return self.moves(self.stays(x))


def test_a_layer_that_evaluates_by_itself_normalises_by_what_it_had() -> None:
    model = Halting().double()
    with torch.no_grad():
        model.stays.running_mean.fill_(0.3)
        model.stays.running_var.fill_(0.2)
    x = torch.rand(20, 3, dtype=F64)
    evaluated = F.batch_norm(x, model.stays.running_mean.clone(), model.stays.running_var.clone())
    recalibrate_bn(model, x.split(5))
    assert_close(found(model), {"stays": moments(x), "moves": moments(evaluated)}, 1e-10)


class Reading(nn.Module):
    """Reads the running statistics of a layer itself, before and after it has run and in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.seen: list[Tensor] = []
        self.first.register_forward_hook(lambda layer, _inputs, _outputs: self.seen.append(layer.running_var.clone()))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        before = F.batch_norm(x, self.first.running_mean, self.first.running_var)
        self.first(input=x)  # by name
        after = F.batch_norm(x, self.first.running_mean, self.first.running_var)
        return self.second(torch.full_like(x, math.nan) if self.fails else before + after)


def reading() -> Reading:
    model = Reading().double()
    with torch.no_grad():
        model.first.running_mean.fill_(0.3)
        model.first.running_var.fill_(0.2)
    return model


def test_running_statistics_that_others_read_are_those_that_were() -> None:
    model = reading()
    x = torch.rand(20, 3, dtype=F64)
    evaluated = 2 * F.batch_norm(x, model.first.running_mean.clone(), model.first.running_var.clone())
    recalibrate_bn(model, x.split(5))
    assert_close(found(model), {"first": moments(x), "second": moments(evaluated)}, 1e-10)
    assert len(model.seen) == 4
    assert all(torch.equal(own, torch.full((3,), 0.2, dtype=F64)) for own in model.seen)


def test_a_layer_that_fails_has_its_own_statistics_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reading()
    before = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}

    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(F, "batch_norm", fail)
        model.forward = lambda x: model.first(x)  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="out of luck"):
            recalibrate_bn(model, [torch.rand(5, 3, dtype=F64)])
    for name, buffer in model.named_buffers():
        assert id(buffer) == before[name][0]
        assert torch.equal(buffer, before[name][1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_called_by_name_is_seen(estimator: str) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=x)

    x = torch.rand(20, 3, dtype=F64)
    expected = nn.Sequential(nn.BatchNorm1d(3)).double()
    model = ByName().double()
    for own in (model, expected):
        recalibrate_bn(own, x.split(5), estimator=estimator)
    assert torch.equal(model.bn.running_mean, expected[0].running_mean)
    assert torch.equal(model.bn.running_var, expected[0].running_var)


def test_joined_moments_lie_in_memory_of_their_own() -> None:
    total: dict[str, Moments] = {}
    joined = Joined(total)
    joined.add({name: Sample(8, torch.rand(size), torch.rand(size)) for name, size in (("a", 3), ("b", 50))})
    joined.end()
    for name, size in (("a", 3), ("b", 50)):
        for values in (total[name].mean, total[name].m2):
            assert values.untyped_storage().nbytes() == 8 * size


# kinds of data and of models


def test_only_so_many_batches_are_taken_as_asked() -> None:
    taken: list[int] = []

    def loader() -> Iterator[Tensor]:
        for index, batch in enumerate(samples(SMALL, 10).split(2)):
            taken.append(index)
            yield batch

    models = [SMALL.build(F64) for _ in range(2)]
    result = recalibrate_bn(models[0], loader(), batches=3)
    recalibrate_bn(models[1], samples(SMALL, 10)[:6].split(2))
    assert (result.batches, taken) == (3, [0, 1, 2])
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()


def test_exact_takes_the_same_first_batches_in_each_pass() -> None:
    model = SMALL.build(F64)
    x = samples(SMALL, 10)
    assert recalibrate_bn(model, x.split(2), batches=3, estimator="exact").batches == 3
    assert_close(found(model), whole_set(model, x[:6]), 1e-8)


def test_exact_refuses_a_one_shot_iterator_and_the_others_take_it() -> None:
    model = SMALL.build()
    before = record(model)
    message = r"estimator='exact' goes over the data several times: data must not be a one-shot iterator"
    with pytest.raises(ValueError, match=message):
        recalibrate_bn(model, iter(SMALL.example().split(2)), estimator="exact")
    assert differences(before, record(model)) == []
    for estimator in ("pooled", "ema"):
        assert recalibrate_bn(model, iter(SMALL.example().split(2)), estimator=estimator).batches == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mean"}, r"estimator must be 'pooled', 'exact' or 'ema', got 'mean'"),
        ({"batches": 0}, r"batches must be at least 1, got 0"),
        ({"batches": -3}, r"batches must be at least 1, got -3"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = SMALL.build()
    before = record(model)
    with pytest.raises(ValueError, match=message):
        recalibrate_bn(model, [SMALL.example()], **options)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("attack", ["pgd", 3, PGD], ids=str)
def test_what_is_no_attack_is_refused_before_anything_changes(attack: Any) -> None:
    model = SMALL.build()
    before = record(model)
    with pytest.raises(TypeError, match=r"an attack must be a PGD, .* or a callable attack\(model, x, y\), got "):
        recalibrate_bn(model, [(SMALL.example(), SMALL.labels())], attack=attack)
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tensors_and_tuples_that_begin_with_one_are_batches(estimator: str) -> None:
    parts = SMALL.example().split(3)
    kinds = [list(parts), [(part, "label") for part in parts], [[part, torch.zeros(3)] for part in parts]]
    states = []
    for batches in kinds:
        model = SMALL.build()
        recalibrate_bn(model, batches, estimator=estimator)
        states.append(model.state_dict())
    assert changed(states[0], states[1]) == changed(states[0], states[2]) == set()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dicts_are_batches_for_a_forward_that_reads_them_and_refused_without_one(estimator: str) -> None:
    models = [SMALL.build() for _ in range(2)]
    parts = SMALL.example().split(3)
    batches = [{"image": part, "name": "x"} for part in parts]
    message = r"data must yield tensors or tuples that begin with one, got a dict: say forward="
    with pytest.raises(ValueError, match=message):
        recalibrate_bn(models[0], batches, estimator=estimator)
    recalibrate_bn(models[0], batches, estimator=estimator, forward=lambda model, batch: model(batch["image"]))
    recalibrate_bn(models[1], parts, estimator=estimator)
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()


def test_a_data_loader_serves() -> None:
    dataset = torch.utils.data.TensorDataset(samples(SMALL, 7), torch.arange(7))
    model = SMALL.build(F64)
    assert recalibrate_bn(model, torch.utils.data.DataLoader(dataset, batch_size=4), estimator="exact").batches == 2
    assert_close(found(model), whole_set(model, samples(SMALL, 7)), 1e-8)


def test_a_model_without_bn_is_refused_or_on_request_warned_about() -> None:
    with pytest.raises(NoBatchNormError, match="Linear has no batch-normalization layer"):
        recalibrate_bn(nn.Linear(2, 2), [torch.rand(4, 2)])
    with pytest.warns(BNSurgeryWarning, match="Linear has no batch-normalization layer"):
        assert recalibrate_bn(nn.Linear(2, 2), [torch.rand(4, 2)], strict=False).layers == ()


def test_lazy_and_meta_layers_are_refused() -> None:
    with pytest.raises(BNSurgeryError, match="is lazy and not yet initialised: run a forward pass first"):
        recalibrate_bn(nn.Sequential(nn.LazyBatchNorm1d()), [torch.rand(4, 3)])
    with pytest.raises(BNSurgeryError, match="is on the meta device and holds no values"):
        recalibrate_bn(nn.Sequential(nn.BatchNorm1d(3, device="meta")), [torch.rand(4, 3)])


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(torch.compile(model[:5], backend="eager"), model[5:])


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS = [compiled_whole, compiled_inside, compiled_in_place, DataParallel]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_wrapped_or_compiled_model_gets_the_same_statistics(estimator: str, wrap: Callable) -> None:
    plain = SMALL.build(F64)
    model = SMALL.build(F64)
    wrapped = wrap(model).eval()
    with torch.no_grad():
        wrapped(samples(SMALL, 3))  # compiled before, for the very shape to come, and without hooks
        for each in (plain, wrapped):
            recalibrate_bn(each, samples(SMALL, 6).split(3), estimator=estimator)
    assert list(found(plain)) == ["1", "4", "8"]
    assert_close(found(model), found(plain), 1e-12)
    torch._dynamo.reset()


def test_a_model_in_distributed_data_parallel_gets_the_same_statistics(process_group: None) -> None:
    models = [SMALL.build(F64) for _ in range(2)]
    result = recalibrate_bn(DistributedDataParallel(models[0]), samples(SMALL, 6).split(3))
    recalibrate_bn(models[1], samples(SMALL, 6).split(3))
    assert result.layers == ("1", "4", "8")
    assert changed(models[0].state_dict(), models[1].state_dict()) == set()


def test_timms_batch_norm_keeps_its_activation() -> None:
    model = TIMM.build()
    x = TIMM.example()
    recalibrate_bn(model, [x])
    layer = next(iter(norm_layers(model).values()))
    y = model.eval().conv_stem(x)
    normalised = batch_norm(y, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps)
    assert not isinstance(layer.act, nn.Identity)
    assert torch.allclose(layer(y), layer.act(torch.from_numpy(normalised).float()), atol=1e-5)


# adversarial examples


def labelled(case: Case, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(samples(case, count).split(size), case.labels(count).split(size), strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", [SMALL, SHARED], ids=repr)
def test_with_an_attack_the_statistics_are_those_of_its_examples_on_the_model_as_it_was(
    case: Case, estimator: str
) -> None:
    attack = PGD(eps=0.1, steps=3, step_size=0.05)
    model = case.build(F64).train()
    original = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(5)
    data = labelled(case, 6, 3)
    adversarial = [attack(original, x, y, generator=generator) for x, y in data]
    assert all((made - x).abs().max() > 0.05 for made, (x, _) in zip(adversarial, data, strict=True))

    recalibrate_bn(model, data, attack=attack, estimator=estimator, seed=5)
    if estimator == "ema":
        twin = training_twin(original)
        with torch.no_grad():
            for made in adversarial:
                twin(made)
        expected = found(twin)
    else:
        expected = pooled(original, adversarial if estimator == "pooled" else [torch.cat(adversarial)])
    assert_close(found(model), expected, 1e-10 if estimator == "pooled" else 1e-8)
    assert model.training


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_attack_finds_the_model_in_evaluation_mode_and_as_it_was_each_time(estimator: str) -> None:
    model = SMALL.build(F64).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[tuple[bool, set[str], bool]] = []

    def shift(attacked: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        modes = any(module.training for module in attacked.modules())
        seen.append((modes, changed(before, attacked.state_dict()), torch.is_grad_enabled()))
        attacked.train()
        attacked(x)  # moves the statistics, which must not be seen outside
        return x / 2 + 0.25

    data = labelled(SMALL, 6, 2)
    recalibrate_bn(model, data, attack=shift, estimator=estimator)
    assert seen == [(False, set(), True)] * 3

    twin = SMALL.build(F64)
    recalibrate_bn(twin, [x / 2 + 0.25 for x, _ in data], estimator=estimator)
    assert changed(model.state_dict(), twin.state_dict()) == set()
    assert all(module.training for module in model.modules())


def test_the_examples_of_a_random_attack_depend_on_the_seed_alone() -> None:
    def noise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.1 * torch.rand_like(x)

    states = []
    for seed in (3, 3, 4):
        torch.rand(1)
        model = SMALL.build()
        data = [(SMALL.example(), SMALL.labels())]
        recalibrate_bn(model, data, attack=noise, seed=seed)
        states.append(model.state_dict())
    assert changed(states[0], states[1]) == set()
    assert "1.running_mean" in changed(states[0], states[2])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.rand(4, 3, 8, 8), r"data must yield pairs \(x, y\) of tensors, got a tensor \(4, 3, 8, 8\)"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(3, dtype=torch.long)), r"y must have shape \(4,\) to go with x"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(4)), r"y must hold integer labels, got torch.float32"),
        ((torch.rand(4, 3, 8, 8), torch.full((4,), 10)), r"y must lie in 0 ... 9, got labels from 10 to 10"),
        ((torch.full((4, 3, 8, 8), 200.0), torch.zeros(4, dtype=torch.long)), r"x must lie in bounds=\(0, 1\), got"),
        ((torch.full((4, 3, 8, 8), float("nan")), torch.zeros(4, dtype=torch.long)), r"x must lie in bounds=\(0, 1\)"),
    ],
    ids=["no labels", "lengths", "float labels", "labels out of range", "bytes", "nan"],
)
def test_data_that_an_attack_cannot_use_is_named_and_leaves_the_model_bit_identical(batch: Any, message: str) -> None:
    model = SMALL.build().train()
    before = record(model)
    with pytest.raises(ValueError, match=message):
        recalibrate_bn(model, [batch], attack=PGD(steps=1))
    assert differences(before, record(model)) == []


def test_an_attack_that_returns_another_shape_is_named() -> None:
    model = SMALL.build()

    def crop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x[:, :, 1:]

    message = r"crop must return inputs of shape \(6, 3, 8, 8\), got a tensor \(6, 3, 7, 8\)"
    with pytest.raises(BNSurgeryError, match=message):
        recalibrate_bn(model, [(SMALL.example(), SMALL.labels())], attack=crop)


# several processes


def test_the_moments_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(rank), "2", str(tmp_path / "store"), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    results = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]
    assert [result["slowest"] for result in results] == [10.0, 10.0]
    assert [result["ended"] for result in results] == [("max_seconds", 2)] * 2
    for name, case in ranks.CASES.items():
        for estimator in ("pooled", "exact"):
            model = case.build(F64)
            batches = [*ranks.share(case, 0), *ranks.share(case, 1)]
            assert torch.equal(torch.cat(batches), ranks.samples(case))
            alone = recalibrate_bn(model, batches, estimator=estimator)
            for state, count, elements in (result[name, estimator] for result in results):
                assert count == alone.batches == 4
                assert elements == alone.elements
                for key, value in model.state_dict().items():
                    assert torch.allclose(state[key], value, rtol=1e-10, atol=1e-12), (name, estimator, key)
            assert changed(results[0][name, estimator][0], results[1][name, estimator][0]) == set()


@pytest.mark.parametrize("pair", [tuple, list])
def test_a_pair_of_inputs_and_labels_is_one_batch(pair: type) -> None:
    expected, model = SMALL.build(), SMALL.build()
    recalibrate_bn(expected, [SMALL.example()])
    recalibrate_bn(model, pair((SMALL.example(), SMALL.labels())))
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), model.buffers(), strict=True))


def test_a_bare_tensor_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"data must be an iterable of batches, got a tensor \(6, 3, 8, 8\).*in a list"
    ):
        recalibrate_bn(SMALL.build(), SMALL.example())


@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_data_without_examples_leaves_the_model_alone(estimator: str) -> None:
    model = SMALL.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BNSurgeryError, match="over 0 values per channel are not finite"):
        recalibrate_bn(model[1], [SMALL.example()[:0].new_empty(0, 8, 4, 4)], estimator=estimator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_shuffling_loader_leaves_the_global_random_state_alone() -> None:
    loader = torch.utils.data.DataLoader(SMALL.example(), batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    recalibrate_bn(SMALL.build(), loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_named_tuples_reach_forward_as_they_are() -> None:
    class Batch(NamedTuple):
        index: torch.Tensor
        image: torch.Tensor

    expected, model = SMALL.build(), SMALL.build()
    recalibrate_bn(expected, [SMALL.example()])
    batch = Batch(torch.arange(6), SMALL.example())
    recalibrate_bn(model, [batch], forward=lambda model, batch: model(batch.image))
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), model.buffers(), strict=True))
