"""BN replaced by what does not look at the batch: against torch's functions, and what is carried over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, GroupNormAct, convert_splitbn_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

import reference
from bnsurgery import BNSurgeryError, NoBatchNormError, adv_finetune, bn_layers, evaluate, replace_bn, split_bn
from networks import LIGHT, RESNET20, SHARED, SMALL, TIMM, Case, shake

KINDS = ["group", "layer", "instance", "none"]


def by_hand(x: Tensor, kind: str, layer: nn.Module, groups: int) -> Any:
    """What takes a layer's place, in NumPy: x (N, C, ...) normalised, times gamma, plus beta."""
    if kind == "none":
        return reference.array(x)
    count = {"group": groups, "layer": 1, "instance": x.shape[1]}[kind]
    grouped = reference.array(x).reshape(len(x), count, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normal = (centred / np.sqrt(grouped.var(-1, keepdims=True) + layer.eps)).reshape(x.shape)
    shape = (1, -1, *[1] * (x.dim() - 2))
    gamma, beta = (1.0, 0.0) if layer.weight is None else (layer.weight, layer.bias)
    if layer.weight is None:
        return normal
    return normal * reference.array(gamma).reshape(shape) + reference.array(beta).reshape(shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bn", "shape"),
    [
        (nn.BatchNorm1d, (4, 6, 5)),
        (nn.BatchNorm2d, (4, 6, 5, 3)),
        (nn.BatchNorm3d, (4, 6, 2, 5, 3)),
        (nn.SyncBatchNorm, (4, 6, 5, 3)),
        (nn.SyncBatchNorm, (4, 6, 5)),
    ],
)
def test_what_takes_its_place_normalises_as_it_says(bn: Any, shape: Any, kind: Any, affine: bool) -> None:
    layer = shake(bn(6, eps=1e-3, affine=affine)).double()
    new, report = replace_bn(layer, kind, groups=3)
    x = torch.randn(shape, dtype=torch.float64)
    assert np.allclose(reference.array(new(x)), by_hand(x, kind, layer, 3), atol=1e-12)
    assert report.carried == (("",) if affine and kind != "none" else ())
    assert report.dropped == (("",) if affine and kind == "none" else ())
    assert len(list(new.parameters())) == (2 if affine and kind != "none" else 0)
    assert all(parameter.dtype == torch.float64 for parameter in new.parameters())


def test_the_classes_are_torchs() -> None:
    types = {kind: type(replace_bn(nn.BatchNorm2d(32), kind).model) for kind in KINDS if kind != "none"}
    assert types == {"group": nn.GroupNorm, "layer": nn.GroupNorm, "instance": nn.InstanceNorm2d}
    assert isinstance(replace_bn(nn.BatchNorm2d(32), "none").model, nn.Identity)
    assert type(replace_bn(nn.BatchNorm3d(32), "instance").model) is nn.InstanceNorm3d
    assert replace_bn(nn.BatchNorm2d(64), "group").model.num_groups == 32


@pytest.mark.parametrize("bn", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("shape", [(4, 4), (4, 5, 3), (5, 4)])
def test_instances_without_positions_are_refused_and_not_taken_for_something_else(bn: Any, shape: Any) -> None:
    new, _ = replace_bn(bn(4), "instance")
    with pytest.raises(
        ValueError, match=r"InstanceNorm takes \(N, 4, \.\.\.\) with at least one dimension of positions"
    ):
        new(torch.rand(shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case in LIGHT if "1d" not in case.name and case is not SMALL], ids=repr)
def test_whole_networks_run_and_train_and_the_original_is_as_before(case: Case, kind: Any) -> None:
    model = case.build().train()
    if kind == "instance":
        model = (
            nn.Sequential(*[m for m in model if not isinstance(m, nn.BatchNorm1d)])
            if isinstance(model, nn.Sequential)
            else model
        )
    before = copy.deepcopy(model)
    new, report = replace_bn(model, kind, groups=2)
    assert not [module for module in new.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert list(report.layers) == list(bn_layers(model))
    assert report.kept == ()
    data = [(case.example(8), case.labels(8))]
    run = adv_finetune(new, data, epochs=1, train="all", lr=0.001, attack=None, progress=False)
    assert run.skipped == 0
    found = evaluate(new, data, attacks=["pgd-2"], progress=False)
    assert found.robust_error >= found.clean_error
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert list(model.state_dict()) == list(before.state_dict())
    assert new.training


def test_gamma_and_beta_are_copies_that_train_where_those_did() -> None:
    model = SMALL.build()
    model[1].weight.requires_grad_(False)
    new, report = replace_bn(model, "group", groups=4)
    assert report.carried == ("1", "4", "8")
    assert torch.equal(new[1].weight, model[1].weight)
    assert new[1].weight is not model[1].weight
    assert (new[1].weight.requires_grad, new[1].bias.requires_grad) == (False, True)
    assert new[4].eps == model[4].eps


def test_a_layer_with_a_gamma_alone_stays_so() -> None:
    layer = nn.BatchNorm2d(4)
    layer.bias = None
    new, report = replace_bn(layer, "layer")
    assert new.bias is None
    assert report.carried == ("",)
    new(torch.rand(2, 4, 3, 3))


def test_a_parametrized_gamma_is_read() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = SMALL.build()
    parametrize.register_parametrization(model[1], "weight", Twice())
    new, _ = replace_bn(model, "group", groups=2)
    assert torch.equal(new[1].weight, model[1].weight)
    assert new[1].weight.requires_grad


def test_a_layer_in_several_places_is_replaced_by_one() -> None:
    model = SHARED.build()
    model.listed = [model.bn]
    new, report = replace_bn(model, "group", groups=4)
    assert list(report.layers) == ["bn0", "bn3", "bn"]
    assert type(new.bn) is nn.GroupNorm
    assert new.listed[0] is new.bn
    assert type(model.listed[0]) is nn.BatchNorm2d


def test_an_activation_stays() -> None:
    layer = shake(BatchNormAct2d(6))
    new, _ = replace_bn(nn.Sequential(layer), "group", groups=3)
    x = torch.randn(4, 6, 5, 5)
    expected = F.relu(F.group_norm(x, 3, layer.weight, layer.bias, layer.eps))
    assert torch.equal(new(x), expected)
    assert [name for name, _ in new[0].named_children()] == ["norm", "drop", "act"]
    made, _ = replace_bn(layer, lambda bn: nn.GroupNorm(2, bn.num_features))
    assert float(made(x).detach().min()) == 0
    whole, report = replace_bn(TIMM.build(), "layer")
    assert len(report.carried) == 34
    assert torch.isfinite(whole.eval()(TIMM.example())).all()


def test_a_function_says_what_takes_its_place() -> None:
    model, seen = SMALL.build(), []

    def make(layer: nn.Module) -> nn.Module:
        seen.append((type(layer).__name__, layer.num_features))
        return nn.GroupNorm(2, layer.num_features) if layer.num_features < 16 else nn.LayerNorm(layer.num_features)

    new, report = replace_bn(model, make)
    assert seen == [("BatchNorm2d", 8), ("BatchNorm2d", 12), ("BatchNorm1d", 16)]
    assert report.carried == ("1", "4")
    assert report.dropped == ("8",)
    assert torch.equal(new[1].weight, model[1].weight)
    assert report.layers["8"].startswith("LayerNorm((16,)")
    _, report = replace_bn(model, lambda bn: nn.GroupNorm(2, bn.num_features, affine=False))
    assert report.dropped == ("1", "4", "8")
    kept, report = replace_bn(model, lambda bn: bn)
    assert list(kept.state_dict()) == list(model.state_dict())


def test_what_a_function_has_set_can_stay_and_an_activation_of_its_own_is_not_doubled() -> None:
    def zeroed(layer: nn.Module) -> nn.Module:
        norm = nn.GroupNorm(2, layer.num_features)
        nn.init.zeros_(norm.weight)
        return norm

    new, report = replace_bn(SMALL.build(), zeroed, carry=False)
    assert not new[1].weight.any()
    assert report.dropped == ("1", "4", "8")
    layer, x = shake(BatchNormAct2d(6, act_layer=nn.SiLU)), torch.randn(4, 6, 5, 5)
    new, _ = replace_bn(layer, lambda bn: GroupNormAct(6, num_groups=2, act_layer=nn.SiLU))
    assert torch.allclose(new(x), F.silu(F.group_norm(x, 2, layer.weight, layer.bias)), atol=1e-6)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda bn: bn,
        lambda bn: nn.Sequential(bn, nn.Identity()),
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda bn: nn.Sequential(nn.SyncBatchNorm.convert_sync_batchnorm(bn)),
        lambda bn: copied(nn.BatchNorm2d(bn.num_features), bn),
        lambda bn: nn.Sequential(copied(nn.BatchNorm2d(bn.num_features), bn), type(bn.act)()),
        lambda bn: nn.Sequential(
            copied(nn.BatchNorm2d(bn.num_features), bn), nn.Sequential(type(bn.act)(), nn.Dropout())
        ),
        lambda bn: nn.Sequential(copied(nn.BatchNorm2d(bn.num_features), bn), NoChange(type(bn.act)())),
        lambda bn: nn.Sequential(nn.Identity(), copied(BatchNormAct2d(bn.num_features, act_layer=type(bn.act)), bn)),
        lambda bn: nn.Sequential(nn.Sequential(), copied(nn.BatchNorm2d(bn.num_features), bn), nn.Sequential()),
    ],
    ids=[
        *("itself", "around it", "sync", "around sync", "norm alone", "norm and activation", "and dropout"),
        *("another with the same inside", "norm with activation", "and nothing"),
    ],
)
def test_what_a_function_puts_around_a_layer_has_its_activation_once(wrap: Any, gelu: bool) -> None:
    layer, x = shake(BatchNormAct2d(6, act_layer=nn.GELU if gelu else nn.SiLU)).eval(), torch.randn(4, 6, 5, 5)
    new, _ = replace_bn(nn.Sequential(layer), wrap, carry=False)
    assert torch.allclose(new(x), layer(x), atol=1e-6)


class NoChange(nn.Module):
    """Holds an activation, as squeeze and excitation do, and gives on what it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x


def copied(new: nn.Module, layer: nn.Module) -> nn.Module:
    new.load_state_dict(layer.state_dict())
    return new


def test_gamma_and_beta_in_what_holds_the_layer_are_carried() -> None:
    model = SMALL.build().eval()
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    for wrap in (lambda bn: bn, lambda bn: nn.Sequential(bn, nn.Identity())):
        new, report = replace_bn(model, wrap)
        assert (report.carried, report.dropped) == (("1", "4", "8"), ())
        assert torch.equal(new(SMALL.example()), model(SMALL.example()))


@pytest.mark.parametrize("kind", ["group", "instance", lambda bn: bn, lambda bn: nn.GroupNorm(2, bn.num_features)])
def test_what_layers_share_what_takes_their_place_shares(kind: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.BatchNorm2d(8) for _ in range(2))
            self.other.weight = self.one.weight
            self.gamma = self.one.weight

    new, report = replace_bn(Tied(), kind, groups=2)
    assert new.one.weight is new.other.weight is new.gamma
    assert new.one.bias is not new.other.bias
    assert report.carried == ("one", "other")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("affine", [False, True])
def test_what_is_new_has_the_dtype_of_the_layer_or_of_the_model(dtype: torch.dtype, kind: Any, affine: bool) -> None:
    for tracks in (False, True):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine, track_running_stats=tracks), nn.Conv2d(8, 2, 3)
        ).to(dtype)
        for carry in (False, True):
            new, _ = replace_bn(model, kind, groups=4, carry=carry)
            assert {tensor.dtype for tensor in new.state_dict().values()} == {dtype}
            assert new(torch.rand(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_a_beta_that_a_function_makes_beside_a_gamma_has_its_dtype() -> None:
    layer = nn.BatchNorm2d(8).double()
    layer.bias = None
    new, report = replace_bn(nn.Sequential(layer), lambda bn: nn.GroupNorm(2, bn.num_features))
    assert report.carried == ("0",)
    assert new(torch.rand(2, 8, 4, 4).double()).dtype == torch.float64


@pytest.mark.parametrize("around", [lambda bn: bn, lambda bn: nn.Sequential(bn)])
def test_gamma_and_beta_come_back_where_a_function_has_changed_them(around: Any) -> None:
    def reset(layer: nn.Module) -> nn.Module:
        layer.reset_parameters()
        layer.bias.requires_grad_(False)
        return around(layer)

    def without(layer: nn.Module) -> nn.Module:
        layer.weight = layer.bias = None
        return around(layer)

    model = SMALL.build()
    new, report = replace_bn(model, reset)
    assert (report.carried, report.dropped) == (("1", "4", "8"), ())
    (layer, *_) = bn_layers(new).values()
    assert torch.equal(layer.weight, model[1].weight)
    assert torch.equal(layer.bias, model[1].bias)
    assert [layer.weight.requires_grad, layer.bias.requires_grad] == [True, False]
    assert not layer.running_mean.any()
    new, report = replace_bn(model, reset, carry=False)
    assert (report.carried, report.dropped) == ((), ("1", "4", "8"))
    assert all(bool((layer.weight == 1).all()) for layer in bn_layers(new).values())
    assert replace_bn(model, lambda bn: around(bn), carry=False).report.carried == ("1", "4", "8")
    assert replace_bn(model, without).report.dropped == ("1", "4", "8")


def test_a_layer_in_a_layer_that_is_used_elsewhere_too_is_replaced_there() -> None:
    model = convert_splitbn_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 2)
    model.append(model[1].aux_bn[0])
    new, report = replace_bn(model, lambda bn: nn.GroupNorm(2, bn.num_features))
    assert [type(part) for part in new[1:]] == [nn.GroupNorm, nn.GroupNorm]
    assert report.dropped == ()


def test_a_norm_in_a_network_of_lower_precision_is_as_the_layer_was() -> None:
    model = SMALL.build().to(torch.bfloat16)
    model[1].float()
    new, _ = replace_bn(model, "group", groups=4, carry=False)
    assert [new[number].weight.dtype for number in (1, 4)] == [torch.float32, torch.bfloat16]


def test_gamma_and_beta_do_not_go_into_what_is_parametrized() -> None:
    def make(layer: nn.Module) -> nn.Module:
        norm = nn.GroupNorm(2, layer.num_features)
        parametrize.register_parametrization(norm, "weight", nn.Softplus())
        return norm

    new, report = replace_bn(SMALL.build(), make)
    assert report.dropped == ("1", "4", "8")
    assert parametrize.is_parametrized(new[1])


def test_layers_inside_of_a_layer_go_or_stay_with_it() -> None:
    model = convert_splitbn_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 2)
    assert list(bn_layers(model)) == ["1", "1.aux_bn.0"]
    new, report = replace_bn(model, lambda bn: nn.GroupNorm(2, bn.num_features))
    assert list(report.layers) == list(report.carried) == ["1"]
    assert report.dropped == ("1.aux_bn.0",)
    assert not [part for part in new.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    new, report = replace_bn(model, lambda bn: bn)
    assert list(report.layers) == list(report.carried) == ["1"]
    assert report.kept == ("1.aux_bn.0",)
    assert list(bn_layers(new)) == list(bn_layers(model))


def test_one_module_for_several_layers_is_refused() -> None:
    one = nn.Identity()
    with pytest.raises(ValueError, match="kind returned the same module for '1' and '4': make one for each"):
        replace_bn(SMALL.build(), lambda _layer: one)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), BatchNormAct2d(4)], ids=["torch", "timm"])
def test_what_was_before_bn_is_not_overwritten_by_what_comes_after_it(norm: nn.Module) -> None:
    class Shortcut(nn.Module):
        """As a network with BN and activation before each convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = norm, nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            z = 2 * x
            return self.act(self.norm(z)) + z

    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(replace_bn(Shortcut(), "none").model(x), F.relu(2 * x) + 2 * x)


def test_a_split_model_is_refused() -> None:
    with pytest.raises(BNSurgeryError, match=r"'1' \(SplitBatchNorm\) is split: use keep_branch first"):
        replace_bn(split_bn(SMALL.build()), "none")


def test_some_layers_can_be_left_and_are_reported() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), FrozenBatchNorm2d(4))
    new, report = replace_bn(model, "none", layers="1")
    assert [type(module).__name__ for module in new] == ["BatchNorm2d", "Identity", "FrozenBatchNorm2d"]
    assert report.layers == {"1": "Identity()"}
    assert report.kept == ("0", "2")


