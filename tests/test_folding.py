"""fold_bn against evaluation mode and Eq. 1 in NumPy; fuse_bn against the outputs of the original."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import random
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, FusionError, NoBatchNormError
from bnsurgery.folding import Affine, fold_bn
from bnsurgery.freezing import freeze_except_bn
from bnsurgery.fusion import FusionPlan, fuse_bn, fused_parameters, plan_fusion
from bnsurgery.layers import bn_layers
from networks import HEAVY, LIGHT, NETWORK_3D, RESNET20, SHARED, SMALL, Case, shake, small

FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d
BatchNormAct2d = timm.layers.BatchNormAct2d
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def evaluated(model: nn.Module, *args: Any) -> Any:
    """The original's outputs in evaluation mode, by torch alone."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*args)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).detach().abs().max() / expected.detach().abs().max())


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a call could leave changed in a model, tensors by identity and by their bytes."""

    def bits(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return id(tensor), tensor.dtype, tensor.requires_grad, data

    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), type(module), module.training, sorted(vars(module))))
        found += [(key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str))]
        found += [(key, bits(value)) for key, value in vars(module).items() if isinstance(value, Tensor)]
        found += [(key, list(value)) for key, value in vars(module).items() if key.endswith("_hooks")]
        found += [(key, bits(tensor)) for key, tensor in module._parameters.items()]
        found += [(key, bits(tensor)) for key, tensor in module._buffers.items()]
        found += [(key, bits(tensor.grad)) for key, tensor in module._parameters.items() if tensor is not None]
    return found


class Net(nn.Module):
    """A convolution, BN and whatever else, put together by a function of the network and its input."""

    def __init__(self, body: Callable[..., Any] | None = None, **parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body or (lambda net, x: net.bn(net.conv(x)))
        shake(self)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


# --- fold_bn


def numpy_affine(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 1, in NumPy's float64."""

    def values(tensor: Tensor | None, default: float) -> np.ndarray:
        size = len(layer.running_mean)
        return np.full(size, default) if tensor is None else tensor.detach().double().numpy()

    m = values(layer.weight, 1.0) / np.sqrt(values(layer.running_var, 1.0) + layer.eps)
    return m, values(layer.bias, 0.0) - m * values(layer.running_mean, 0.0)


@st.composite
def bn_and_input(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.integers(0, 3))
    channels = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims]
    layer = kind(channels, eps=draw(st.floats(1e-8, 0.5)), affine=draw(st.booleans()), dtype=dtype)
    if layer.affine and draw(st.booleans()):
        layer.bias = None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    with torch.no_grad():
        layer.running_mean.uniform_(-1, 1, generator=generator)
        layer.running_var.uniform_(0.2, 5, generator=generator)
        for parameter in layer.parameters():
            parameter.uniform_(-2, 2, generator=generator)
    z = torch.randn((7, channels, *draw(st.tuples(*[st.integers(1, 3)] * dims))), generator=generator, dtype=dtype)
    return layer, z


@settings(max_examples=60, deadline=None)
@given(bn_and_input())
def test_folded_layer_is_evaluation_mode(case: tuple[nn.Module, Tensor]) -> None:
    layer, z = case
    affine = fold_bn(layer)[""]
    expected = evaluated(layer, z)
    assert affine(z).dtype == z.dtype
    assert relative(affine(z), expected) < EXACT[z.dtype]
    for actual, reference in zip(affine, numpy_affine(layer), strict=True):
        np.testing.assert_allclose(actual.numpy(), reference, rtol=EXACT[z.dtype], atol=EXACT[z.dtype])


@pytest.mark.parametrize("case", LIGHT, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_bn_call_of_a_network_is_its_affine_map(case: Case, dtype: torch.dtype) -> None:
    model = case.build(dtype)
    before = fingerprint(model)
    folded = fold_bn(model)
    assert fingerprint(model) == before
    calls: list[str] = []

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            assert relative(folded[name](args[0]), output) < EXACT[dtype]
            calls.append(name)

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, layer in layers.items():
        layer.register_forward_hook(compare(name))
    with torch.no_grad():
        model.eval()(case.example(dtype=dtype))
    assert set(calls) == set(folded) == set(layers)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_fold_computes_in_wide_arithmetic(dtype: torch.dtype, expected: torch.dtype) -> None:
    layer = shake(nn.BatchNorm2d(5, eps=1e-3)).to(dtype)
    affine = fold_bn(layer)[""]
    for actual, reference in zip(affine, numpy_affine(layer), strict=True):
        assert actual.dtype == expected
        assert not actual.requires_grad
        np.testing.assert_allclose(actual.numpy(), reference, rtol=1e-6, atol=1e-7)


def test_fold_copies() -> None:
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    for tensor in fold_bn(layer)[""]:
        tensor.fill_(5.0)
    assert fold_bn(layer)[""].weight.lt(1).all()


def test_fold_of_frozen_bn_uses_its_own_eps() -> None:
    layer = FrozenBatchNorm2d(3, eps=0.25)
    layer.running_var.fill_(0.75)
    layer.running_mean.fill_(2.0)
    layer.bias.fill_(1.0)
    folded = fold_bn(nn.Sequential(nn.Conv2d(1, 3, 1), layer))
    assert list(folded) == ["1"]
    assert torch.equal(folded["1"].weight, torch.ones(3))
    assert torch.equal(folded["1"].bias, torch.full((3,), -1.0))


def test_frozen_and_trainable_layers_come_in_registration_order() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), FrozenBatchNorm2d(1), nn.BatchNorm2d(1))
    assert list(fold_bn(model)) == ["0", "1", "2"]


