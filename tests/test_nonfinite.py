"""Numbers that go wrong: NaN and infinity reach neither statistics nor parameters, and the place is named."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from bnsurgery import PGD, BNSurgeryError, BNSurgeryWarning, NonFiniteError, adv_finetune, split_bn
from bnsurgery._nonfinite import is_finite
from bnsurgery._undo import Undo
from networks import SMALL
from test_attacks import World, bits
from test_finetuning import Batches, batches, tune, values


def tainted(number: float, *sizes: int, batch: int) -> Batches:
    """Batches of which one holds one value that is not finite."""
    data = batches(*sizes)
    x, y = data[batch]
    x = x.clone()
    x[0, 1, 2, 3] = number
    data[batch] = x, y
    return data


def without(data: Batches, batch: int) -> Batches:
    return [pair for index, pair in enumerate(data) if index != batch]


class Wrong(nn.Module):
    """Passes on what it is given, but for one value in its ``turn``-th pass in training mode."""

    def __init__(self, number: float, turn: int) -> None:
        super().__init__()
        self.number, self.turn, self.passes = number, turn, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            # The pass after the one that went wrong looks for the place.
            if self.passes in (self.turn + 1, self.turn + 2):
                x = x.clone()
                x[0, 0, 0, 0] = self.number
        return x


class Behind(nn.Module):
    """Makes infinity and NaN finite again: the loss does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num(0, 1, -1)


def network(*, wrong: nn.Module | None = None, behind: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), wrong, nn.BatchNorm2d(6), Behind() if behind else None, nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*(layer for layer in layers if layer is not None), nn.Linear(216, 10))


NUMBERS = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("train", ["bn", "bn-stats", "all"])
@pytest.mark.parametrize("attack", [PGD(0.1, 1, 0.1), None], ids=["PGD", "None"])
def test_inputs_that_are_not_finite_are_skipped(number: float, train: str, attack: PGD | None) -> None:
    data = tainted(number, 4, 4, 4, batch=1)
    expected, model = SMALL.build(), SMALL.build()
    options = {"train": train, "attack": attack, "schedule": "constant"}
    with pytest.warns(BNSurgeryWarning, match="step 1: what the data gives as inputs is not finite; the step is"):
        result = tune(model, data, **options)
    tune(expected, without(data, 1), **options)
    assert values(model) == values(expected)
    assert (result.steps, result.skipped, result.history[0].steps) == (3, 1, 2)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("behind", [False, True], ids=["loss", "statistics alone"])
@pytest.mark.parametrize("train", ["bn", "bn-stats", "all"])
def test_activations_that_are_not_finite_reach_neither_statistics_nor_parameters(
    number: float, behind: bool, train: str
) -> None:
    data = batches(4, 4, 4)
    options = {"train": train, "attack": None, "schedule": "constant"}
    model, expected = network(wrong=Wrong(number, 1), behind=behind), network(wrong=nn.Identity(), behind=behind)
    with pytest.warns(BNSurgeryWarning, match=r"step 1: what '1' \(Wrong\) gives is not finite; the step is skipped"):
        result = tune(model, data, **options)
    tune(expected, without(data, 1), **options)
    assert values(model) == values(expected)
    assert result.skipped == 1


@pytest.mark.parametrize("number", NUMBERS)
def test_what_an_attack_gives_is_looked_at(number: float) -> None:
    model = SMALL.build()
    before = values(model)
    with pytest.warns(BNSurgeryWarning, match="step 0: what the attack gives is not finite"):
        tune(model, batches(4), attack=lambda model, x, y: x * number)
    assert values(model) == before


class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * math.inf


class SteepLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Steep.apply(x)


def test_the_gradient_that_goes_wrong_first_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), SteepLayer(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    )
    before = values(model)
    with pytest.warns(BNSurgeryWarning, match="step 0: the gradient of '1.bias' is not finite"):
        tune(model, batches(4), attack=None, train="all")
    assert values(model) == before


def overflowing(kind: type[torch.optim.Optimizer], turn: int) -> type[torch.optim.Optimizer]:
    """An optimizer whose step number ``turn``, from 0, ends in an infinite parameter."""

    class Overflowing(kind):  # type: ignore[misc, valid-type]
        steps = 0

        def step(self, closure: None = None) -> None:
            super().step()
            if self.steps == turn:
                with torch.no_grad():
                    self.param_groups[0]["params"][1].mul_(math.inf)
            self.steps += 1

    return Overflowing


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "RAdam", "NAdam", "Adagrad", "Adadelta", "Rprop"])
def test_an_update_that_is_not_finite_is_taken_back_with_the_optimizers_state(kind: str) -> None:
    torch_optimizer = getattr(torch.optim, kind)
    rate = {"lr": 0.01, "momentum": 0.9} if kind in ("SGD", "RMSprop") else {"lr": 0.01}

    def run(model: nn.Module, data: Batches, made: type[torch.optim.Optimizer]) -> object:
        options = {"attack": None, "train": "all", "optimizer": lambda parameters: made(parameters, **rate)}
        return tune(model, data, schedule="constant", **options)

    data = batches(4, 4, 4)
    for turn in (0, 1):
        model, expected = SMALL.build(), SMALL.build()
        with pytest.warns(BNSurgeryWarning, match=rf"step {turn}: the optimizer's update of '1.weight' is not finite"):
            result = run(model, data, overflowing(torch_optimizer, turn))
        run(expected, without(data, turn), torch_optimizer)
        assert values(model) == values(expected)
        assert result.skipped == 1


