"""BN layers are found by type, under names without wrappers; what cannot be handled is refused by name."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from bnsurgery import BNSurgeryError, BNSurgeryWarning, NoBatchNormError, bn_layers
from bnsurgery import layers as module
from networks import HEAVY, LIGHT, RESNET20, SHARED, SMALL, TIMM, Case, small
from reference import norm_layers


class Doubled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, original: Tensor) -> Tensor:
        return self.factor * original


@pytest.mark.parametrize("case", LIGHT + HEAVY, ids=repr)
def test_the_layers_found_are_those_that_torch_lists_in_the_same_order(case: Case) -> None:
    model = case.build()
    found, expected = bn_layers(model), norm_layers(model)
    assert list(found) == list(expected)
    assert all(found[name] is layer for name, layer in expected.items())


def test_resnet20_has_21_layers_named_as_in_its_state_dict() -> None:
    model = RESNET20.build()
    found = bn_layers(model)
    assert len(found) == 21
    assert {f"{name}.running_mean" for name in found} <= model.state_dict().keys()


def test_a_layer_used_twice_is_found_once() -> None:
    assert list(bn_layers(SHARED.build())) == ["bn0", "bn3", "bn"]


def test_a_layer_registered_under_two_names_is_found_under_the_first() -> None:
    bn = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"one": nn.Sequential(bn), "two": bn})
    assert bn_layers(model) == {"one.0": bn}


def test_a_layer_alone_is_found_under_the_empty_name() -> None:
    bn = nn.BatchNorm1d(3)
    assert bn_layers(bn) == {"": bn}


def test_subclasses_are_found_whatever_their_class_is_called() -> None:
    class Odd(nn.BatchNorm3d):
        pass

    model = nn.Sequential(Odd(2), nn.SyncBatchNorm(2), nn.BatchNorm1d(2))
    assert list(bn_layers(model)) == ["0", "1", "2"]


def test_timms_batch_norm_with_activation_is_found() -> None:
    found = bn_layers(TIMM.build())
    assert len(found) > 20
    assert {type(layer).__name__ for layer in found.values()} == {"BatchNormAct2d"}


@pytest.mark.parametrize(
    "other", [nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.LayerNorm(4)], ids=repr
)
def test_other_norms_are_no_bn_layers(other: nn.Module) -> None:
    with pytest.raises(NoBatchNormError, match=r"^Sequential has no batch-normalization layer$"):
        bn_layers(nn.Sequential(nn.Conv2d(3, 4, 1), other))


def test_a_class_called_batch_norm_is_none() -> None:
    class BatchNorm2d(nn.Identity):
        pass

    with pytest.raises(NoBatchNormError):
        bn_layers(nn.Sequential(BatchNorm2d()))


def test_without_strict_a_model_without_bn_warns_and_gives_nothing() -> None:
    with pytest.warns(BNSurgeryWarning, match="Linear has no batch-normalization layer") as caught:
        assert bn_layers(nn.Linear(2, 2), strict=False) == {}
    assert caught[0].filename == __file__


def test_frozen_batch_norm_alone_is_refused_with_what_can_be_done_with_it() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d
    message = r"layer that can train: its 2 layers of frozen BN can only be folded and fused$"
    with pytest.raises(NoBatchNormError, match=message):
        bn_layers(nn.Sequential(frozen(3), frozen(4)))
    assert module.is_frozen_bn(frozen(3))
    assert not module.is_frozen_bn(nn.BatchNorm2d(3))


@pytest.mark.parametrize("affine", [True, False])
def test_a_lazy_layer_is_refused_by_name_until_a_forward_pass_has_been_run(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d(affine=affine))
    with pytest.raises(BNSurgeryError, match=r"'1' \(LazyBatchNorm2d\) is lazy and not yet initialised: run a forward"):
        bn_layers(model)
    model(torch.rand(2, 3, 2, 2))
    assert list(bn_layers(model)) == ["1"]


def test_a_layer_on_the_meta_device_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(BNSurgeryError, match=r"'1' \(BatchNorm2d\) is on the meta device and holds no values"):
        bn_layers(model)


def wrapped_models() -> list[tuple[str, object]]:
    return [
        ("compiled", lambda model: torch.compile(model, backend="eager")),
        ("data parallel", DataParallel),
        ("data parallel of compiled", lambda model: DataParallel(torch.compile(model, backend="eager"))),
        ("compiled data parallel", lambda model: torch.compile(DataParallel(model), backend="eager")),
    ]


@pytest.mark.parametrize("wrap", [wrap for _, wrap in wrapped_models()], ids=[name for name, _ in wrapped_models()])
def test_wrappers_leave_no_trace_in_names(wrap: object) -> None:
    model = SMALL.build()
    wrapped = wrap(model)
    assert bn_layers(wrapped) == bn_layers(model)
    assert module.named_parameters(wrapped).keys() == dict(model.named_parameters()).keys()
    assert module.unwrap(wrapped) is model


def test_distributed_data_parallel_leaves_no_trace_in_names(process_group: None) -> None:
    model = SMALL.build()
    wrapped = DistributedDataParallel(model)
    assert any("module." in name for name in wrapped.state_dict())
    assert list(bn_layers(wrapped)) == ["1", "4", "8"]
    assert module.unwrap(wrapped) is model


def test_wrappers_inside_a_model_leave_no_trace_in_names() -> None:
    plain = nn.Sequential(small(), nn.BatchNorm1d(10))
    names = list(bn_layers(plain))
    wrapped = nn.Sequential(torch.compile(plain[0], backend="eager"), DataParallel(plain[1]))
    assert list(bn_layers(wrapped)) == names == ["0.1", "0.4", "0.8", "1"]
    assert list(module.named_parameters(wrapped)) == [name for name, _ in plain.named_parameters()]
    assert module.unwrap(plain) is plain


@pytest.mark.parametrize("case", LIGHT, ids=repr)
def test_parameters_are_named_as_torch_names_them(case: Case) -> None:
    model = case.build()
    named = module.named_parameters(model)
    assert list(named) == [name for name, _ in model.named_parameters()]
    assert all(named[name] is parameter for name, parameter in model.named_parameters())


def test_a_tied_parameter_is_named_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(module.named_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


def test_names_and_globs_select_in_the_order_of_the_names() -> None:
    names = {"conv1": 1, "layer1.bn": 2, "layer2.bn": 3, "odd[0]": 4}
    assert module.select(names, ["*.bn", "conv1"], "also") == {"conv1": 1, "layer1.bn": 2, "layer2.bn": 3}
    assert list(module.select(names, "conv1", "also")) == ["conv1"]
    assert list(module.select(names, ["odd[0]"], "also")) == ["odd[0]"]
    assert module.select(names, [], "also") == {}


def test_a_pattern_without_match_lists_the_nearest_names() -> None:
    names = dict.fromkeys(["conv1", "conv2", "logits.weight", "logits.bias"])
    with pytest.raises(ValueError, match=r"^also='cnov1' matches nothing; the nearest names are 'conv1', 'conv2'"):
        module.select(names, ["cnov1"], "also")
    with pytest.raises(ValueError, match=r"layers='\?\?' matches nothing; .* 'conv1', 'conv2', 'logits.weight'$"):
        module.select(names, ["??"], "layers")


def test_a_patterns_case_counts() -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        module.select({"conv1": 1}, ["CONV1"], "also")


def test_gamma_and_beta_are_the_layers_parameters() -> None:
    bn = nn.BatchNorm2d(3)
    assert module.trainable_parts(bn, "weight") == {"weight": bn.weight}
    assert module.trainable_parts(bn, "bias") == {"bias": bn.bias}
    assert module.trainable_parts(nn.BatchNorm2d(3, affine=False), "weight") == {}
    assert module.trainable_parts(nn.BatchNorm2d(3, affine=False), "bias") == {}


def test_a_layer_without_bias_has_only_gamma() -> None:
    bn = nn.BatchNorm2d(3)
    bn.bias = None
    assert module.trainable_parts(bn, "bias") == {}
    assert list(module.trainable_parts(bn, "weight")) == ["weight"]


def test_behind_a_parametrized_gamma_stand_the_original_and_the_parametrizations_own() -> None:
    bn = nn.BatchNorm2d(3)
    original = bn.weight
    parametrize.register_parametrization(bn, "weight", Doubled())
    parts = module.trainable_parts(bn, "weight")
    assert set(parts) == {"parametrizations.weight.original", "parametrizations.weight.0.factor"}
    assert parts["parametrizations.weight.original"] is original
    assert set(parts) <= bn.state_dict().keys()
    assert list(module.trainable_parts(bn, "bias")) == ["bias"]


def test_statistics_are_the_buffers_held_whether_tracked_or_not() -> None:
    bn = nn.BatchNorm2d(3)
    bn.track_running_stats = False
    assert list(module.statistics(bn)) == ["running_mean", "running_var", "num_batches_tracked"]
    assert module.statistics(bn)["running_var"] is bn.running_var
    assert module.has_statistics(bn)
    without = nn.BatchNorm2d(3, track_running_stats=False)
    assert module.statistics(without) == {}
    assert not module.has_statistics(without)


def test_what_needs_statistics_says_which_layer_has_none_and_the_remedy() -> None:
    module.require_statistics("norm", nn.BatchNorm2d(3), "folding")
    without = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(BNSurgeryError, match=r"^folding needs running statistics, and 'norm' \(BatchNorm2d\) has none"):
        module.require_statistics("norm", without, "folding")
    with pytest.raises(BNSurgeryError, match=r"'\(root\)' \(BatchNorm2d\) has none: build it with track_running_stats"):
        module.require_statistics("", without, "folding")


def test_inputs_belong_on_the_device_of_the_first_parameter_or_buffer() -> None:
    assert module.device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert module.device_of(nn.BatchNorm2d(2, affine=False, device="meta")) == torch.device("meta")
    assert module.device_of(nn.ReLU()) == torch.device("cpu")


def test_finding_layers_changes_nothing() -> None:
    model = SMALL.build().eval()
    model[1].train()
    before = {name: value.training for name, value in model.named_modules()}
    bn_layers(model)
    assert {name: value.training for name, value in model.named_modules()} == before