class Double(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


class Restless(nn.Module):
    """A parametrization that counts, and drifts, while in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, value: Tensor) -> Tensor:
        if self.training:
            self.factor += 1
        return value * self.factor


def test_fold_reads_the_computed_gamma() -> None:
    layer = shake(nn.BatchNorm2d(4))
    plain = fold_bn(layer)[""]
    parametrize.register_parametrization(layer, "weight", Double())
    doubled = fold_bn(layer)[""]
    assert torch.allclose(doubled.weight, 2 * plain.weight)
    assert relative(doubled(X.repeat(1, 2, 1, 1)[:, :4]), evaluated(layer, X.repeat(1, 2, 1, 1)[:, :4])) < 1e-6


def test_fold_leaves_a_parametrization_with_a_state_of_its_own_alone() -> None:
    model = Net()
    parametrize.register_parametrization(model.bn, "bias", Restless())
    model.train()
    before = fingerprint(model)
    fold_bn(model)
    assert fingerprint(model) == before
    assert relative(fuse_bn(model, X)(X), evaluated(model, X)) < 1e-5
    assert fingerprint(model) == before


def test_flag_turned_off_while_buffers_stay_folds_the_buffers() -> None:
    layer = shake(nn.BatchNorm2d(3))
    expected = fold_bn(layer)[""]
    layer.track_running_stats = False
    for actual, reference in zip(fold_bn(layer)[""], expected, strict=True):
        assert torch.equal(actual, reference)
    assert relative(expected(X), evaluated(layer, X)) < 1e-6


def test_fold_without_statistics_names_the_layer() -> None:
    model = small()
    model[4] = nn.BatchNorm2d(12, track_running_stats=False)
    with pytest.raises(BNSurgeryError, match=r"fold_bn needs running statistics, and '4' \(BatchNorm2d\) has none"):
        fold_bn(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_leave_no_trace_in_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = SMALL.build()
    assert list(fold_bn(wrap(model))) == ["1", "4", "8"]
    fused = fuse_bn(wrap(model), SMALL.example())
    assert type(fused) is nn.Sequential
    assert fused.fusion_plan.fused == (("0", "1"), ("3", "4"), ("7", "8"))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_inside_are_left_out_of_the_copy(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = SMALL.build()
    expected = evaluated(model, SMALL.example())
    outer = nn.Sequential(wrap(model[:4]), wrap(model[4]), model[5:])
    for example in (SMALL.example(), None):
        fused = fuse_bn(outer, example)
        assert set(fused.fusion_plan.fused) >= {("0.0", "0.1"), ("0.3", "1")}
        assert [type(module) for module in fused] == [nn.Sequential, nn.Identity, nn.Sequential]
        assert relative(fused(SMALL.example()), expected) < 1e-5


@pytest.mark.parametrize("call", [fold_bn, fuse_bn, plan_fusion])
def test_no_bn_layer_is_an_error_or_a_warning(call: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4))
    with pytest.raises(NoBatchNormError, match="Sequential has no batch-normalization layer"):
        call(model)
    with pytest.warns(BNSurgeryWarning, match="has no batch-normalization layer") as caught:
        result = call(model, strict=False)
    assert len(caught) == 1
    if call is fuse_bn:
        assert torch.equal(result(X), evaluated(model, X))
        assert result is not model
        assert result.fusion_plan == FusionPlan(())
    else:
        assert result == ({} if call is fold_bn else FusionPlan(()))


@pytest.mark.parametrize("call", [fold_bn, fuse_bn])
def test_layers_without_values_are_an_error(call: Callable[..., Any]) -> None:
    with pytest.raises(BNSurgeryError, match=r"'1' .*lazy and not yet initialised"):
        call(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d()))
    with pytest.raises(BNSurgeryError, match=r"'1' .*meta device"):
        call(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, device="meta")))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 2, 2)], ids=str)
def test_affine_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    affine = Affine(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"expected z of shape \(N, 3, \.\.\.\), got \("):
        affine(torch.zeros(shape))


# --- fuse_bn: right outputs

FUSED = {
    # with an example, and without: (fused, skipped)
    "small": ((3, 0), (2, 1)),
    "shared": ((2, 1), (2, 1)),
    "affine_free": ((3, 0), (2, 1)),
    "resnet20": ((21, 0), (21, 0)),
    "network_1d": ((2, 0), (2, 0)),
    "network_3d": ((2, 0), (2, 0)),
    "resnet18": ((20, 0), (20, 0)),
    "mobilenet_v3_small": ((34, 0), (34, 0)),
    "densenet121": ((59, 62), (59, 62)),
    "googlenet": ((57, 0), (57, 0)),
    "timm_mobilenetv3": ((34, 0), (34, 0)),
}


@pytest.mark.parametrize("case", LIGHT + HEAVY, ids=repr)
def test_fused_networks_compute_the_same(case: Case) -> None:
    model, x = case.build(), case.example()
    model.train()
    expected = evaluated(model, x)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    before = fingerprint(model)
    for example, count in zip((x, None), FUSED[case.name], strict=True):
        fused = fuse_bn(model, example)
        plan = fused.fusion_plan
        assert not any(module.training for module in fused.modules())
        with torch.no_grad():
            assert relative(fused(x), expected) < 1e-5
        assert (len(plan.fused), len(plan.skipped)) == count
        assert sorted([bn for _, bn in plan.fused] + [bn for bn, _ in plan.skipped]) == sorted(layers)
        assert all(len(reason) > 10 for _, reason in plan.skipped)
        remaining = {n for n, m in fused.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert remaining == {bn for bn, _ in plan.skipped}
        for producer, bn in plan.fused:
            assert fused.get_submodule(producer).bias.shape == (layers[bn].num_features,)
        assert plan == plan_fusion(model, example)
    assert fingerprint(model) == before


def test_densenet_says_why() -> None:
    case = next(case for case in HEAVY if case.name == "densenet121")
    plan = plan_fusion(case.build(), case.example())
    fused = [bn for _, bn in plan.fused]
    assert sum(bn.endswith("norm2") for bn in fused) == 58
    assert [bn for bn in fused if not bn.endswith("norm2")] == ["features.norm0"]
    reasons = {reason.split(" in ")[0].split(", not")[0] for _, reason in plan.skipped}
    assert reasons == {"its input is the output of cat"}


@st.composite
def producers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A layer and its input, of any kind, with groups, strides, dilation and padding."""
    dims = draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    bias, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 99)))
    if dims == 0:
        return nn.Linear(inputs, outputs, bias, dtype=dtype), torch.randn(4, inputs, dtype=dtype)
    options: dict[str, Any] = {
        "groups": groups,
        "bias": bias,
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding": 1,
        "dtype": dtype,
    }
    if draw(st.booleans()):
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    else:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        modes = ["zeros", "circular", "replicate"] + ["reflect"] * (dims < 3)
        options["padding_mode"] = draw(st.sampled_from(modes))
    layer = kinds[dims - 1](inputs, outputs, 3, **options)
    return layer, torch.randn(2, inputs, *[5] * dims, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(producers())
def test_any_producer_fuses(case: tuple[nn.Module, Tensor]) -> None:
    producer, x = case
    outputs = producer.out_features if isinstance(producer, nn.Linear) else producer.out_channels
    bn = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[x.ndim - 1]
    model = nn.Sequential(producer, shake(bn(outputs, dtype=x.dtype)))
    fused = fuse_bn(model, x)
    assert fused.fusion_plan.fused == (("0", "1"),)
    assert relative(fused(x), evaluated(model, x)) < {torch.float32: 1e-5, torch.float64: 1e-12}[x.dtype]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
    ids=str,
)
def test_dtypes_are_kept(dtype: torch.dtype, tolerance: float) -> None:
    model, x = SMALL.build(dtype), SMALL.example(dtype=dtype)
    fused = fuse_bn(model, x)
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    assert len(fused.fusion_plan.fused) == 3
    assert relative(fused(x), evaluated(model.double(), x.double())) < tolerance