def test_modes_stay() -> None:
    model = SMALL.build().train()
    model[1].eval()
    new, _ = replace_bn(model, "instance", layers=["1", "4"])
    assert (new[1].training, new[4].training) == (False, True)


class Odd(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("make", "kind", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), "group", NoBatchNormError, "Linear has no batch-normalization layer"),
        (RESNET20.build, "batch", ValueError, "kind must be one of 'group', 'layer', 'instance', 'none' or a function"),
        (
            RESNET20.build,
            "group",
            ValueError,
            r"groups=32 does not divide the 4 channels of 'norm1' .*: take one of 1, 2, 4",
        ),
        (
            lambda: nn.Sequential(Odd(4)),
            "layer",
            BNSurgeryError,
            r"'0' \(Odd\) has a forward of its own, .*: pass a func",
        ),
        (
            lambda: nn.Sequential(hooked()),
            "none",
            BNSurgeryError,
            r"'0' \(BatchNorm2d\) has hooks, which would be lost",
        ),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d()), "none", BNSurgeryError, "is lazy"),
        (RESNET20.build, lambda _layer: None, TypeError, "kind must return a module, got a NoneType for 'norm1'"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_the_model_is_as_before(
    make: Callable[[], nn.Module], kind: Any, error: type[Exception], message: str
) -> None:
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        replace_bn(model, kind)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("groups", [0, -1, 3, 2.0, "2"])
def test_groups_that_do_not_divide_are_refused(groups: Any) -> None:
    with pytest.raises(ValueError, match=f"groups={groups!r} does not divide the 8 channels of '1'"):
        replace_bn(SMALL.build(), "group", groups=groups)


def test_a_forward_of_its_own_may_be_replaced_by_a_function() -> None:
    new, report = replace_bn(nn.Sequential(Odd(4)), lambda layer: nn.GroupNorm(2, layer.num_features))
    assert type(new[0]) is nn.GroupNorm
    assert report.carried == ("0",)


def test_a_pattern_that_matches_nothing_is_said() -> None:
    with pytest.raises(ValueError, match="layers='2' matches nothing"):
        replace_bn(SMALL.build(), "none", layers="2")
