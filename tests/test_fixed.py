"""BN layers that stay in a copy: the same outputs and gradients as torch's, with less kept and done."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bnsurgery._fixed
from bnsurgery._fixed import fix
from networks import shake
from odd_networks import Concatenated, batches, wide
from test_engine import assert_same, replica_of

LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def frozen(layer: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shake(layer).double().eval().requires_grad_(False)


def example(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dims", "shape"), [(1, (4, 3)), (1, (4, 3, 5)), (2, (4, 3, 5, 2)), (3, (2, 3, 4, 5, 2))])
def test_outputs_and_gradients_of_all_orders_are_those_of_torch(
    dims: int, shape: tuple[int, ...], affine: bool
) -> None:
    plain = frozen(LAYERS[dims](3, affine=affine, eps=0.01))
    fixed = copy.deepcopy(plain)
    fix(fixed)
    ends = []
    for layer in (plain, fixed):
        x = example(*shape)
        out = layer(x)
        (gradient,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
        ends.append((out.detach(), gradient.detach(), second))
    for expected, found in zip(*ends, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(*(layer(example(*shape).detach()) for layer in (plain, fixed)))
    with pytest.raises(ValueError, match="expected"):
        fixed(example(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_too(dtype: torch.dtype) -> None:
    plain = frozen(nn.BatchNorm2d(3)).float()
    fixed = copy.deepcopy(plain)
    fix(fixed)
    ends = []
    for layer in (plain, fixed):
        x = example(4, 3, 5, 5).detach().to(dtype).requires_grad_()
        out = layer(x)
        assert out.dtype == dtype
        ends.append((out, *torch.autograd.grad(out.float().pow(3).sum(), x)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.allclose(ends[0][1].float(), ends[1][1].float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_scale_beyond_half_precision_is_no_obstacle() -> None:
    layer = nn.BatchNorm2d(1, eps=1e-12).half().eval().requires_grad_(False)
    layer.running_var.zero_()  # type: ignore[union-attr]
    fix(layer)
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(x) * 0).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_where_it_does_not_run_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such gradient")

    monkeypatch.setattr(bnsurgery._fixed._Affine, "backward", staticmethod(fails))
    model, ((x, _),) = wide(Concatenated)().eval(), batches(6)
    replica = replica_of(model, x)
    assert not any("forward" in vars(module) for module in replica.net.modules())


class Mapped(Concatenated):
    """Maps over the examples."""

    def neck(self, z: Tensor) -> Tensor:
        return torch.func.vmap(lambda one: super(Mapped, self).neck(one[None])[0])(z)


def test_a_map_over_examples_is_no_obstacle() -> None:
    assert_same(wide(Mapped), batches(6, 6), train="bn-params", callbacks=[])


def test_the_input_is_not_kept() -> None:
    fixed = frozen(nn.BatchNorm2d(3))
    fix(fixed)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        fixed(example(4, 3, 5, 5))
    assert kept == [(3,), (3,)]


class Own(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        Own(3).eval().requires_grad_(False),
        nn.BatchNorm2d(3, track_running_stats=False).eval().requires_grad_(False),
        nn.BatchNorm2d(3).eval(),
        nn.BatchNorm2d(3).train().requires_grad_(False),
        nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None).eval().requires_grad_(False),
    ],
    ids=["forward of its own", "no statistics", "trains", "training mode", "parametrized"],
)
def test_others_are_left_alone(layer: nn.Module) -> None:
    fix(layer)
    assert "forward" not in vars(layer)


def test_copies_use_it_and_the_model_does_not() -> None:
    model, ((x, _),) = wide(Concatenated)().eval(), batches(6)
    replica = replica_of(model, x)
    changed = [name for name, module in replica.net.named_modules() if "forward" in vars(module)]
    assert changed == ["run.bn2"]
    assert not any("forward" in vars(module) for module in model.modules())
    compiled = replica_of(model, x, compile=True).net.get_submodule("run._orig_mod.bn2")
    assert "forward" not in vars(compiled)