def test_half_precision_is_rounded_once() -> None:
    conv, bn = nn.Conv2d(3, 8, 3), shake(nn.BatchNorm2d(8))
    conv, bn = conv.to(torch.bfloat16), bn.to(torch.bfloat16)
    ((weight, bias),) = fused_parameters([(conv, bn)])
    m, b = numpy_affine(bn)
    exact = m[:, None, None, None] * conv.weight.detach().double().numpy()
    assert torch.equal(weight, torch.from_numpy(exact).to(torch.bfloat16))
    assert torch.equal(bias, torch.from_numpy(m * conv.bias.detach().double().numpy() + b).to(torch.bfloat16))


def test_memory_format_is_kept() -> None:
    model = NETWORK_3D.build().to(memory_format=torch.channels_last_3d)
    fused = fuse_bn(model, NETWORK_3D.example())
    for index in (0, 3):
        assert fused[index].weight.stride() == model[index].weight.stride()


def test_gradients_with_respect_to_the_input_agree() -> None:
    model = RESNET20.build().eval()
    gradients = []
    for network in (model, fuse_bn(model, RESNET20.example())):
        x = RESNET20.example().requires_grad_()
        gradients.append(torch.autograd.grad(F.cross_entropy(network(x), RESNET20.labels()), x)[0])
    assert relative(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize("example", [X, None], ids=["example", "symbolic"])
def test_frozen_bn_is_fused(example: Tensor | None) -> None:
    torch.manual_seed(0)
    frozen = FrozenBatchNorm2d(8, eps=0.3)
    for buffer in frozen.buffers():
        buffer.uniform_(0.5, 2)
    model = Net(bn=frozen)
    fused = fuse_bn(model, example)
    assert fused.fusion_plan.fused == (("conv", "bn"),)
    assert not isinstance(fused.bn, FrozenBatchNorm2d)
    assert relative(fused(X), evaluated(model, X)) < 1e-5


@pytest.mark.parametrize("example", [X, None], ids=["example", "symbolic"])
@pytest.mark.parametrize("apply_act", [True, False])
def test_timm_activation_and_dropout_stay(example: Tensor | None, apply_act: bool) -> None:
    model = Net(bn=BatchNormAct2d(8, apply_act=apply_act, act_layer=nn.GELU, drop_layer=nn.Dropout))
    fused = fuse_bn(model, example)
    assert fused.fusion_plan.fused == (("conv", "bn"),)
    assert [type(module) for module in fused.bn] == [nn.Dropout, nn.GELU if apply_act else nn.Identity]
    assert relative(fused(X), evaluated(model, X)) < 1e-5


@pytest.mark.parametrize("example", [X, None], ids=["example", "symbolic"])
@pytest.mark.parametrize(
    "layer", [BatchNormAct2d(8, eps=0.2, act_layer=nn.GELU), nn.BatchNorm2d(8)], ids=["act", "plain"]
)
def test_what_timm_freezes_folds_and_fuses(example: Tensor | None, layer: nn.Module) -> None:
    model = timm.layers.freeze_batch_norm_2d(Net(bn=shake(copy.deepcopy(layer))))
    kind = type(model.bn).__name__
    with pytest.raises(NoBatchNormError, match="its 1 layers of frozen BN can only be folded and fused"):
        bn_layers(model)
    z = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    behind = model.bn.act if kind == "FrozenBatchNormAct2d" else nn.Identity()
    assert relative(behind(fold_bn(model)["bn"](z)), model.bn(z)) < 1e-6
    fused = fuse_bn(model, example)
    assert fused.fusion_plan.fused == (("conv", "bn"),)
    assert not any(type(module).__name__ == kind for module in fused.modules())
    assert relative(fused(X), evaluated(model, X)) < 1e-5


def test_synchronized_timm_layers_are_fused() -> None:
    model = Net(bn=timm.layers.convert_sync_batchnorm(BatchNormAct2d(8)))
    assert type(model.bn) is timm.layers.SyncBatchNormAct
    fused = fuse_bn(shake(model), X)
    assert fused.fusion_plan.fused == (("conv", "bn"),)
    assert relative(fused(X), evaluated(model, X)) < 1e-5


def test_attributes_that_forward_does_not_use_are_no_activation() -> None:
    model = Net(bn=Renamed(8))
    model.bn.drop, model.bn.act = nn.Dropout(), nn.ReLU()
    fused = fuse_bn(model, X)
    assert type(fused.bn) is nn.Identity
    assert relative(fused(X), evaluated(model, X)) < 1e-5


def test_fold_of_timm_is_the_affine_part() -> None:
    layer = shake(BatchNormAct2d(3))
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(layer.state_dict())
    assert relative(fold_bn(layer)[""](X), evaluated(plain, X)) < 1e-6
    assert evaluated(layer, X).min() == 0


def test_sync_batch_norm_is_fused() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(SMALL.build())
    expected = evaluated(SMALL.build(), SMALL.example())
    fused = fuse_bn(model, SMALL.example())
    assert len(fused.fusion_plan.fused) == 3
    assert relative(fused(SMALL.example()), expected) < 1e-5


def test_parametrized_gamma_is_fused() -> None:
    model = Net()
    parametrize.register_parametrization(model.bn, "weight", Double())
    for example in (X, None):
        fused = fuse_bn(model, example)
        assert fused.fusion_plan.fused == (("conv", "bn"),)
        assert relative(fused(X), evaluated(model, X)) < 1e-5


class Renamed(nn.BatchNorm2d):
    """A subclass that computes what its base does."""


def test_subclasses_that_inherit_forward_are_fused() -> None:
    model = Net(bn=Renamed(8))
    assert relative(fuse_bn(model, X)(X), evaluated(model, X)) < 1e-5
    assert plan_fusion(model).fused == (("conv", "bn"),)


@pytest.mark.parametrize("stats", ["update", "frozen", "batch"])
def test_models_whose_training_is_chosen_are_fused(stats: str) -> None:
    model = RESNET20.build()
    expected = evaluated(model, RESNET20.example())
    with freeze_except_bn(model, stats=stats):
        model.train()
        before = fingerprint(model)
        fused = fuse_bn(model, RESNET20.example())
        assert len(fused.fusion_plan.fused) == 21
        assert relative(fused(RESNET20.example()), expected) < 1e-5
        assert fingerprint(model) == before
        assert not any(p.requires_grad for name, p in fused.named_parameters() if "conv" in name)


def test_requires_grad_follows_the_weight() -> None:
    model = Net(other=nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)))
    model.body = lambda net, x: net.other(net.bn(net.conv(x)))
    model.conv.weight.requires_grad_(False)
    fused = fuse_bn(model, X)
    assert [(name, p.requires_grad) for name, p in fused.named_parameters()] == [
        ("conv.weight", False),
        ("conv.bias", False),
        ("other.0.weight", True),
        ("other.0.bias", True),
    ]


