"""Only what was chosen trains, the choice holds through whatever a user does, and taking it back loses nothing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from bnsurgery import BNSurgeryError, BNSurgeryWarning, Freeze, NoBatchNormError, bn_layers, freeze_except_bn
from networks import AFFINE_FREE, HEAVY, LIGHT, NETWORK_1D, RESNET20, SHARED, SMALL, TIMM, Case, resnet20, small
from reference import batch_norm, batch_statistics, changed, differences, norm_layers, record
from strategies import nested_freezes

STATS = ("update", "frozen", "batch")
PARAMETERS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

quiet_if_affine_free = pytest.mark.filterwarnings("ignore:no BN layer has a gamma or beta")


def optimizer_over_everything(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)


def train(model: nn.Module, case: Case, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.rand(case.shape, generator=generator).to(dtype)
        y = torch.randint(case.classes, (len(x),), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        assert loss.isfinite()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bn_entries(model: nn.Module, *parts: str) -> set[str]:
    names = {f"{name}.{part}" for name in norm_layers(model) for part in parts}
    return names & model.state_dict().keys()


def trained_model(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in training, whose gradients and momentum buffers would move all of it at the next step."""
    model = case.build().train()
    optimizer = optimizer_over_everything(model)
    train(model, case, optimizer, seed=9)
    assert all(parameter.grad is not None for parameter in model.parameters())
    return model, optimizer


@quiet_if_affine_free
@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("case", LIGHT + HEAVY, ids=repr)
def test_training_changes_what_was_chosen_and_nothing_else_and_is_undone_without_loss(case: Case, stats: str) -> None:
    model, optimizer = trained_model(case)
    before, start = record(model), values(model)
    frozen = freeze_except_bn(model, stats=stats)
    train(model, case, optimizer, steps=20)
    after = values(model)
    moving = bn_entries(model, *PARAMETERS, *(STATISTICS if stats == "update" else ()))
    assert changed(start, after) == moving

    frozen.remove()
    left = [tuple(name.split(" ", 1)) for name in differences(before, record(model))]
    assert {name for name, _ in left} == moving
    assert {what for _, what in left} <= {"value", "grad", "grad address"}


@pytest.mark.parametrize("case", LIGHT, ids=repr)
def test_with_neither_gamma_nor_beta_only_the_statistics_move(case: Case) -> None:
    model, optimizer = trained_model(case)
    start = values(model)
    frozen = freeze_except_bn(model, weight=False, bias=False)
    train(model, case, optimizer, steps=3)
    assert frozen.trainable == ()
    assert list(frozen.parameters()) == []
    assert changed(start, values(model)) == bn_entries(model, *STATISTICS)


@pytest.mark.parametrize("part", PARAMETERS)
def test_gamma_and_beta_are_chosen_apart(part: str) -> None:
    model, optimizer = trained_model(SMALL)
    start = values(model)
    frozen = freeze_except_bn(model, weight=part == "weight", bias=part == "bias", stats="batch")
    train(model, SMALL, optimizer, steps=3)
    assert frozen.trainable == tuple(f"{name}.{part}" for name in ("1", "4", "8"))
    assert changed(start, values(model)) == set(frozen.trainable)


def test_an_optimizer_over_the_chosen_parameters_does_what_one_over_all_does() -> None:
    results = []
    for choose in (lambda model, frozen: model.parameters(), lambda model, frozen: frozen.parameters()):
        model = SMALL.build().train()
        frozen = freeze_except_bn(model)
        optimizer = torch.optim.SGD(choose(model, frozen), lr=0.1, momentum=0.9, weight_decay=0.1)
        train(model, SMALL, optimizer, steps=4)
        results.append(values(model))
    assert changed(*results) == set()


def test_a_step_after_zero_grad_to_zeros_moves_no_frozen_parameter() -> None:
    model, optimizer = trained_model(SMALL)
    start = values(model)
    freeze_except_bn(model, stats="batch")
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(SMALL.example()), SMALL.labels()).backward()
        optimizer.step()
    assert changed(start, values(model)) == bn_entries(model, *PARAMETERS)


