"""What is set aside is put back to the bit, whatever happens in between."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnsurgery._modes import Snapshot, global_state, preserved, seed_of
from networks import LIGHT, SMALL, Case
from reference import differences, norm_layers, record, same


def train_a_little(model: nn.Module, case: Case) -> None:
    F.cross_entropy(model(case.example()), case.labels()).backward()


def disturb(model: nn.Module, case: Case, error: type[BaseException] | None = None) -> None:
    """Changes everything that a block may change: modes, flags, gradients, buffers."""
    model.train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    for layer in norm_layers(model).values():
        layer.momentum, layer.track_running_stats = 0.7, True
    if any(parameter.requires_grad for parameter in model.parameters()):
        train_a_little(model, case)
    else:
        model(case.example())
    if error:
        raise error


def odd_model(case: Case) -> nn.Module:
    """A model in a state that no single call of train() or eval() would bring back."""
    model = case.build().train()
    train_a_little(model, case)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 4 == 0:
            parameter.grad = None
    for layer in norm_layers(model).values():
        layer.momentum, layer.track_running_stats = None, False
    return model


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("case", LIGHT, ids=repr)
def test_a_model_is_put_back_bit_for_bit_also_after_exceptions(case: Case, error: type[BaseException] | None) -> None:
    model = odd_model(case)
    before = record(model)
    if error is None:
        with preserved(model):
            disturb(model, case)
            assert any("grad" in name for name in differences(before, record(model)))
            assert any("running_mean value" in name for name in differences(before, record(model)))
    else:
        with pytest.raises(error), preserved(model):
            disturb(model, case, error)
    assert differences(before, record(model)) == []


def test_a_backward_inside_adds_nothing_to_the_callers_gradients() -> None:
    model = SMALL.build()
    train_a_little(model, SMALL)
    grads = [parameter.grad for parameter in model.parameters()]
    values = [grad.clone() for grad in grads]
    with preserved(model):
        assert all(parameter.grad is None for parameter in model.parameters())
        train_a_little(model, SMALL)
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    assert all(same(grad, value) for grad, value in zip(grads, values, strict=True))


def test_buffers_may_be_let_move() -> None:
    model = SMALL.build().train()
    before = record(model)
    with preserved(model, buffers=False):
        model.eval()
        norm_layers(model)["1"].train()
        model(SMALL.example())
    assert set(differences(before, record(model))) == {
        "1.running_mean value",
        "1.running_var value",
        "1.num_batches_tracked value",
    }


def test_blocks_nest() -> None:
    model = SMALL.build().train()
    before = record(model)
    with preserved(model):
        model.eval()
        inner = record(model)
        with preserved(model):
            model.train()
            model(SMALL.example())
        assert differences(inner, record(model)) == []
    assert differences(before, record(model)) == []


def test_values_that_did_not_change_are_not_written_so_that_a_held_graph_can_still_run_backward() -> None:
    model = SMALL.build().eval()
    loss = model(SMALL.example()).sum()
    versions = [buffer._version for buffer in model.buffers()]
    with preserved(model):
        model(SMALL.example())
    assert [buffer._version for buffer in model.buffers()] == versions
    loss.backward()
    assert model[0].weight.grad is not None


def test_a_snapshot_restores_in_place_as_often_as_asked() -> None:
    tensor = torch.tensor([1.0, float("nan"), -0.0])
    view, values = tensor[:2], tensor.clone()
    snapshot = Snapshot([tensor, tensor])
    for value in (5.0, 6.0):
        tensor.fill_(value)
        assert view[0] == value
        snapshot.restore()
        assert same(tensor, values)
        assert view.data_ptr() == tensor.data_ptr()


def test_a_snapshot_restores_parameters_without_a_graph() -> None:
    parameter = nn.Parameter(torch.ones(3))
    snapshot = Snapshot([parameter])
    with torch.no_grad():
        parameter.mul_(2)
    snapshot.restore()
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.is_leaf


def global_values() -> dict[str, object]:
    cudnn = torch.backends.cudnn
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        "trace": sys.gettrace(),
    }


def vandalise() -> None:
    cudnn = torch.backends.cudnn
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    torch.set_default_dtype(torch.float64)
    cudnn.enabled, cudnn.benchmark = not cudnn.enabled, not cudnn.benchmark
    cudnn.deterministic, cudnn.allow_tf32 = not cudnn.deterministic, not cudnn.allow_tf32
    sys.settrace(None)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("seed", [None, 0, 2**40])
def test_global_state_is_put_back_also_after_exceptions(error: type[BaseException] | None, seed: int | None) -> None:
    def trace(*_: object) -> None:
        return None

    ours = sys.gettrace()
    sys.settrace(trace)
    try:
        before = global_values()
        try:
            with global_state(torch.device("cpu"), seed):
                vandalise()
                inside = global_values()
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            assert error is not None
        after = global_values()
    finally:
        sys.settrace(ours)
    assert after == before
    assert all(inside[name] != before[name] for name in before)


DRAWS = {"torch": lambda: torch.rand(3).tolist(), "numpy": lambda: np.random.rand(3).tolist(), "python": random.random}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_seed_fixes_what_each_generator_draws_inside(draw: Callable[[], object]) -> None:
    drawn = []
    for seed in (1, 1, 2):
        draw()
        with global_state(torch.device("cpu"), seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_a_seed_the_generators_go_on_where_they_were() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.rand(3).tolist()
        torch.manual_seed(5)
        with global_state(torch.device("cpu")):
            assert torch.rand(3).tolist() == expected
        assert torch.rand(3).tolist() == expected


def test_seeds_come_from_the_generator_and_move_it_alone() -> None:
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    seeds = [seed_of(generator) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [seed_of(again) for again in [torch.Generator().manual_seed(3)] for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