def test_tied_weights_part_in_the_copy_alone() -> None:
    model = Net(other=nn.Conv2d(3, 8, 3, padding=1), plain=nn.Conv2d(3, 8, 3, padding=1), bn2=nn.BatchNorm2d(8))
    model.body = lambda net, x: net.bn(net.conv(x)) + net.bn2(net.other(x)) * net.plain(x)
    for conv in (model.other, model.plain):
        conv.weight, conv.bias = model.conv.weight, model.conv.bias
    for example in (X, None):
        fused = fuse_bn(model, example)
        assert fused.fusion_plan.fused == (("conv", "bn"), ("other", "bn2"))
        assert relative(fused(X), evaluated(model, X)) < 1e-5
        assert torch.equal(fused.plain.weight, model.plain.weight)
        assert model.conv.weight is model.other.weight is model.plain.weight


def test_layers_under_several_names_are_replaced_everywhere() -> None:
    model = Net(lambda net, x: F.relu(net.aliases[1](net.aliases[0](x))))
    model.again = nn.ModuleDict({"norm": model.bn, "conv": model.conv})
    model.aliases = [model.conv, model.again["norm"]]
    for example in (X, None):
        fused = fuse_bn(model, example)
        assert fused.fusion_plan.fused == (("conv", "bn"),)
        assert fused.bn is fused.again["norm"] is fused.aliases[1]
        assert fused.conv is fused.again["conv"] is fused.aliases[0]
        assert type(fused.bn) is nn.Identity
        assert relative(fused(X), evaluated(model, X)) < 1e-5


def test_what_returns_its_input_in_evaluation_is_looked_through() -> None:
    model = Net(lambda net, x: net.bn(net.drop(net.same(net.conv(x)))), drop=nn.Dropout(), same=nn.Identity())
    for example in (X, None):
        fused = fuse_bn(model, example)
        assert fused.fusion_plan.fused == (("conv", "bn"),)
        assert relative(fused(X), evaluated(model, X)) < 1e-5


def test_asking_for_a_shape_is_no_use() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        n, c = y.shape[0], y.size(1)
        return net.bn(y).view(n, c, -1).to(y.dtype).mean(y.dim() - 2)

    model = Net(body)
    for example in (X, None):
        fused = fuse_bn(model, example)
        assert fused.fusion_plan.fused == (("conv", "bn"),)
        assert relative(fused(X), evaluated(model, X)) < 1e-5


# --- fuse_bn: refusals