@pytest.mark.parametrize("stats", STATS)
def test_what_the_statistics_do_in_training_is_what_the_formula_of_each_choice_says(stats: str) -> None:
    model = SMALL.build(torch.float64).train()
    bn = model[1]
    mean, variance = bn.running_mean.clone(), bn.running_var.clone()
    x = torch.rand(5, 8, 3, 3, dtype=torch.float64)
    with freeze_except_bn(model, stats=stats):
        by = (mean, variance) if stats == "frozen" else batch_statistics(x)
        got = bn(x).detach().numpy()
    assert got == pytest.approx(batch_norm(x, *by, bn.weight, bn.bias), rel=1e-10, abs=1e-12)
    if stats == "update":
        unbiased = batch_statistics(x)[1] * 45 / 44
        assert bn.running_mean.numpy() == pytest.approx(0.9 * mean.numpy() + 0.1 * batch_statistics(x)[0], rel=1e-12)
        assert bn.running_var.numpy() == pytest.approx(0.9 * variance.numpy() + 0.1 * unbiased, rel=1e-12)
        assert bn.num_batches_tracked == 8
    else:
        assert torch.equal(bn.running_mean, mean)
        assert torch.equal(bn.running_var, variance)
        assert bn.num_batches_tracked == 7


@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("case", LIGHT, ids=repr)
@quiet_if_affine_free
def test_in_evaluation_mode_a_frozen_model_computes_what_it_did(case: Case, stats: str) -> None:
    model = case.build().eval()
    expected = model(case.example())
    freeze_except_bn(model, stats=stats)
    assert torch.equal(model(case.example()), expected)
    model.train()
    model.eval()
    start = values(model)
    assert torch.equal(model(case.example()), expected)
    assert changed(start, values(model)) == set()


@pytest.mark.parametrize("stats", STATS)
def test_the_choice_survives_train_and_eval_of_the_model_and_of_each_layer(stats: str) -> None:
    model, optimizer = trained_model(SMALL)
    frozen = freeze_except_bn(model, stats=stats)
    model.eval()
    model.train()
    for layer in norm_layers(model).values():
        assert layer.eval() is layer
        assert layer.train() is layer
        assert layer.training == (stats != "frozen")
    assert model[2].training
    start = values(model)
    train(model, SMALL, optimizer, steps=2)
    moving = bn_entries(model, *PARAMETERS, *(STATISTICS if stats == "update" else ()))
    assert changed(start, values(model)) == moving
    assert set(frozen.trainable) == bn_entries(model, *PARAMETERS)