def test_with_raise_the_run_ends_there_and_the_model_is_as_after_the_last_whole_step() -> None:
    data = tainted(math.nan, 4, 4, 4, batch=1)
    expected, model = SMALL.build(), SMALL.build()
    tune(expected, data[:1], schedule="constant")
    with pytest.raises(NonFiniteError, match="step 1: what the data gives as inputs is not finite; the model is as"):
        tune(model, data, schedule="constant", on_nonfinite="raise")
    assert values(model) == values(expected)
    assert issubclass(NonFiniteError, BNSurgeryError)


def test_with_raise_the_layer_is_named() -> None:
    model = network(wrong=Wrong(math.inf, 1))
    world_before = values(model)
    with pytest.raises(NonFiniteError, match=r"step 1: what '1' \(Wrong\) gives is not finite"):
        tune(model, batches(4, 4), attack=None, on_nonfinite="raise", train="bn-params")
    assert values(model).keys() == world_before.keys()


def test_a_value_that_goes_wrong_between_layers_is_named_by_the_one_that_is_given_it() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.head = nn.BatchNorm1d(192), nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bn((x.flatten(1) - 2).log()))

    with pytest.warns(BNSurgeryWarning, match=r"what 'bn' \(BatchNorm1d\) is given is not finite"):
        tune(Root(), batches(4), attack=None)


def test_the_place_is_looked_for_once_and_leaves_no_trace_in_random_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(192), nn.Linear(192, 10))
    calls: list[int] = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    draws: list[float] = []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        draws.append(float(torch.rand(())))
        return logits[:, 0] * (math.nan if len(draws) in (1, 2) else 1)

    with pytest.warns(BNSurgeryWarning, match="step 0: the loss is not finite"):
        result = tune(model, batches(4, 4, 4), attack=None, loss=loss)
    assert result.skipped == 2
    assert len(calls) == 4  # three steps, and one look
    seen, draws[:] = draws[:], []
    torch.manual_seed(0)
    again = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(192), nn.Linear(192, 10))
    with pytest.raises(NonFiniteError, match="step 0: the loss"):
        tune(again, batches(4, 4, 4), attack=None, loss=loss, on_nonfinite="raise")
    assert draws == seen[:1]


def test_buffers_that_hold_infinity_on_purpose_are_left_alone() -> None:
    model = SMALL.build()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert tune(model, batches(4, 4)).skipped == 0


def test_a_split_model_is_looked_at_along_its_branches() -> None:
    model = split_bn(SMALL.build())
    before = values(model)
    with pytest.warns(BNSurgeryWarning, match="is not finite; the step is skipped"):
        tune(model, batches(6), clean_fraction=0.5, loss=lambda logits, y: logits[:, 0] * math.nan)
    assert values(model) == before


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=8), st.booleans())
def test_is_finite_is_what_torch_says_of_each_value(numbers: list[float], half: bool) -> None:
    tensors = [torch.tensor(numbers), torch.tensor([1, 2]), torch.empty(0), torch.tensor(3.0, dtype=torch.float64)]
    if half:
        tensors.append(torch.tensor(numbers).bfloat16())
    assert is_finite(tensors) == all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("number", [1e300, -1e39, torch.finfo(torch.float64).max])
def test_numbers_that_only_float64_holds_are_finite(number: float) -> None:
    assert is_finite([torch.tensor(number, dtype=torch.float64), torch.ones(2)])


def test_undo_puts_back_parameters_state_and_groups_to_the_bit() -> None:
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.RAdam, torch.optim.Adagrad, torch.optim.Rprop):
        parameters = [nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(2, 2))]
        optimizer = kind(parameters, lr=0.1)
        undo = Undo(optimizer)

        def step(optimizer: torch.optim.Optimizer = optimizer, parameters: list[nn.Parameter] = parameters) -> None:
            for parameter in parameters:
                parameter.grad = torch.rand_like(parameter)
            optimizer.step()

        for _ in range(3):
            undo.note()
            before = [bits(p) for p in parameters], str(optimizer.state_dict())
            step()
            optimizer.param_groups[0]["lr"] *= 2
            optimizer.param_groups[0]["new"] = 1
            undo.restore()
            assert ([bits(p) for p in parameters], str(optimizer.state_dict())) == before
            step()


# Data that is wrong.