class Squared(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class Cube(torch.autograd.Function):
    """Takes its input out of sight of ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError


class Keeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = [x]
        return x


def branches(use: Callable[..., Any]) -> Callable[[Net, Tensor], Any]:
    """The convolution's output goes through BN, and elsewhere."""

    def body(net: Net, x: Tensor) -> Any:
        y = net.conv(x)
        return use(net, x, y, net.bn(y))

    return body


def hooked(part: str, register: str) -> Net:
    model = Net(tail=nn.Sequential(nn.Identity()))
    model.body = lambda net, x: net.bn(net.tail(net.conv(x)))
    getattr(model.get_submodule(part), register)(lambda *_: None)
    return model


def weight_norm() -> Net:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.conv)
    return model


def parametrized() -> Net:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.conv)
    return model


def patched(part: str) -> Net:
    model = Net()
    layer = getattr(model, part)
    layer.forward = functools.partial(type(layer).forward, layer)
    return model


CONV = r"'conv' \(Conv2d\)"
REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution called twice": (
        lambda: Net(lambda net, x: net.bn(net.conv(x)) + net.conv(x)),
        rf"{CONV} feeds it, but is called 2 times",
    ),
    "BN called twice": (lambda: Net(lambda net, x: net.bn(net.bn(net.conv(x)))), "it is called 2 times"),
    "output added": (
        lambda: Net(branches(lambda net, x, y, z: y + z)),
        rf"the output of {CONV} is also used by add",
    ),
    "output changed in place": (
        lambda: Net(lambda net, x: net.bn(F.relu_(net.conv(x)))),
        rf"the output of {CONV} is also used by relu_|its input is the output of relu_",
    ),
    "output in a list": (
        lambda: Net(branches(lambda net, x, y, z: torch.cat([z, y], 1))),
        rf"the output of {CONV} is also used by cat",
    ),
    "output viewed": (
        lambda: Net(branches(lambda net, x, y, z: z[:, 1:] * y[:, :1])),
        rf"the output of {CONV} is also used by (slice|getitem)",
    ),
    "output in a module": (
        lambda: Net(branches(lambda net, x, y, z: z + net.act(y)), act=nn.ReLU()),
        rf"the output of {CONV} is also used by .*'act' \(ReLU\)",
    ),
    "output returned": (
        lambda: Net(branches(lambda net, x, y, z: {"z": z, "y": [y]})),
        rf"the output of {CONV} is also used by the model's outputs",
    ),
    "output kept": (
        lambda: Net(lambda net, x: net.bn(net.keep(net.conv(x))), keep=Keeps()),
        rf"the output of {CONV} is also used by attribute 'kept' of 'keep' \(Keeps\)",
    ),
    "output seen by another BN": (
        lambda: Net(branches(lambda net, x, y, z: z + net.bn2(y)), bn2=nn.BatchNorm2d(8)),
        rf"the output of {CONV} is also used by 'bn2' \(BatchNorm2d\)",
    ),
    "forward hook on the convolution": (
        lambda: hooked("conv", "register_forward_hook"),
        rf"{CONV} feeds it, but it has hooks, which would see another output: remove them",
    ),
    "forward pre-hook on the convolution": (
        lambda: hooked("conv", "register_forward_pre_hook"),
        rf"{CONV} feeds it, but it has hooks",
    ),
    "backward hook on the convolution": (
        lambda: hooked("conv", "register_full_backward_hook"),
        rf"{CONV} feeds it, but it has hooks",
    ),
    "forward hook on BN": (
        lambda: hooked("bn", "register_forward_hook"),
        "it has hooks, which would no longer see its input and output: remove them",
    ),
    "forward pre-hook on BN": (lambda: hooked("bn", "register_forward_pre_hook"), "it has hooks"),
    "backward pre-hook on BN": (lambda: hooked("bn", "register_full_backward_pre_hook"), "it has hooks"),
    "hook between": (
        lambda: hooked("tail", "register_forward_hook"),
        rf"the output of {CONV} is also used by a hook on 'tail' \(Sequential\)",
    ),
    "parametrized weight": (
        parametrized,
        r"'conv' \(ParametrizedConv2d\) feeds it, but it is parametrized: .*remove_parametrizations",
    ),
    "weight_norm by hooks": (weight_norm, rf"{CONV} feeds it, but its weight .*computed: .*remove_weight_norm"),
    "BN with a forward of its own": (
        lambda: Net(bn=Squared(8)),
        "Squared has a forward of its own, which may do more than normalise",
    ),
    "BN with a patched forward": (lambda: patched("bn"), "BatchNorm2d has a forward of its own"),
    "convolution with a forward of its own": (
        lambda: Net(conv=Standardized(3, 8, 3)),
        r"'conv' \(Standardized\) feeds it, but Standardized has a forward of its own, .*that of Conv2d",
    ),
    "convolution with half a forward of its own": (
        lambda: Net(conv=Scaled(3, 8, 3)),
        r"'conv' \(Scaled\) feeds it, but Scaled has a forward of its own",
    ),
    "convolution with a patched forward": (
        lambda: patched("conv"),
        rf"{CONV} feeds it, but Conv2d has a forward of its own",
    ),
    "no statistics": (
        lambda: Net(bn=nn.BatchNorm2d(8, track_running_stats=False)),
        "it has no running statistics: build it with track_running_stats=True",
    ),
    "BN never reached": (lambda: Net(lambda net, x: net.conv(x)), "it was not reached when the model was traced"),
    "BN after an activation": (
        lambda: Net(lambda net, x: net.bn(net.act(net.conv(x))), act=nn.ReLU()),
        r"its input is the output of 'act' \(ReLU\), not of a convolution or linear layer",
    ),
    "BN after a function": (
        lambda: Net(lambda net, x: net.bn(torch.tanh(net.conv(x)))),
        "its input is the output of tanh.*, not of a convolution or linear layer",
    ),
    "BN first": (
        lambda: Net(lambda net, x: net.bn(x), bn=nn.BatchNorm2d(3)),
        "its input is the model's input, not of",
    ),
    "BN at the root": (lambda: shake(nn.BatchNorm2d(3)), "its input is the model's input"),
    "convolution's weight used elsewhere": (
        lambda: Net(lambda net, x: net.bn(net.conv(x)) * net.conv.weight.mean()),
        rf"{CONV} feeds it, but its weight or bias is also used by mean",
    ),
    "convolution's weight convolves elsewhere": (
        lambda: Net(lambda net, x: net.bn(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1)),
        rf"{CONV} feeds it, but its weight or bias is also used by conv",
    ),
    "BN's gamma used elsewhere": (
        lambda: Net(lambda net, x: net.bn(net.conv(x)) * net.bn.weight.sum()),
        "its parameters or statistics are also used by sum",
    ),
    "BN's statistics used elsewhere": (
        lambda: Net(lambda net, x: net.bn(net.conv(x)) * net.bn.running_var.sum()),
        "its parameters or statistics are also used by sum",
    ),
}
EAGER_ALONE = {
    "output in a custom autograd function": (
        lambda: Net(branches(lambda net, x, y, z: z + Cube.apply(y))),
        rf"the output of {CONV} is also used by pow",
    ),
    "forward of the convolution called by name": (
        lambda: Net(lambda net, x: net.bn(net.conv(x)) + net.conv.forward(x)),
        rf"{CONV} feeds it, but is called 2 times",
    ),
    "other dtype": (
        lambda: Net(lambda net, x: net.bn(net.conv(x.bfloat16())), conv=nn.Conv2d(3, 8, 3, dtype=torch.bfloat16)),
        rf"{CONV} feeds it, but it is torch.bfloat16 on cpu, and BN is torch.float32 on cpu",
    ),
    "linear layer over a sequence": (
        lambda: Net(lambda net, x: net.bn(net.conv(x.flatten(2))), conv=nn.Linear(64, 3), bn=nn.BatchNorm1d(3)),
        r"the output of 'conv' \(Linear\) has 3 dimensions, not 2: the channels are not in dimension 1",
    ),
    "convolution without a batch": (
        lambda: Net(lambda net, x: net.bn(net.conv(x[0].flatten(1))), conv=nn.Conv1d(3, 4, 61), bn=nn.BatchNorm1d(4)),
        r"the output of 'conv' \(Conv1d\) has 2 dimensions, not 3: the channels are not in dimension 1",
    ),
}
SYMBOLIC_ALONE = {
    "linear layer of unknown shape": (
        lambda: Net(lambda net, x: net.bn(net.conv(x.flatten(1))), conv=nn.Linear(192, 4), bn=nn.BatchNorm1d(4)),
        r"the shape of what 'conv' \(Linear\) returns is unknown without example_input, and only \(N, C\) will do",
    ),
    "other number of channels": (
        lambda: Net(bn=nn.BatchNorm2d(4)),
        rf"{CONV} feeds it, but it has 8 output channels, and BN normalises 4",
    ),
    "BN asked for its dtype": (
        lambda: Net(lambda net, x: net.bn(net.conv(x.to(net.bn.weight.dtype)))),
        "its parameters or statistics are also used by the model's forward",
    ),
}
BOTH = [(X, name, *case) for name, case in (REFUSALS | EAGER_ALONE).items()]
BOTH += [(None, name, *case) for name, case in (REFUSALS | SYMBOLIC_ALONE).items()]