def weights_only_off(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch": weights_only_off}


@quiet_if_affine_free
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("case", [*LIGHT, TIMM], ids=repr)
def test_the_choice_survives_copies_and_the_original_does_not_notice(case: Case, stats: str, how: str) -> None:
    model = case.build().train()
    freeze_except_bn(model, stats=stats)
    before, start = record(model), values(model)
    twin = COPIES[how](model)
    assert changed(start, values(twin)) == set()
    twin.eval()
    twin.train()
    train(twin, case, optimizer_over_everything(twin), steps=3)
    moving = bn_entries(twin, *PARAMETERS, *(STATISTICS if stats == "update" else ()))
    assert changed(start, values(twin)) == moving
    assert differences(before, record(model)) == []
    assert all(layer.training == (stats != "frozen") for layer in norm_layers(twin).values())
    assert twin.training


@pytest.mark.parametrize("how", COPIES)
def test_undoing_the_original_leaves_a_copy_as_chosen_and_the_copy_can_be_frozen_anew(how: str) -> None:
    model = SMALL.build().train()
    frozen = freeze_except_bn(model, stats="frozen")
    twin = COPIES[how](model)
    frozen.remove()
    model.train()
    twin.train()
    assert [layer.training for layer in norm_layers(model).values()] == [True] * 3
    assert [layer.training for layer in norm_layers(twin).values()] == [False] * 3
    with freeze_except_bn(twin, stats="update"):
        start = values(twin)
        train(twin, SMALL, optimizer_over_everything(twin))
        assert changed(start, values(twin)) == bn_entries(twin, *PARAMETERS, *STATISTICS)
    assert [layer.training for layer in norm_layers(twin).values()] == [False] * 3


@quiet_if_affine_free
@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("case", LIGHT + HEAVY, ids=repr)
def test_freezing_alone_changes_no_key_value_type_or_address_of_the_state(case: Case, stats: str) -> None:
    model = case.build()
    before, types = record(model), [type(module) for module in model.modules()]
    freeze_except_bn(model, stats=stats)
    assert not [name for name in differences(before, record(model)) if name.endswith((" value", " address"))]
    assert [type(module) for module in model.modules()] == types


def test_dropout_stays_active_where_the_statistics_are_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    with freeze_except_bn(model, stats="frozen"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.rand(2, 3, 4, 4)
        assert not torch.equal(model(x), model(x))


def test_children_of_a_layer_follow_the_model_where_its_statistics_are_frozen() -> None:
    model = TIMM.build()
    freeze_except_bn(model, stats="frozen")
    layer = next(iter(norm_layers(model).values()))
    assert (layer.training, layer.act.training, layer.drop.training) == (False, True, True)
    model.eval()
    assert (layer.training, layer.act.training, layer.drop.training) == (False, False, False)


def exact_state(model: nn.Module) -> dict[str, Any]:
    """Modes, flags, stand-ins and the identity of gradients."""
    found: dict[str, Any] = {name: (module.training, "train" in vars(module)) for name, module in model.named_modules()}
    found |= {f"{name}.flag": layer.track_running_stats for name, layer in norm_layers(model).items()}
    found |= {f"{name}.requires_grad": parameter.requires_grad for name, parameter in model.named_parameters()}
    found |= {f"{name}.grad": id(parameter.grad) for name, parameter in model.named_parameters()}
    return found


@settings(max_examples=80)
@given(nested_freezes(), st.integers(0, 2**11 - 1), st.integers(0, 2**10 - 1), st.integers(0, 7), st.booleans())
def test_freezes_removed_in_any_order_put_everything_back(
    nest: tuple[list[dict[str, Any]], list[int]], modes: int, gradients: int, flags: int, again: bool
) -> None:
    options, order = nest
    model = small().train()
    F.cross_entropy(model(SMALL.example()), SMALL.labels()).backward()
    for index, module in enumerate(model):
        module.training = bool(modes >> index & 1)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(gradients >> index & 1))
        if index % 3 == 0:
            parameter.grad = None
    for index, layer in enumerate(norm_layers(model).values()):
        layer.track_running_stats = bool(flags >> index & 1)
    before = exact_state(model)
    freezes = [freeze_except_bn(model, **option) for option in options]
    for index in order:
        freezes[index].remove()
        if again:
            freezes[index].remove()
    assert exact_state(model) == before


@settings(max_examples=80)
@given(nested_freezes(), st.booleans())
def test_while_freezes_are_removed_in_any_order_the_newest_one_left_holds(
    nest: tuple[list[dict[str, Any]], list[int]], training: bool
) -> None:
    options, order = nest
    model = small().train(training)
    freezes = [freeze_except_bn(model, **option) for option in options]
    left = list(range(len(options)))
    for index in order[:-1]:
        freezes[index].remove()
        left.remove(index)
        newest, stats = freezes[left[-1]], options[left[-1]]["stats"]
        assert tuple(name for name, value in model.named_parameters() if value.requires_grad) == newest.trainable
        for mode in (training, True, False, training):
            model.train(mode)
            for layer in norm_layers(model).values():
                assert layer.track_running_stats == (stats == "update")
                assert layer.training == (mode and stats != "frozen")


def test_gradients_made_under_an_inner_freeze_do_not_train_what_the_outer_one_froze() -> None:
    model, optimizer = trained_model(SMALL)
    outer = freeze_except_bn(model, stats="batch")
    with freeze_except_bn(model, stats="batch", also="0"):
        F.cross_entropy(model(SMALL.example()), SMALL.labels()).backward()
    start = values(model)
    optimizer.step()
    assert "0.weight" not in changed(start, values(model))
    outer.remove()


def interrupt(model: nn.Module, error: type[BaseException]) -> None:
    assert not model[0].weight.requires_grad
    assert not model[1].training
    raise error


def test_a_with_block_gives_the_freeze() -> None:
    with freeze_except_bn(SMALL.build()) as frozen:
        assert isinstance(frozen, Freeze)
        assert len(frozen.trainable) == 6


def test_a_with_block_takes_the_choice_back_also_after_exceptions() -> None:
    for error in (ValueError, KeyboardInterrupt):
        model, _ = trained_model(SMALL)
        before = record(model)
        with pytest.raises(error), freeze_except_bn(model, stats="frozen"):
            interrupt(model, error)
        assert differences(before, record(model)) == []


def test_after_a_switch_of_mode_under_the_freeze_the_layers_follow_the_model() -> None:
    model = SMALL.build().train()
    frozen = freeze_except_bn(model, stats="frozen")
    model.eval()
    frozen.remove()
    assert not any(module.training for module in model.modules())
    with freeze_except_bn(model, stats="frozen"):
        model.train()
    assert all(module.training for module in model.modules())


def test_a_lost_handle_leaves_the_choice_in_force() -> None:
    model = SMALL.build().train()
    freeze_except_bn(model, stats="frozen", also="10.bias")
    gc.collect()
    model.train()
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        *bn_entries(model, *PARAMETERS),
        "10.bias",
    }
    assert not any(layer.training for layer in norm_layers(model).values())


