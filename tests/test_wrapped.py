"""All operations on models that are wrapped, parametrized, adapted, synchronised, or in half precision.

The checks are those of the zoo: each compares with torch itself on the model inside the wrapper.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

import zoo_checks
from bnsurgery import (
    PGD,
    BNSurgeryWarning,
    adv_finetune,
    bn_layers,
    keep_branch,
    plan_fusion,
    recalibrate_bn,
    split_bn,
    use_branch,
)
from networks import SMALL
from zoo import Architecture, Case

NETWORK = Architecture("torchvision", "small", "small")
Wrap = Callable[[nn.Sequential], nn.Module]


class LoRA(nn.Module):
    """A layer with a path of low rank beside it."""

    def __init__(self, base: nn.Conv2d | nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        if isinstance(base, nn.Linear):
            self.down: nn.Module = nn.Linear(base.in_features, rank, bias=False)
            self.up: nn.Module = nn.Linear(rank, base.out_features, bias=False)
        else:
            shape = (base.kernel_size, base.stride, base.padding)
            self.down = nn.Conv2d(base.in_channels, rank, *shape, bias=False)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Scaled(nn.Module):
    """A BN layer with a scale and a shift of its own behind it, and a path around it."""

    def __init__(self, base: nn.Module, channels: int) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.linspace(0.5, 1.5, channels).view(-1, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.base(z) * self.scale + 0.1 * z


class Merged(nn.Module):
    """A parametrization of low rank, as of LoRA that is computed into the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows = len(weight)
        self.a = nn.Parameter(torch.linspace(-0.1, 0.1, rows).view(rows, 1))
        self.b = nn.Parameter(torch.linspace(-1, 1, weight[0].numel()).view(1, -1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.a @ self.b).view_as(weight)


class Offset(nn.Module):
    """A parametrization of gamma or beta, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.1))

    def forward(self, value: Tensor) -> Tensor:
        return value + self.offset


def compiled(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_by_aot(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_inside(model: nn.Sequential) -> nn.Module:
    model[3] = torch.compile(nn.Sequential(model[3], model[4]), backend="eager")
    model[4] = nn.Identity()
    return model


def distributed(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model)


def distributed_of_compiled(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(compiled(model))


def compiled_distributed(model: nn.Sequential) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="eager")  # type: ignore[return-value]


def weight_normed(model: nn.Sequential) -> nn.Module:
    for index in (0, 3, 7):
        nn.utils.parametrizations.weight_norm(model[index])
    return model


def weight_normed_as_of_old(model: nn.Sequential) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    return model


def orthogonal(model: nn.Sequential) -> nn.Module:
    nn.utils.parametrizations.orthogonal(model[7])
    return model


def parametrized_bn(model: nn.Sequential) -> nn.Module:
    parametrize.register_parametrization(model[1], "weight", Offset())
    parametrize.register_parametrization(model[4], "bias", Offset())
    return model


def merged(model: nn.Sequential) -> nn.Module:
    for index in (0, 7):
        parametrize.register_parametrization(model[index], "weight", Merged(model[index].weight))
    return model


def lora(model: nn.Sequential) -> nn.Module:
    for index in (0, 3, 10):
        model[index] = LoRA(model[index])
    return model


def lora_around_bn(model: nn.Sequential) -> nn.Module:
    model[1] = Scaled(model[1], 8)
    return lora(model)


def synchronised(model: nn.Sequential) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def everything(model: nn.Sequential) -> nn.Module:
    return distributed_of_compiled(nn.Sequential(*lora(parametrized_bn(model))))


WRAPPINGS: list[Wrap] = [
    compiled,
    compiled_by_aot,
    compiled_in_place,
    compiled_inside,
    DataParallel,
    distributed,
    distributed_of_compiled,
    compiled_distributed,
    weight_normed,
    weight_normed_as_of_old,
    orthogonal,
    parametrized_bn,
    merged,
    lora,
    lora_around_bn,
    synchronised,
    everything,
]
OUTSIDE: tuple[Wrap, ...] = (
    compiled,
    compiled_by_aot,
    DataParallel,
    distributed,
    distributed_of_compiled,
    compiled_distributed,
    everything,
)
"""These put something around the model; the others change it."""
NEEDS_GROUP = (distributed, distributed_of_compiled, compiled_distributed, everything)


def inside(model: nn.Module) -> nn.Module:
    """What is in a wrapper, without the library."""
    for name in ("module", "_orig_mod"):
        if name in model._modules:
            return inside(model.get_submodule(name))
    return model


def case_of(wrap: Wrap, dtype: torch.dtype = torch.float32) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wrapped = wrap(SMALL.build().eval()).to(dtype)  # type: ignore[arg-type]
    return Case(NETWORK, inside(wrapped).eval(), 8, 6, wrapped if wrap in OUTSIDE else None, dtype)


@pytest.fixture
def group(request: pytest.FixtureRequest) -> None:
    """A process group, where what is wrapped needs one."""
    if request.node.callspec.params["wrap"] in NEEDS_GROUP:
        request.getfixturevalue("process_group")


def expected(operation: str) -> str:
    """The network ends in BN of (N, C), of whose single values there is no variance."""
    return "refused" if operation == "replace by InstanceNorm" else "right"


def name_of(wrap: Wrap) -> str:
    return wrap.__name__


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("operation", zoo_checks.OPERATIONS)
@pytest.mark.parametrize("wrap", WRAPPINGS, ids=name_of)
def test_operations_on_wrapped_models_are_right(wrap: Wrap, operation: str) -> None:
    found = zoo_checks.check(operation, case_of(wrap))
    assert found["verdict"] == expected(operation), found["note"]


@pytest.mark.parametrize("operation", zoo_checks.OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrap", [lambda model: model, parametrized_bn, lora], ids=["alone", "parametrized", "lora"])
def test_operations_in_half_precision_are_right(wrap: Wrap, dtype: torch.dtype, operation: str) -> None:
    found = zoo_checks.check(operation, case_of(wrap, dtype))
    assert found["verdict"] == expected(operation), found["note"]


def closed_over(model: nn.Sequential) -> nn.Module:
    """LoRA by hand, in a closure."""
    conv, inner = model[3], model[3].forward
    conv.low = nn.Conv2d(8, 12, 3, 2, 1, bias=False)
    conv.forward = lambda x: inner(x) + conv.low(x)
    return model


@pytest.mark.parametrize("operation", ["fuse", "split", "replace by GroupNorm", "replace by nothing"])
def test_copies_of_a_model_in_closures_are_refused(operation: str) -> None:
    found = zoo_checks.check(operation, case_of(closed_over))
    assert found["verdict"] == "refused"
    assert "refers to the model" in found["note"]


@pytest.mark.parametrize("operation", ["freeze, update", "freeze, frozen", "reset", "recalibrate", "fold", "patch"])
def test_what_is_done_in_place_is_right_on_a_model_in_closures(operation: str) -> None:
    found = zoo_checks.check(operation, case_of(closed_over))
    assert found["verdict"] == "right", found["note"]


def wide(wrap: Wrap) -> Case:
    """In float64, in which no gradient's sign hangs on rounding."""
    return case_of(wrap, torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [*WRAPPINGS, closed_over], ids=name_of)
def test_fine_tuning_changes_bn_alone_and_the_copy_that_is_attacked_follows(wrap: Wrap) -> None:
    ended = []
    for engine in ("fast", "plain"):
        torch._dynamo.reset()
        case = wide(wrap)
        before = zoo_checks.Photograph(case.model)
        trains, moves = zoo_checks.gamma_and_beta(case.model), zoo_checks.is_statistic(case.model)
        data = [(case.x, SMALL.labels())] * 2
        with warnings.catch_warnings():
            if wrap is closed_over:
                warnings.filterwarnings("ignore", "attacks run on the live model", BNSurgeryWarning)
            attack = PGD(eps=0.03, steps=2, step_size=0.02)
            adv_finetune(case.given, data, epochs=1, train="bn", attack=attack, engine=engine, progress=False)
        after = zoo_checks.state_of(case.model)
        meant = {name for name in after if name in trains or moves(name)}
        before.same(case.model, but=meant.__contains__)
        assert not any(torch.equal(after[name], before.values[name]) for name in meant)
        ended.append(after)
    for name, value in ended[0].items():
        assert torch.allclose(value.double(), ended[1][name].double(), rtol=1e-5, atol=1e-7), name


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("operation", ["freeze, frozen", "reset", "fold", "fuse", "patch", "attack"])
def test_synchronised_bn_in_a_group_is_right_where_it_need_not_train(operation: str) -> None:
    found = zoo_checks.check(operation, case_of(synchronised))
    assert found["verdict"] == "right", found["note"]


@pytest.mark.usefixtures("process_group")
def test_synchronised_bn_in_a_group_does_not_train_on_the_cpu_as_torch_says() -> None:
    case = case_of(synchronised)
    before = zoo_checks.Photograph(case.model)
    data = [(case.x, SMALL.labels())]
    for call in (lambda: recalibrate_bn(case.model, data), lambda: adv_finetune(case.model, data, epochs=1)):
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            call()
        before.same(case.model)


@pytest.mark.parametrize("inner", [parametrized_bn, lora_around_bn, weight_normed, synchronised], ids=name_of)
def test_split_models_split_and_keep_inside_wrappers_what_is_parametrized_or_adapted(inner: Wrap) -> None:
    case = case_of(lambda model: compiled(inner(model)))
    split = split_bn(torch.compile(case.model, backend="eager"))
    assert len(bn_layers(split)) == 2 * len(bn_layers(case.model))
    expected = case.outputs(case.model)
    for branch in ("clean", "adv"):
        with use_branch(split, branch):
            assert torch.equal(case.outputs(torch.compile(split, backend="eager"))[0], expected[0])
        assert torch.equal(case.outputs(keep_branch(split, branch))[0], expected[0])


def test_where_bn_stands_beside_or_before_an_adapter_it_is_not_fused_and_the_reason_is_given() -> None:
    case = case_of(lora_around_bn)
    plan = plan_fusion(case.model, case.args)
    assert plan.fused == (("7", "8"),)
    assert {name for name, _ in plan.skipped} == {"1.base", "4"}
    assert all("its input is the output of add in" in reason for _, reason in plan.skipped), plan