@pytest.mark.parametrize(
    ("example", "name", "make", "reason"),
    BOTH,
    ids=[f"{'symbolic' if example is None else 'example'}: {name}" for example, name, *_ in BOTH],
)
def test_refusals_say_why(example: Tensor | None, name: str, make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    before = fingerprint(model)
    plan = plan_fusion(model, example)
    assert plan.fused == ()
    names = [bn for bn, _ in plan.skipped]
    assert names == [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert re.search(reason, plan.skipped[0][1]), plan.skipped[0][1]
    assert fingerprint(model) == before
    with pytest.warns(BNSurgeryWarning, match="no BN layer was fused") as caught:
        fused = fuse_bn(model, example)
    assert plan.skipped[0][1] in str(caught[0].message)
    assert fingerprint(model) == before
    if name != "other number of channels":
        with torch.no_grad():
            expected, actual = model.eval()(X), fused(X)
        if isinstance(expected, dict):
            expected, actual = expected["z"], actual["z"]
        assert torch.equal(actual, expected)


def test_layer_held_in_training_mode_is_refused() -> None:
    class AlwaysTraining(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    for example in (X, None):
        assert plan_fusion(Net(bn=AlwaysTraining(8)), example).skipped == (
            ("bn", "it stays in training mode in model.eval()"),
        )


# --- fuse_bn: what is verified, and what is left alone

WRONG = FusionPlan((("conv", "bn"),))


def twice() -> Net:
    return Net(branches(lambda net, x, y, z: z + y))


def test_verification_refuses_a_wrong_copy_and_changes_nothing() -> None:
    model = twice().train()
    model(X).sum().backward()
    before = fingerprint(model)
    with pytest.raises(FusionError, match=r"relative error of \d\.\de[-+]\d\d, and the tolerance is 1e-04"):
        fuse_bn(model, X, plan=WRONG)
    assert fingerprint(model) == before
    assert relative(fuse_bn(model, plan=WRONG)(X), evaluated(model, X)) > 1e-2  # unverified without an example


@dataclasses.dataclass
class Output:
    logits: Tensor
    features: dict[str, list[Tensor]]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: (x, [y]),
        lambda x, y: {"x": x, "nested": ({"y": y},)},
        lambda x, y: Output(x, {"y": [y]}),
        lambda x, y: (x, None, "text", y.argmax(1)),
    ],
    ids=["list", "dict", "dataclass", "indices"],
)
def test_verification_sees_every_tensor_in_the_outputs(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    right = Net(lambda net, x: wrap(x, net.bn(net.conv(x))))
    assert fuse_bn(right, X).fusion_plan == WRONG
    wrong = Net(lambda net, x: wrap(x, net.bn(net.conv(x)) + net.conv(x)))
    with pytest.raises(FusionError, match="relative error"):
        fuse_bn(wrong, X, plan=WRONG)


def test_verification_needs_something_to_compare() -> None:
    class Opaque:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    with pytest.raises(FusionError, match="returns no tensor that could be compared: let it return tensors"):
        fuse_bn(Net(lambda net, x: Opaque(net.bn(net.conv(x)))), X)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan], ids=str)