@pytest.mark.parametrize(
    ("also", "names"),
    [
        ("0", {"0.weight"}),
        ("0.weight", {"0.weight"}),
        (["3.bias", "10"], {"3.bias", "10.weight", "10.bias"}),
        ("10.*", {"10.weight", "10.bias"}),
        ("*.weight", {f"{index}.weight" for index in (0, 1, 3, 4, 7, 8, 10)}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_also_names_modules_parameters_and_globs_that_train_too(also: Any, names: set[str]) -> None:
    model, optimizer = trained_model(SMALL)
    start = values(model)
    frozen = freeze_except_bn(model, weight=False, bias=False, stats="batch", also=also)
    train(model, SMALL, optimizer, steps=2)
    assert set(frozen.trainable) == changed(start, values(model)) == names


def test_also_names_parts_of_a_model_with_children() -> None:
    frozen = freeze_except_bn(RESNET20.build(), also=["conv1", "stages.2.0", "logits.*"], weight=False, bias=False)
    assert "conv1.weight" in frozen.trainable
    assert {name.rsplit(".", 1)[0] for name in frozen.trainable if name.startswith("stages")} == {
        f"stages.2.0.{name}" for name in ("conv1", "norm1", "conv2", "norm2", "shortcut.0", "shortcut.1")
    }
    assert frozen.trainable[-2:] == ("logits.weight", "logits.bias")


@pytest.mark.parametrize("stats", STATS)
def test_a_wrong_argument_is_named_and_changes_nothing(stats: str) -> None:
    model, _ = trained_model(SMALL)
    before = record(model)
    with pytest.raises(ValueError, match=r"also='10.wieght' matches nothing; the nearest names are '10.weight'"):
        freeze_except_bn(model, stats=stats, also=["0", "10.wieght"])
    with pytest.raises(ValueError, match=r"stats must be one of 'update', 'frozen', 'batch', got 'freeze'"):
        freeze_except_bn(model, stats="freeze")
    assert differences(before, record(model)) == []


def test_an_unmatched_also_lists_the_nearest_layer_names() -> None:
    with pytest.raises(ValueError, match=r"also='convl' matches nothing; the nearest names are .*'conv1'"):
        freeze_except_bn(RESNET20.build(), also="convl")


def test_the_summary_of_resnet20_is_that_of_the_paper() -> None:
    frozen = freeze_except_bn(resnet20(64))
    assert frozen.summary() == "trainable params: 6,272 || all params: 4,327,754 || trainable%: 0.14"
    assert repr(frozen) == f"Freeze(stats='update', {frozen.summary()})"
    frozen.remove()
    assert repr(frozen) == "Freeze(removed)"


def test_parameters_are_those_named_in_their_order() -> None:
    model = SMALL.build()
    frozen = freeze_except_bn(model)
    named = dict(model.named_parameters())
    assert frozen.trainable == ("1.weight", "1.bias", "4.weight", "4.bias", "8.weight", "8.bias")
    assert [id(parameter) for parameter in frozen.parameters()] == [id(named[name]) for name in frozen.trainable]


def test_a_shared_layer_counts_once() -> None:
    frozen = freeze_except_bn(SHARED.build())
    assert len(frozen.trainable) == 6
    assert frozen.summary().startswith("trainable params: 48 || all params: 2,114 ||")


def test_layers_without_parameters_are_listed_and_said_to_train_nothing() -> None:
    message = r"no BN layer has a gamma or beta \(affine=False\): nothing trains there"
    with pytest.warns(BNSurgeryWarning, match=message) as seen:
        frozen = freeze_except_bn(AFFINE_FREE.build())
    assert seen[0].filename == __file__
    assert frozen.without_parameters == ("1", "4", "8")
    assert frozen.trainable == ()
    assert frozen.summary() == "trainable params: 0 || all params: 4,350 || trainable%: 0.00"


def test_one_layer_without_parameters_among_others_is_listed_without_a_warning() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[2].bias = None
    frozen = freeze_except_bn(model)
    assert frozen.without_parameters == ("0",)
    assert frozen.trainable == ("1.weight", "1.bias", "2.weight")


def test_a_model_without_bn_is_refused_or_on_request_warned_about_and_frozen_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(NoBatchNormError, match="Sequential has no batch-normalization layer"):
        freeze_except_bn(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.warns(BNSurgeryWarning, match="Sequential has no batch-normalization layer"):
        frozen = freeze_except_bn(model, strict=False, also="1")
    assert frozen.trainable == ("1.weight", "1.bias")
    frozen.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_statistics_need_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    before = record(model)
    message = r"stats='frozen' needs running statistics, and '1' \(BatchNorm2d\) has none: build it with track_running"
    with pytest.raises(BNSurgeryError, match=message):
        freeze_except_bn(model, stats="frozen")
    assert differences(before, record(model)) == []


@pytest.mark.parametrize("stats", ["update", "batch"])
def test_a_layer_without_statistics_goes_on_normalising_by_the_batch(stats: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).train()
    x = torch.rand(4, 3, 2, 2)
    with freeze_except_bn(model, stats=stats):
        assert model[0].track_running_stats is False
        for mode in (True, False):
            got = model.train(mode)(x).detach().numpy()
            assert got == pytest.approx(batch_norm(x, *batch_statistics(x)), abs=1e-5)
    assert model.state_dict().keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize("stats", STATS)
def test_a_flag_flipped_while_the_buffers_stay_is_overruled_and_given_back(stats: str) -> None:
    model = SMALL.build().train()
    for layer in norm_layers(model).values():
        layer.track_running_stats = False
    start = values(model)
    with freeze_except_bn(model, stats=stats):
        model(SMALL.example())
    moved = bn_entries(model, *STATISTICS) if stats == "update" else set()
    assert changed(start, values(model)) == moved
    assert [layer.track_running_stats for layer in norm_layers(model).values()] == [False] * 3


def test_momentum_zero_warns_where_the_statistics_are_asked_to_move() -> None:
    model = small(momentum=0.0)
    model[4].momentum = 0.1
    message = r"stats='update', but momentum is 0 in '1', '8': statistics there will not move"
    with pytest.warns(BNSurgeryWarning, match=message) as seen:
        freeze_except_bn(model)
    assert seen[0].filename == __file__
    freeze_except_bn(model, stats="frozen")
    freeze_except_bn(model, stats="batch")


def test_momentum_none_averages_over_all_batches() -> None:
    model = small(momentum=None).train()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with freeze_except_bn(model):
        means = []
        for part in x.split(2):
            means.append(batch_statistics(model[0](part))[0])
            model(part)
    assert model[1].running_mean.numpy() == pytest.approx(sum(means) / 3, abs=1e-6)
    assert model[1].momentum is None


def test_frozen_batch_norm_among_others_is_said_to_stay_as_it_is() -> None:
    model = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    with pytest.warns(BNSurgeryWarning, match=r"frozen BN cannot train and stays as it is: '0'"):
        frozen = freeze_except_bn(model)
    assert frozen.trainable == ("1.weight", "1.bias")


def test_frozen_batch_norm_alone_cannot_train() -> None:
    model = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3))
    with pytest.raises(NoBatchNormError, match="its 1 layers of frozen BN can only be folded and fused"):
        freeze_except_bn(model)


def test_lazy_and_meta_layers_are_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())
    with pytest.raises(BNSurgeryError, match="is lazy and not yet initialised: run a forward pass first"):
        freeze_except_bn(model)
    assert model[0].weight.requires_grad
    with pytest.raises(BNSurgeryError, match="is on the meta device and holds no values"):
        freeze_except_bn(nn.Sequential(nn.BatchNorm1d(3, device="meta")))


class Doubled(nn.Module):
    def forward(self, original: Tensor) -> Tensor:
        return 2 * original


@pytest.mark.parametrize("stats", STATS)
def test_of_a_parametrized_gamma_the_original_trains(stats: str) -> None:
    model = small().train()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    optimizer = optimizer_over_everything(model)
    start, before = values(model), record(model)
    frozen = freeze_except_bn(model, bias=False, stats=stats)
    train(model, SMALL, optimizer, steps=2)
    assert set(frozen.trainable) == {"1.parametrizations.weight.original", "4.weight", "8.weight"}
    moved = changed(start, values(model)) - {name for name in start if name.endswith(STATISTICS)}
    assert moved == set(frozen.trainable)
    frozen.remove()
    left = differences(before, record(model))
    assert {name.split(" ")[1] for name in left} == {"value", "grad"}


def test_sync_batch_norm_is_frozen_as_any_other() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(SMALL.build().train())
    frozen = freeze_except_bn(model, stats="frozen")
    assert frozen.trainable == ("1.weight", "1.bias", "4.weight", "4.bias", "8.weight", "8.bias")
    start = values(model)
    train(model, SMALL, optimizer_over_everything(model), steps=2)
    assert changed(start, values(model)) == set(frozen.trainable)
    assert all(type(layer) is nn.SyncBatchNorm for layer in norm_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train_in_their_own_dtype(dtype: torch.dtype) -> None:
    model = NETWORK_1D.build(dtype).train()
    start = values(model)
    frozen = freeze_except_bn(model, stats="frozen")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    train(model, NETWORK_1D, optimizer, steps=2)
    assert changed(start, values(model)) == set(frozen.trainable)
    assert {value.dtype for value in model.parameters()} == {dtype}


@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("freeze_first", [True, False])
def test_a_compiled_model_is_not_recompiled_per_step_and_names_have_no_prefix(stats: str, freeze_first: bool) -> None:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = SMALL.build().train()
    if freeze_first:
        frozen = freeze_except_bn(model, stats=stats)
        compiled = torch.compile(model, backend=counter)
    else:
        compiled = torch.compile(model, backend=counter)
        frozen = freeze_except_bn(compiled, stats=stats)
    start = values(model)
    optimizer = optimizer_over_everything(model)
    train(compiled, SMALL, optimizer)
    frames = counter.frame_count
    assert frames >= 1
    train(compiled, SMALL, optimizer, steps=6)
    assert counter.frame_count == frames
    assert frozen.trainable == ("1.weight", "1.bias", "4.weight", "4.bias", "8.weight", "8.bias")
    moving = bn_entries(model, *PARAMETERS, *(STATISTICS if stats == "update" else ()))
    assert changed(start, values(model)) == moving
    torch._dynamo.reset()


@pytest.mark.parametrize("stats", STATS)
def test_a_compiled_model_keeps_the_choice_through_train_and_eval_and_gives_it_back(stats: str) -> None:
    model = SMALL.build().train()
    before = exact_state(model)
    compiled = torch.compile(model, backend="eager")
    frozen = freeze_except_bn(compiled, stats=stats)
    compiled.eval()
    compiled.train()
    assert model.training
    assert [layer.training for layer in norm_layers(model).values()] == [stats != "frozen"] * 3
    frozen.remove()
    assert exact_state(model) == before


@pytest.mark.parametrize("stats", STATS)
def test_data_parallel_names_have_no_prefix_and_training_goes_as_chosen(stats: str) -> None:
    model = SMALL.build().train()
    wrapped = DataParallel(model)
    start = values(model)
    frozen = freeze_except_bn(wrapped, stats=stats, also="10")
    wrapped.eval()
    wrapped.train()
    train(wrapped, SMALL, optimizer_over_everything(wrapped), steps=2)
    assert frozen.trainable[-3:] == ("8.bias", "10.weight", "10.bias")
    moving = {*bn_entries(model, *PARAMETERS, *(STATISTICS if stats == "update" else ())), "10.weight", "10.bias"}
    assert changed(start, values(model)) == moving


@pytest.mark.parametrize("stats", STATS)
def test_under_distributed_data_parallel_training_goes_as_chosen(stats: str, process_group: None) -> None:
    model = SMALL.build().train()
    freeze_except_bn(model, stats=stats)
    wrapped = DistributedDataParallel(model)
    start = values(model)
    train(wrapped, SMALL, optimizer_over_everything(wrapped), steps=3)
    moving = bn_entries(model, *PARAMETERS, *(STATISTICS if stats == "update" else ()))
    assert changed(start, values(model)) == moving


def test_a_model_wrapped_in_distributed_data_parallel_can_be_frozen_and_unfrozen(process_group: None) -> None:
    model = SMALL.build().train()
    wrapped = DistributedDataParallel(model)
    before = exact_state(model)
    with freeze_except_bn(wrapped, stats="frozen", also="10.bias") as frozen:
        assert frozen.trainable == ("1.weight", "1.bias", "4.weight", "4.bias", "8.weight", "8.bias", "10.bias")
        wrapped.train()
        assert not any(layer.training for layer in norm_layers(model).values())
    assert exact_state(model) == before


def test_a_copied_freeze_undoes_the_copy_and_the_original_undoes_the_original() -> None:
    model = SMALL.build().train()
    before = [parameter.requires_grad for parameter in model.parameters()]
    freeze = freeze_except_bn(model, stats="frozen")
    for copied, handle in (copy.deepcopy((model, freeze)), pickle.loads(pickle.dumps((model, freeze)))):
        handle.remove()
        assert [parameter.requires_grad for parameter in copied.parameters()] == before
        assert all(module.train().training for module in copied.modules())
    assert not any(layer.training for layer in bn_layers(model).values())
    freeze.remove()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(module.training for module in model.modules())


def test_parameters_of_integers_are_refused_before_anything_changes() -> None:
    model = SMALL.build()
    model.index = nn.Parameter(torch.arange(3), requires_grad=False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="parameters of integers, which cannot train: index"):
        freeze_except_bn(model, also="*")
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_module_in_place_of_a_name_is_refused() -> None:
    model = SMALL.build()
    with pytest.raises(ValueError, match="also takes qualified names or globs, got a Conv2d"):
        freeze_except_bn(model, also=model[0])


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got a function"):
        bn_layers(lambda x: x)