class Loader:
    """Says a length, and gives another; or raises."""

    def __init__(self, said: int, data: Batches, error: Exception | None = None) -> None:
        self.said, self.data, self.error = said, data, error

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.data
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("train", ["bn", "all"])
def test_a_loader_shorter_than_it_says_is_an_error_after_its_last_step(train: str) -> None:
    model, expected = SMALL.build(), SMALL.build()
    options = {"schedule": "constant", "train": train}
    with pytest.raises(
        ValueError, match="data said that it has 5 batches, and yielded 2 in epoch 0: the schedule goes"
    ):
        tune(model, Loader(5, batches(4, 4)), **options)
    tune(expected, batches(4, 4), **options)
    assert values(model) == values(expected)


def test_a_loader_longer_than_it_says_is_a_warning() -> None:
    with pytest.warns(BNSurgeryWarning, match="data said that it has 1 batches, and yielded 3 in epoch 0") as caught:
        result = tune(SMALL.build(), Loader(1, batches(4, 4, 4)), epochs=2)
    assert len(caught) == 1
    assert result.steps == 6


def test_where_steps_are_ended_before_the_loader_its_length_says_nothing() -> None:
    assert tune(SMALL.build(), Loader(5, batches(4, 4)), max_steps=2).steps == 2
    stops = [lambda record, _: record.step == 0]
    assert tune(SMALL.build(), Loader(5, batches(4, 4)), on_step=stops[0]).steps == 1


def test_an_error_of_the_loader_passes_and_the_model_is_as_after_the_last_whole_step() -> None:
    model, expected = SMALL.build(), SMALL.build()
    with pytest.raises(OSError, match="the disk is gone"):
        tune(model, Loader(3, batches(4, 4), OSError("the disk is gone")), schedule="constant")
    tune(expected, batches(4, 4), schedule="constant")
    assert values(model) == values(expected)


class Failing(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        yield from SMALL.example(2)
        raise OSError("cannot read image 2")


def test_an_error_in_a_loaders_worker_is_that_error() -> None:
    class Pairs(Failing):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            for x in super().__iter__():
                yield x, 0

    model = SMALL.build()
    world = World(model)
    with pytest.raises(OSError, match="cannot read image 2"):
        tune(model, DataLoader(Pairs(), batch_size=4))
    assert world.unchanged()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x, y + 90), "y must lie in 0 ... 9, got labels from"),
        (lambda x, y: (x + 2, y), "x must lie in bounds=(0, 1), got values from"),
        (lambda x, y: (x[:0], y[:0]), "data yielded a batch without examples in epoch 0"),
        (lambda x, y: (x, y[:2]), "y must have shape (4,) to go with x (4, 3, 8, 8), got (2,)"),
        (lambda x, y: (x[:, :2], y), "to have 3 channels, but got 2 channels"),
    ],
    ids=["labels", "bounds", "empty", "lengths", "channels"],
)
@pytest.mark.parametrize("train", ["bn", "all", "bn-stats"])
def test_a_wrong_batch_is_an_error_and_the_steps_before_it_count(
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str, train: str
) -> None:
    data = batches(4, 4, 4)
    data[2] = spoil(*data[2])
    model, expected = SMALL.build(), SMALL.build()
    options = {"schedule": "constant", "train": train}
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        tune(model, data, **options)
    tune(expected, data[:2], **options)
    assert values(model) == values(expected)


def test_an_exception_inside_of_the_optimizers_step_leaves_the_last_whole_step() -> None:
    class Half(torch.optim.SGD):
        steps = 0

        def step(self, closure: None = None) -> None:
            Half.steps += 1
            first = self.param_groups[0]["params"][0]
            if Half.steps == 2:
                with torch.no_grad():
                    first.add_(1)
                raise KeyboardInterrupt
            super().step()

    model, expected = SMALL.build(), SMALL.build()
    options = {"schedule": "constant", "train": "all", "attack": None}
    with pytest.raises(KeyboardInterrupt):
        tune(model, batches(4, 4), optimizer=lambda parameters: Half(parameters, lr=0.1), **options)
    tune(expected, batches(4, 4)[:1], optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), **options)
    assert values(model) == values(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of 'skip', 'raise', got 'ignore'"),
        ({"data_order": "other"}, "data_order must be one of 'same', 'any', got 'other'"),
        ({"sync": "all"}, "sync must be one of 'buffers', 'batch', 'none', got 'all'"),
        ({"shard": True}, "shard must be one of 'auto', 'split', 'none', got True"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 0, got -1"),
        ({"checkpoint_every": math.nan}, "checkpoint_every must be at least 0, got nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_choices_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        adv_finetune(SMALL.build(), batches(4), epochs=1, **options)


def test_a_loss_of_one_number_for_the_batch_is_looked_at_too() -> None:
    with pytest.warns(BNSurgeryWarning, match="step 0: the loss is not finite"):
        tune(SMALL.build(), batches(4), attack=None, loss=lambda logits, y: F.cross_entropy(logits, y)[None] * math.nan)