def test_what_is_not_finite_in_both_is_no_difference_and_hides_none(value: float) -> None:
    def masked(net: Net, x: Tensor, z: Tensor) -> Tensor:
        return z.masked_fill(x[:, :1] > 0.5, value)

    right = Net(lambda net, x: masked(net, x, net.bn(net.conv(x))))
    assert fuse_bn(right, X).fusion_plan == WRONG
    wrong = Net(lambda net, x: masked(net, x, net.bn(net.conv(x)) + net.conv(x)))
    with pytest.raises(FusionError, match="relative error"):
        fuse_bn(wrong, X, plan=WRONG)


def test_rounding_is_measured_by_the_size_of_the_outputs() -> None:
    assert fuse_bn(Net(lambda net, x: 1e8 * net.bn(net.conv(x))), X).fusion_plan == WRONG
    with pytest.raises(FusionError, match="relative error"):
        fuse_bn(Net(lambda net, x: 1e-8 * (net.bn(net.conv(x)) + net.conv(x))), X, plan=WRONG)


def test_a_nan_in_the_copy_alone_is_a_difference() -> None:
    nan = Net(lambda net, x: torch.stack([x, torch.full_like(x, torch.nan if type(net.bn) is nn.Identity else 1.0)]))
    with pytest.raises(FusionError, match="relative error of inf"):
        fuse_bn(nan, X, plan=WRONG)


def test_verification_names_other_shapes() -> None:
    model = Net(lambda net, x: net.bn(net.conv(x))[: 1 if type(net.bn) is nn.Identity else 2])
    with pytest.raises(FusionError, match=r"shapes \[\(2, 8, 8, 8\)\], and the fused copy \[\(1, 8, 8, 8\)\]"):
        fuse_bn(model, X)


def test_a_forward_that_needs_the_bn_layer_is_an_error() -> None:
    model = Net(lambda net, x: net.bn(net.conv(x)) * net.bn.num_features)
    with pytest.raises(
        FusionError, match=r"the fused copy does not run on example_input \(AttributeError: .*num_features"
    ):
        fuse_bn(model, X)


def test_random_outputs_are_compared_under_one_seed_and_global_state_stays() -> None:
    model = Net(lambda net, x: net.bn(net.conv(x)) + torch.rand(()) + random.random() + np.random.rand())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for example in (X, None):
        fuse_bn(model, example)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_the_original_is_not_run() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        net.last = net.bn(net.conv(x))
        net.seen = net.seen + 1
        return net.last

    model = Net(body)
    model.register_buffer("seen", torch.zeros(()))
    before = fingerprint(model)
    for example in (X, None):
        fuse_bn(model, example)
    assert fingerprint(model) == before


def test_the_input_is_not_written_to() -> None:
    x = X.clone() - 0.5
    model = Net(lambda net, x: net.bn(net.conv(x.relu_())))
    fused = fuse_bn(model, x)
    assert torch.equal(x, X - 0.5)
    assert relative(fused(x.clone()), evaluated(model, x.clone())) < 1e-5


def test_gradients_and_training_mode_of_the_original_stay() -> None:
    model = RESNET20.build().train()
    model.stages[1].eval()
    F.cross_entropy(model(RESNET20.example()), RESNET20.labels()).backward()
    before = fingerprint(model)
    fused = fuse_bn(model, RESNET20.example())
    assert fingerprint(model) == before
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1)
    assert fingerprint(model) == before
    assert all(parameter.grad is None for parameter in fused.parameters())


def test_hooks_elsewhere_stay_on_both() -> None:
    model = SMALL.build()
    seen: list[nn.Module] = []
    model[2].register_forward_hook(lambda module, *_: seen.append(module))
    fused = fuse_bn(model)
    assert seen == []
    fused(SMALL.example())
    assert seen == [fused[2]]


def test_nothing_stays_on_the_copy_but_its_plan() -> None:
    model = Net()
    fused = fuse_bn(model, X)
    assert set(vars(fused)) - set(vars(model)) == {"fusion_plan"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fused.modules())
    assert not any("forward" in vars(module) for module in fused.modules())


def test_features_kept_from_a_training_step_do_not_hinder_the_copy() -> None:
    model = Net(branches(lambda net, x, y, z: setattr(net, "features", [z]) or z))
    model.train()(X)
    kept = model.features[0]
    fused = fuse_bn(model, X)
    assert model.features[0] is kept
    assert kept.grad_fn is not None
    assert relative(fused(X), evaluated(fuse_bn(model), X)) == 0


def test_a_model_that_cannot_be_copied_is_an_error() -> None:
    model = Net()
    model.lock = threading.Lock()
    for call in (plan_fusion, fuse_bn):
        with pytest.raises(
            FusionError, match=r"Net cannot be copied \(TypeError: .*lock.*make it work with copy.deepcopy"
        ):
            call(model, X)


