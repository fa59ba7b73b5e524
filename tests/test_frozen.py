"""Frozen convolutions in a training step against torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnsurgery import PGD, adv_finetune, freeze_except_bn
from bnsurgery._frozen import nothing_kept

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def gradients(net: nn.Module, x: Tensor, *, lean: bool) -> list[Tensor]:
    """Of a loss that weighs each output otherwise: of the input, and of what trains."""
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    if lean:
        with nothing_kept(net):
            out = net(x)
    else:
        out = net(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@settings(deadline=None, max_examples=60)
@given(
    dims=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_torch(
    dims: int, groups: int, kernel: int, stride: int, padding: int, dilation: int, bias: bool, last: bool
) -> None:
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    conv = KINDS[dims](4, 8, kernel, **options).double().requires_grad_(False)
    x = torch.rand(2, 4, *(7,) * dims, dtype=torch.float64)
    if last and dims == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    for ours, torchs in zip(gradients(conv, x, lean=True), gradients(conv, x, lean=False), strict=True):
        assert ours.shape == torchs.shape
        assert torch.allclose(ours, torchs, rtol=1e-12, atol=1e-14)


def saved(net: nn.Module, x: Tensor, *, lean: bool) -> set[tuple[int, ...]]:
    """Shapes of what a pass keeps, parameters aside."""
    shapes = set()
    own = {p.data_ptr() for p in net.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if lean:
            with nothing_kept(net):
                net(x)
        else:
            net(x)
    return shapes


def test_the_input_of_a_frozen_convolution_is_not_kept() -> None:
    # Pooling keeps shapes alone: its output, of 5 x 5, is kept for the second convolution and for nothing else.
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    )
    x = torch.rand(2, 3, 10, 10)
    freeze_except_bn(net)
    assert (2, 4, 5, 5) in saved(net, x, lean=False)
    assert (2, 4, 5, 5) not in saved(net, x, lean=True)
    assert (2, 6, 3, 3) in saved(net, x, lean=True)  # what the last BN layer needs for its gamma


def test_a_convolution_that_trains_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)).double()
    net[0].requires_grad_(False)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for ours, torchs in zip(gradients(net, x, lean=True), gradients(net, x, lean=False), strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-12, atol=1e-14)
    assert net[2].weight.grad is not None


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding_mode="circular", padding=1),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    ],
    ids=["circular", "same", "parametrized"],
)
def test_others_are_left_to_torch(conv: nn.Module) -> None:
    conv = conv.double().requires_grad_(False)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for ours, torchs in zip(gradients(conv, x, lean=True), gradients(conv, x, lean=False), strict=True):
        assert torch.equal(ours, torchs)


def test_an_input_without_batch_and_one_under_autocast() -> None:
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    single = torch.rand(3, 8, 8, requires_grad=True)
    with nothing_kept(conv):
        assert conv(single).shape == (4, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(single[None])
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert single.grad is not None


def test_modules_are_as_before_whatever_happens() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    before = [set(vars(module)) for module in net.modules()]
    with pytest.raises(RuntimeError, match="expected input"), nothing_kept(net):
        net(torch.rand(1, 5, 8, 8, requires_grad=True))
    assert [set(vars(module)) for module in net.modules()] == before


def test_what_is_compiled_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).requires_grad_(False)
    wrapped = torch.compile(net, backend="eager")
    with nothing_kept(wrapped):
        assert "_conv_forward" not in vars(net[0])
    net.compile(backend="eager")
    with nothing_kept(net):
        assert "_conv_forward" not in vars(net[0])


class Smooth(nn.Sequential):
    """An activation that keeps its own input, so that only the convolution behind would keep its output."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


def test_fine_tuning_uses_it_with_the_engine_and_ends_the_same_without() -> None:
    batches = [(torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4) for _ in range(3)]
    ends, seen = {}, {}
    for engine in ("fast", "plain"):
        torch.manual_seed(1)
        net = Smooth().double()
        held: list[bool] = []
        net[2].register_forward_hook(
            partial(lambda held, net, *_: held.append("_conv_forward" in vars(net[3])), held, net)
        )
        adv_finetune(net, batches, epochs=1, attack=PGD(8 / 255, 2, 4 / 255), lr=0.1, progress=False, engine=engine)
        ends[engine], seen[engine] = net.state_dict(), held
    assert any(seen["fast"])
    assert not any(seen["plain"])
    for name, tensor in ends["plain"].items():
        assert torch.allclose(tensor.double(), ends["fast"][name].double(), rtol=1e-9, atol=1e-11), name


class Adapted(nn.Module):
    """A frozen convolution whose weight is computed with a low-rank part that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.rand(2, 27)), nn.Parameter(torch.rand(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight + (self.up @ self.down).view(4, 3, 3, 3)
        out: Tensor = self.conv._conv_forward(x, weight, self.conv.bias)
        return out


def test_a_weight_that_is_computed_gets_its_gradient() -> None:
    torch.manual_seed(0)
    net, x = Adapted().double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    ours, torchs = gradients(net, x, lean=True), gradients(net, x, lean=False)
    assert len(ours) == len(torchs) == 4
    assert all(torch.allclose(one, other, rtol=1e-12, atol=1e-14) for one, other in zip(ours, torchs, strict=True))


class Checkpointed(Smooth):
    """Runs its middle once more in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        z = self[2](self[1](self[0](x)))
        z = torch.utils.checkpoint.checkpoint(self[3], z, use_reentrant=False)
        logits: Tensor = self[6](self[5](self[4](z)))
        return logits


def test_activation_checkpointing_goes_with_it() -> None:
    torch.manual_seed(0)
    batches = [(torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4) for _ in range(2)]
    ends = []
    for engine in ("fast", "plain"):
        torch.manual_seed(1)
        net = Checkpointed().double()
        adv_finetune(net, batches, epochs=1, attack=PGD(8 / 255, 2, 4 / 255), lr=0.1, progress=False, engine=engine)
        ends.append(net.state_dict())
    for name, tensor in ends[1].items():
        assert torch.allclose(tensor.double(), ends[0][name].double(), rtol=1e-9, atol=1e-11), name