def test_a_model_that_does_not_run_on_the_example_is_an_error() -> None:
    model = Net()
    before = fingerprint(model)
    with pytest.raises(
        FusionError, match=r"Net does not run on example_input \(RuntimeError: .*: pass a tensor, or a tu"
    ):
        fuse_bn(model, X[:, :2])
    assert fingerprint(model) == before


def test_control_flow_asks_for_an_example() -> None:
    model = Net(lambda net, x: net.bn(net.conv(x)) if x.sum() > 0 else x)
    before = fingerprint(model)
    with pytest.raises(FusionError, match=r"Net cannot be traced without an input .*: pass example_input, a tensor or"):
        fuse_bn(model)
    assert fingerprint(model) == before
    assert relative(fuse_bn(model, X)(X), evaluated(model, X)) < 1e-5


def test_forward_of_the_instance_asks_for_an_example() -> None:
    model = Net(lambda net, x: net.bn(net.conv(x)))
    model.forward = functools.partial(lambda net, x: net.conv(x) + net.bn(net.conv(x)), model)
    with pytest.raises(FusionError, match=r"forward is an attribute of the instance.*pass example_input"):
        plan_fusion(model)
    assert plan_fusion(model, X).fused == ()


class Optional(Net):
    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 2.0, *, flip: bool = False) -> Tensor:
        y = self.conv(x)
        z = self.bn(y) * scale
        if flip:
            z = z + y
        return z if shift is None else z + self.bn(shift)


def test_optional_arguments_are_traced_at_their_defaults() -> None:
    model = Optional()
    for example in (X, (X, None, 3.0), None):
        fused = fuse_bn(model, example)
        assert fused.fusion_plan == WRONG
        assert relative(fused(X, scale=3.0), evaluated(model, X, None, 3.0)) < 1e-5
    plan = plan_fusion(model, (X, torch.zeros(2, 8, 8, 8)))
    assert plan.skipped == (("bn", "it is called 2 times"),)


# --- plans


def test_a_plan_is_immutable_and_prints() -> None:
    plan = plan_fusion(SHARED.build(), SHARED.example())
    assert plan == FusionPlan((("conv0", "bn0"), ("conv3", "bn3")), (("bn", "it is called 2 times"),))
    assert str(plan) == (
        "fuses 2 of 3 BN layers\n  'bn0' into 'conv0'\n  'bn3' into 'conv3'\n  not 'bn': it is called 2 times"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.fused = ()
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert hash(plan) == hash(copy.deepcopy(plan))


def test_part_of_a_plan_can_be_applied() -> None:
    model = SHARED.build()
    plan = FusionPlan((("conv3", "bn3"),))
    for example in (SHARED.example(), None):
        fused = fuse_bn(model, example, plan=plan)
        assert fused.fusion_plan is plan
        assert type(fused.bn3) is nn.Identity
        assert type(fused.bn0) is nn.BatchNorm2d
        assert relative(fused(SHARED.example()), evaluated(model, SHARED.example())) < 1e-5


@pytest.mark.parametrize(
    ("pair", "change", "message"),
    [
        (("conv9", "bn"), None, "in 'bn' after 'conv9': the model has no such modules; make it anew"),
        (("conv", "bn9"), None, "in 'bn9' after 'conv': the model has no such modules"),
        (("bn", "conv"), None, "they are BatchNorm2d and Conv2d"),
        (("conv", "bn"), lambda net: net.bn.register_forward_hook(print), "it has hooks"),
        (("conv", "bn"), lambda net: net.conv.register_forward_hook(print), "it has hooks"),
        (("conv", "bn"), lambda net: setattr(net, "bn", nn.BatchNorm2d(4)), "8 output channels, and BN normalises 4"),
    ],
)
def test_a_plan_for_another_model_is_an_error(pair: tuple[str, str], change: Any, message: str) -> None:
    model = Net()
    if change is not None:
        change(model)
    with pytest.raises(FusionError, match=f"the plan does not fit the model .*{message}"):
        fuse_bn(model, plan=FusionPlan((pair,)))


def test_fused_copies_can_be_copied_and_stored() -> None:
    model, x = RESNET20.build(), RESNET20.example()
    fused = fuse_bn(model, x)
    expected = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), expected)
        assert other.fusion_plan == fused.fusion_plan
    assert "fusion_plan" not in fused.state_dict()


def test_a_fused_copy_has_nothing_left_to_fuse() -> None:
    fused = fuse_bn(SMALL.build(), SMALL.example())
    with pytest.raises(NoBatchNormError):
        fuse_bn(fused)


def test_fused_parameters_change_nothing_and_follow_the_live_layers() -> None:
    model = Net().train()
    before = fingerprint(model)
    ((weight, bias),) = fused_parameters([(model.conv, model.bn)])
    assert fingerprint(model) == before
    assert not weight.requires_grad
    assert not bias.requires_grad
    with torch.no_grad():
        model.bn.weight.mul_(3)
        model.bn.bias.mul_(3)
    (tripled,) = fused_parameters([(model.conv, model.bn)])
    assert torch.allclose(tripled[0], 3 * weight)
    assert torch.allclose(tripled[1], 3 * bias, atol=1e-6)


def test_rounding_of_a_deep_network_is_no_wrong_plan() -> None:
    """Layers that amplify what they are given amplify rounding too, here beyond the tolerance of float32."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(25):
        conv, bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        nn.init.normal_(conv.weight, std=0.4)
        nn.init.normal_(bn.bias)
        layers += [conv, bn, nn.Tanh()]
    model = nn.Sequential(*layers).eval()
    x = torch.rand(2, 8, 6, 6)
    with torch.no_grad():
        rounding = relative(model(x), copy.deepcopy(model).double()(x.double()).float())
    assert rounding > 1e-4
    assert len(fuse_bn(model, x).fusion_plan.fused) == 25
