"""adv_finetune: what changes and what does not, to the bit; and that a run can be stopped, broken and resumed."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from bnsurgery import (
    PGD,
    BNSurgeryError,
    BNSurgeryWarning,
    CheckpointError,
    EpochRecord,
    Finetuning,
    NoBatchNormError,
    StepRecord,
    adv_finetune,
    freeze_except_bn,
)
from bnsurgery._tuning import SCHEDULES
from networks import AFFINE_FREE, LIGHT, SHARED, SMALL, Case
from test_attacks import World, bits, lived_in, tracing

FAST = PGD(8 / 255, 2, 4 / 255)
Batches = list[tuple[Tensor, Tensor]]


def batches(*sizes: int, case: Case = SMALL) -> Batches:
    x, y = case.example(sum(sizes)), case.labels(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def tune(model: nn.Module, data: object, **options: object) -> Finetuning:
    return adv_finetune(model, data, **{"epochs": 1, "attack": FAST, "progress": False, **options})


def values(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def changed(before: dict[str, bytes], model: nn.Module) -> set[str]:
    now = values(model)
    assert now.keys() == before.keys()
    return {name for name in now if now[name] != before[name]}


def bn_names(model: nn.Module, *parts: str) -> set[str]:
    return {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for part in parts
        if getattr(module, part, None) is not None
    }


PARAMETERS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Recording:
    """An attack that adds a hundredth, and remembers what it was given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert not any(module.training for module in model.modules())
        self.sizes.append(len(x))
        return x + 0.01


class Stop(Exception):  # noqa: N818
    """Raised by tests in the middle of a run."""


class Untouchable:
    def __iter__(self) -> Iterator[None]:
        raise AssertionError("read")

    def __len__(self) -> int:
        return 2


# What changes.


@pytest.mark.filterwarnings("ignore:no BN layer has a gamma or beta")
@pytest.mark.parametrize("case", LIGHT, ids=repr)
@pytest.mark.parametrize("train", ["bn", "bn-params", "bn-stats", "all", "as-is"])
def test_what_should_change_changes_and_nothing_else(case: Case, train: str) -> None:
    model = case.build()
    if train == "as-is":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".weight"))
    before, names = values(model), {name for name, _ in model.named_parameters()}
    data = batches(4, 4, case=case)
    if case is AFFINE_FREE and train in ("bn", "bn-params"):
        with pytest.raises(ValueError, match=f"train='{train}', and no BN layer has a gamma or beta: nothing trains"):
            tune(model, data, train=train)
        assert changed(before, model) == set()
        return
    expected = {
        "bn": bn_names(model, *PARAMETERS, *STATISTICS),
        "bn-params": bn_names(model, *PARAMETERS),
        "bn-stats": bn_names(model, *STATISTICS),
        "all": names | bn_names(model, *STATISTICS),
        "as-is": {name for name in names if name.endswith(".weight")} | bn_names(model, *STATISTICS),
    }[train]
    result = tune(model, data, train=train)
    # A bias in front of a BN layer in training mode has no gradient but rounding: it may move or not.
    may_stay = {name for name in names if name.endswith("bias")} - bn_names(model, *PARAMETERS)
    assert expected - may_stay <= changed(before, model) <= expected
    assert set(result.trainable) == names & expected


@pytest.mark.parametrize(
    ("train", "also", "names"),
    [
        ("bn", "0", {"0.weight"}),
        ("bn", ["10.*"], {"10.weight", "10.bias"}),
        ("bn-params", ("7.weight",), {"7.weight"}),
        ("bn-stats", ["10.bias", "0"], {"10.bias", "0.weight"}),
        ("bn", ["1", "1.weight"], set()),
    ],
)
def test_also_adds_what_it_names(train: str, also: object, names: set[str]) -> None:
    model = SMALL.build()
    before = values(model)
    parts = {"bn": (*PARAMETERS, *STATISTICS), "bn-params": PARAMETERS, "bn-stats": STATISTICS}[train]
    result = tune(model, batches(4, 4), train=train, also=also)
    assert changed(before, model) == bn_names(model, *parts) | names
    assert names <= set(result.trainable)


def test_training_everything_does_not_warn_that_nothing_trains() -> None:
    # Warnings are errors here.
    assert len(tune(AFFINE_FREE.build(), batches(4, 4), train="all").trainable) == 7


def test_a_network_without_bn_trains_whole() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    before = values(model)
    assert tune(model, batches(4), train="all").trainable == ("1.weight", "1.bias")
    assert changed(before, model) == set(before)


def test_as_is_honours_a_freeze_made_by_hand() -> None:
    by_name, by_hand = SMALL.build(), SMALL.build()
    tune(by_name, batches(4, 4), train="bn-params")
    with freeze_except_bn(by_hand, stats="frozen"):
        tune(by_hand, batches(4, 4), train="as-is")
    assert values(by_name) == values(by_hand)


def test_an_optimizer_over_everything_moves_only_what_trains() -> None:
    model = SMALL.build()
    before = values(model)
    # Weight decay would move what has a gradient of zero, and Adam too.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    tune(model, batches(4, 4), optimizer=optimizer)
    assert changed(before, model) == bn_names(model, *PARAMETERS, *STATISTICS)


def test_the_step_is_the_one_written_out_here() -> None:
    model, reference = SMALL.build(torch.float64), SMALL.build(torch.float64)
    data = [(x.double(), y) for x, y in batches(6, 4)]
    attack = PGD(8 / 255, 2, 4 / 255, random_start=False)
    tune(model, data, epochs=2, attack=attack, train="all", lr=0.1, momentum=0.8, weight_decay=0.01, schedule="linear")
    velocity: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(data * 2):
        adversarial = attack(reference, x, y)
        reference.train()
        logits = reference(adversarial)
        loss = (torch.logsumexp(logits, 1) - logits[torch.arange(len(y)), y]).mean()
        names, parameters = zip(*reference.named_parameters(), strict=True)
        with torch.no_grad():
            for name, parameter, grad in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
                grad = grad + 0.01 * parameter
                velocity[name] = 0.8 * velocity[name] + grad if name in velocity else grad
                parameter -= 0.1 * (1 - step / 4) * (grad + 0.8 * velocity[name])  # Nesterov's
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.double(), reference.state_dict()[name].double(), rtol=1e-9, atol=1e-12), name


def test_bn_stats_are_those_of_torch_in_training_mode() -> None:
    model, reference = SMALL.build(), SMALL.build()
    data = batches(6, 4)
    tune(model, data, train="bn-stats", attack=None, epochs=2)
    reference.train()
    for x, _ in data * 2:
        with torch.no_grad():
            reference(x.contiguous(memory_format=torch.channels_last))
    assert values(model) == values(reference)


# The batch.


@pytest.mark.parametrize(("fraction", "sizes"), [(0, [6, 4]), (0.5, [3, 2]), (0.25, [4, 3]), (1, [])])
def test_clean_fraction_keeps_the_front_of_each_batch_clean(fraction: float, sizes: list[int]) -> None:
    model, attack, seen = SMALL.build(), Recording(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    data = batches(6, 4)
    tune(model, data, attack=attack, clean_fraction=fraction)
    assert attack.sizes == sizes
    for (x, _), trained, attacked in zip(data, seen, sizes or [0, 0], strict=True):
        clean = len(x) - attacked
        assert torch.equal(trained[:clean], x[:clean])
        assert torch.equal(trained[clean:], x[clean:] + 0.01)


def test_without_an_attack_training_is_clean() -> None:
    one, two = SMALL.build(), SMALL.build()
    tune(one, batches(6, 4), attack=None)
    tune(two, batches(6, 4), clean_fraction=1)
    assert values(one) == values(two)


@pytest.mark.parametrize(
    "build",
    [
        lambda model: torchattacks.PGD(model, steps=2),
        lambda model: PGD(steps=1, bn="train"),
        lambda model: lambda model, x, y: (x + 0.01 * torch.rand_like(x)).clamp(0, 1),
    ],
    ids=["torchattacks", "PGD", "callable"],
)
def test_any_attack_serves(build: Callable[[nn.Module], object]) -> None:
    model = SMALL.build()
    before = values(model)
    assert tune(model, batches(4, 4), attack=build(model)).history[0].steps == 2
    assert changed(before, model) == bn_names(model, *PARAMETERS, *STATISTICS)
    counters = [layer.num_batches_tracked.item() for layer in model.modules() if isinstance(layer, _BatchNorm)]
    assert counters == [7 + 2] * 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    one, two = SMALL.build(), SMALL.build()
    tune(one, [(x, y.to(dtype)) for x, y in batches(4, 4)])
    tune(two, batches(4, 4))
    assert values(one) == values(two)


# Optimizers and schedules.


def test_an_optimizer_comes_as_factory_or_instance() -> None:
    default, factory, instance = SMALL.build(), SMALL.build(), SMALL.build()
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    tune(default, batches(4, 4))
    given = []
    tune(
        factory,
        batches(4, 4),
        optimizer=lambda parameters: given.append(len(parameters)) or torch.optim.SGD(parameters, **options),
    )
    parameters = dict(instance.named_parameters())
    tune(
        instance,
        batches(4, 4),
        optimizer=torch.optim.SGD([parameters[name] for name in sorted(bn_names(instance, *PARAMETERS))], **options),
    )
    assert given == [6]
    assert values(default) == values(factory) == values(instance)


@pytest.mark.parametrize("kind", ["instance", "factory"])
def test_an_optimizer_that_lacks_parameters_is_refused(kind: str) -> None:
    model = SMALL.build()
    world = World(model)
    given = torch.optim.SGD([model[1].weight], lr=0.1)
    with pytest.raises(ValueError, match="the optimizer lacks 5 of the 6 parameters that train"):
        tune(model, batches(4), optimizer=given if kind == "instance" else lambda _: given)
    assert world.unchanged()


@pytest.mark.parametrize("breaks", [False, True])
def test_learning_rates_are_put_back(breaks: bool) -> None:
    model = SMALL.build()
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(groups)
    seen = []

    def look(record: StepRecord, _: nn.Module) -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])
        if breaks and record.step == 2:
            raise Stop

    with pytest.raises(Stop) if breaks else nullcontext():
        tune(model, batches(2, 2, 2, 2), optimizer=optimizer, schedule="linear", on_step=look)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 * (i + 1) for i in range(len(groups))]
    for step, rates in enumerate(seen):
        assert rates == pytest.approx([0.01 * (i + 1) * (1 - step / 4) for i in range(len(groups))])
    assert len(seen) == (3 if breaks else 4)


def rates(data: object, **options: object) -> list[float]:
    seen: list[float] = []
    tune(SMALL.build(), data, lr=1e-3, attack=None, on_step=lambda record, _: seen.append(record.lr), **options)
    return seen


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda t: 1),
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("step", lambda t: 1 if t < 0.4 else 0.1 if t < 0.6 else 0.01 if t < 0.8 else 0.001),
        (lambda t: 2 - t**2, lambda t: 2 - t**2),
    ],
    ids=["constant", "linear", "cosine", "step", "function"],
)
def test_schedules_follow_their_formulas(schedule: object, formula: Callable[[float], float]) -> None:
    data = batches(2, 2, 2, 2, 2)
    assert rates(data, epochs=2, schedule=schedule) == pytest.approx([1e-3 * formula(step / 10) for step in range(10)])
    # max_steps shortens the way.
    assert rates(data, epochs=2, schedule=schedule, max_steps=4) == pytest.approx(
        [1e-3 * formula(step / 4) for step in range(4)]
    )


def test_where_the_length_is_unknown_a_schedule_goes_by_epochs() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches(2, 2))

    assert rates(Stream(), epochs=2, schedule="linear") == pytest.approx([1e-3, 1e-3, 0.5e-3, 0.5e-3])


def test_the_steps_of_the_paper() -> None:
    # Epochs 60, 90 and 120 of 150.
    factors = [SCHEDULES["step"](epoch / 150) for epoch in (0, 59, 60, 89, 90, 119, 120, 149)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


# The attack's strength.


class Weighed(PGD):
    """Remembers its strength in each call."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[float, float]] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **options: object) -> Tensor:
        self.seen.append((self.eps, self.step_size))
        return super().__call__(model, x, y, **options)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_attack_grows_over_the_first_epochs(warmup: int) -> None:
    attack = Weighed(0.04, 2, 0.02)
    tune(SMALL.build(), batches(2, 2), epochs=4, attack=attack, eps_warmup=warmup)
    shares = {0: (1, 1, 1, 1), 1: (1 / 2, 1, 1, 1), 3: (1 / 4, 2 / 4, 3 / 4, 1)}[warmup]
    expected = [(0.04 * share, 0.02 * share) for share in shares for _ in range(2)]
    assert [value for call in attack.seen for value in call] == pytest.approx([v for call in expected for v in call])
    assert (attack.eps, attack.step_size) == (0.04, 0.02)


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_warm_up_is_runs_with_attacks_of_growing_strength(engine: str, norm: str) -> None:
    options = {"train": "bn-params", "momentum": 0.0, "schedule": "constant", "engine": engine}
    options |= {"precision": "float32"} if engine == "fast" else {}
    data, chained, model = batches(4, 4), SMALL.build(), SMALL.build()
    for share in (1 / 3, 2 / 3, 1):
        weaker = PGD(share * 0.1, 3, share * 0.04, norm, random_start=False)
        tune(chained, data, attack=weaker, **options)
    tune(model, data, epochs=3, eps_warmup=2, attack=PGD(0.1, 3, 0.04, norm, random_start=False), **options)
    torch.testing.assert_close(model.state_dict(), chained.state_dict(), rtol=1e-6, atol=1e-7)
    at_once = SMALL.build()
    tune(at_once, data, epochs=3, attack=PGD(0.1, 3, 0.04, norm, random_start=False), **options)
    assert values(at_once) != values(model)


def test_a_callback_may_change_the_attack_during_the_warm_up() -> None:
    attack = Weighed(0.04, 2, 0.02)

    def halve(record: EpochRecord, _: nn.Module) -> None:
        assert attack.eps == 0.04 / 2**record.epoch
        attack.eps /= 2

    tune(SMALL.build(), batches(2), epochs=3, attack=attack, eps_warmup=1, callbacks=halve)
    assert attack.seen == [(0.02, 0.01), (0.02, 0.02), (0.01, 0.02)]
    assert (attack.eps, attack.step_size) == (0.005, 0.02)


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_an_attack_that_fails_while_it_is_weak_is_as_before(engine: str) -> None:
    def fails(logits: Tensor, y: Tensor) -> Tensor:
        raise Stop

    attack = PGD(0.04, 2, 0.02, loss=fails)
    with pytest.raises(Stop):
        tune(SMALL.build(), batches(2), epochs=2, attack=attack, eps_warmup=1, engine=engine)
    assert (attack.eps, attack.step_size) == (0.04, 0.02)


def test_a_warm_up_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    options = {"epochs": 4, "eps_warmup": 2}
    whole = noisy_model()
    expected = tune(whole, augmented(), attack=PGD(0.2, 2, 0.1), **options)
    for _ in range(4):
        model = noisy_model()
        found = tune(
            model, augmented(), attack=PGD(0.2, 2, 0.1), checkpoint=tmp_path / "c", max_seconds=1e-9, **options
        )
    assert found.ended == "epochs"
    assert values(model) == values(whole)
    assert [record.loss for record in found.history] == [record.loss for record in expected.history]


# It works.


def test_fine_tuning_lowers_the_adversarial_loss() -> None:
    patterns = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(64) % 4
    noise = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = 0.7 * patterns[y] + 0.3 * noise
    model = SMALL.build()

    def adversarial_loss() -> float:
        made = PGD(0.03, 10, 0.01)(model, x, y)
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(made), y))

    before = adversarial_loss()
    data = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    result = tune(model, data, epochs=12, attack=PGD(0.03, 3, 0.02), lr=0.1, also="10")
    assert adversarial_loss() < 0.5 * before
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert result.history[-1].error < result.history[0].error


# Records.


def test_history_sums_up_the_steps() -> None:
    steps: list[StepRecord] = []
    model = SMALL.build()
    data = batches(4, 6, 2)
    result = tune(model, data, epochs=2, lr=0.02, schedule="linear", on_step=lambda record, _: steps.append(record))
    assert [(record.epoch, record.step, record.examples) for record in steps] == [
        (epoch, 3 * epoch + i, size) for epoch in range(2) for i, size in enumerate((4, 6, 2))
    ]
    for epoch, record in enumerate(result.history):
        mine = [step for step in steps if step.epoch == epoch]
        assert (record.epoch, record.steps, record.examples, record.skipped, record.left_out) == (epoch, 3, 12, 0, 0)
        assert record.loss == pytest.approx(sum(step.loss * step.examples for step in mine) / 12)
        assert record.error == pytest.approx(sum(step.error * step.examples for step in mine) / 12)
        assert record.lr == mine[-1].lr == pytest.approx(0.02 * (1 - (3 * epoch + 2) / 6))
        assert record.seconds > 0
    assert (result.steps, result.train, result.ended, result.skipped) == (6, "bn", "epochs", 0)
    trains = bn_names(model, *PARAMETERS)
    assert result.trainable == tuple(name for name, _ in model.named_parameters() if name in trains)


def test_loss_and_error_are_those_of_the_batch_trained_on() -> None:
    model, reference = SMALL.build(), SMALL.build().train()
    ((x, y),) = batches(6)
    result = tune(model, [(x, y)], attack=Recording(), clean_fraction=0.5)
    logits = reference(torch.cat([x[:3], x[3:] + 0.01])).detach()
    assert result.history[0].loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert result.history[0].error == pytest.approx(100 * float((logits.argmax(1) != y).double().mean()))


def test_a_loss_of_ones_own_is_used() -> None:
    def brier(logits: Tensor, y: Tensor) -> Tensor:
        return (logits.softmax(1) - F.one_hot(y, 10)).square().sum(1)

    one, two, reference = SMALL.build(), SMALL.build(), SMALL.build().train()
    ((x, y),) = batches(6)
    result = tune(one, [(x, y)], attack=None, loss=brier)
    tune(two, [(x, y)], attack=None)
    assert result.history[0].loss == pytest.approx(float(brier(reference(x).detach(), y).mean()), rel=1e-5)
    assert values(one) != values(two)


def test_the_record_is_ready_for_json() -> None:
    result = tune(SMALL.build(), batches(4, 4), epochs=2)
    record = json.loads(json.dumps(result.record()))
    assert record["train"] == "bn"
    assert record["steps"] == 4
    assert [EpochRecord(**epoch) for epoch in record["history"]] == list(result.history)
    assert tuple(record["trainable"]) == result.trainable


def test_statistics_alone_have_no_learning_rate() -> None:
    assert tune(SMALL.build(), batches(4), train="bn-stats").history[0].lr == 0


# Callbacks and the end.


def test_callbacks_are_called_after_each_epoch_with_record_and_model() -> None:
    model = SMALL.build()
    seen = []
    result = tune(
        nn.DataParallel(model),
        batches(4),
        epochs=3,
        callbacks=[lambda *arguments: seen.append(arguments), lambda *_: seen.append(None)],
    )
    assert [arguments for arguments in seen if arguments] == [(record, model) for record in result.history]
    assert seen[1::2] == [None] * 3


def test_a_callback_may_change_the_mode_of_the_model() -> None:
    one, two = SMALL.build(), SMALL.build()
    tune(one, batches(4, 4), epochs=2)
    tune(two, batches(4, 4), epochs=2, callbacks=[lambda _, model: model.eval() and None])
    assert values(one) == values(two)


@pytest.mark.parametrize("which", ["callback", "on_step", "max_steps"])
def test_a_run_ends_early(which: str) -> None:
    others = []
    options = {
        "callback": {"callbacks": [lambda record, _: record.epoch == 1, lambda *_: others.append(1)]},
        "on_step": {"on_step": lambda record, _: record.step == 3},
        "max_steps": {"max_steps": 4},
    }[which]
    steps = {"callback": [3, 3], "on_step": [3, 1], "max_steps": [3, 1]}[which]
    result = tune(SMALL.build(), batches(2, 2, 2), epochs=4, **options)
    assert [record.steps for record in result.history] == steps
    assert result.steps == sum(steps)
    assert result.ended == {"max_steps": "max_steps"}.get(which, "callback")
    assert len(others) == (2 if which == "callback" else 0)


def test_max_steps_reads_no_further() -> None:
    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(4, 4)
        raise AssertionError("read on")

    assert tune(SMALL.build(), stream(), max_steps=2).steps == 2


class Clock:
    """Stands in for time.perf_counter: each epoch takes as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def epoch_of(self, *seconds: float) -> Callable[[EpochRecord, nn.Module], None]:
        def spend(record: EpochRecord, _: nn.Module) -> None:
            self.now += seconds[record.epoch]

        return spend


@pytest.mark.parametrize(
    ("limit", "seconds", "epochs"),
    [
        (29, (10, 10, 10, 10), 2),  # a third one would end at 30
        (30, (10, 10, 10, 10), 3),
        (1, (10, 10, 10, 10), 1),  # one in any case
        (23, (10, 2, 2, 2), 3),  # the longest so far counts: 12 + 10 is in time, 14 + 10 is not
        (1000, (10, 10, 10, 10), 4),
    ],
)
def test_no_epoch_begins_that_would_end_after_max_seconds(
    limit: float, seconds: tuple[float, ...], epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    result = tune(SMALL.build(), batches(4, 4), epochs=4, max_seconds=limit, callbacks=[clock.epoch_of(*seconds)])
    assert len(result.history) == epochs
    assert result.ended == ("epochs" if epochs == 4 else "max_seconds")


def test_a_run_in_pieces_of_max_seconds_equals_one_in_one_go(tmp_path: Path) -> None:
    whole = noisy_model()
    expected = tune(whole, augmented(), epochs=4, schedule="cosine")
    path = tmp_path / "run.pt"
    ended = []
    for _ in range(6):
        torch.manual_seed(len(ended))
        model = noisy_model()
        result = tune(model, augmented(), epochs=4, schedule="cosine", checkpoint=path, max_seconds=1e-9)
        ended.append(result.ended)
    assert ended == ["max_seconds"] * 3 + ["epochs"] * 3
    assert values(model) == values(whole)
    assert [replace(r, seconds=0) for r in result.history] == [replace(r, seconds=0) for r in expected.history]


def test_a_callback_that_ends_the_run_counts_before_max_seconds(tmp_path: Path) -> None:
    options = {"epochs": 3, "checkpoint": tmp_path / "c", "max_seconds": 1e-9}
    assert tune(SMALL.build(), batches(4), callbacks=[lambda *_: True], **options).ended == "callback"
    assert tune(SMALL.build(), batches(4), **options).ended == "callback"


class Dtypes(nn.Module):
    """Notes what dtype a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.logits = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.seen: list[tuple[bool, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen.append((self.training, y.dtype))
        return self.logits(self.bn(y).relu().mean((2, 3)))


@pytest.mark.parametrize("train", ["bn", "all", "bn-stats"])
def test_step_precision_is_that_of_the_training_steps_forward_pass_alone(train: str) -> None:
    model, seen = Dtypes(), []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return F.cross_entropy(logits, y, reduction="none")

    tune(model, batches(4, 4), train=train, step_precision="bfloat16", engine="plain", loss=loss)
    assert {dtype for training, dtype in model.seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in model.seen if not training} == {torch.float32}
    assert set(seen) == {torch.float32}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}


def test_a_step_in_bfloat16_is_the_one_of_torchs_autocast() -> None:
    model, by_hand = Dtypes(), Dtypes()
    by_hand.load_state_dict(model.state_dict())
    data = batches(8, 8)
    tune(model, data, train="all", attack=None, step_precision="bfloat16", schedule="constant", engine="plain")
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for x, y in data:
        with torch.autocast("cpu", torch.bfloat16):
            logits = by_hand(x)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, by_hand.state_dict()[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_loss_of_a_step_in_bfloat16_is_computed_in_at_least_float32(dtype: torch.dtype) -> None:
    seen = []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return F.cross_entropy(logits, y, reduction="none")

    data = [(x.to(dtype), y) for x, y in batches(4)]
    tune(Dtypes().to(dtype), data, attack=None, step_precision="bfloat16", loss=loss)
    assert seen == [torch.promote_types(dtype, torch.float32)]


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_step_precision_auto_goes_by_the_hardware(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnsurgery.engine.fast_bfloat16", lambda device: fast)
    model = Dtypes()
    tune(model, batches(4), attack=None, step_precision="auto", engine="plain")
    assert {found for _, found in model.seen} == {dtype}
    double = Dtypes().double()
    tune(double, [(x.double(), y) for x, y in batches(4)], attack=None, step_precision="auto", engine="plain")
    assert {found for _, found in double.seen} == {torch.float64}


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_inside_the_callers_autocast_weights_train(engine: str) -> None:
    model, inside = Dtypes(), Dtypes()
    inside.load_state_dict(model.state_dict())
    data = batches(8, 8, 8)
    tune(model, data, train="all", attack=None, lr=0.5, step_precision="bfloat16", engine=engine)
    with torch.autocast("cpu", torch.bfloat16):
        tune(inside, data, train="all", attack=None, lr=0.5, engine=engine)
    difference = (inside.conv.weight - model.conv.weight).abs().max()
    assert difference < 0.02 * (model.conv.weight.abs().max())


def test_a_checkpoint_says_the_precision_of_the_step(tmp_path: Path) -> None:
    tune(SMALL.build(), batches(4), checkpoint=tmp_path / "c", epochs=2, max_seconds=1e-9)
    with pytest.raises(CheckpointError, match=r"step was 'None', is 'torch.bfloat16'"):
        tune(SMALL.build(), batches(4), checkpoint=tmp_path / "c", epochs=2, step_precision="bfloat16")


def test_progress_goes_to_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    tune(SMALL.build(), batches(4, 4), progress=False)
    assert capsys.readouterr() == ("", "")
    tune(SMALL.build(), batches(4, 4), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "fine-tuning" in err
    assert "2/2" in err


# The seed.


def noisy_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(384, 10),
        )


def shuffled(count: int = 12) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(SMALL.example(count), SMALL.labels(count)), batch_size=4, shuffle=True)


class Augmented(TensorDataset):
    """Draws from NumPy's and Python's generators too, as augmentations do."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return (x + 0.1 * np.random.rand() + 0.1 * random.random()).clamp(0, 1), y


def augmented(count: int = 12) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(Augmented(SMALL.example(count), SMALL.labels(count)), batch_size=4, shuffle=True)


def test_the_same_seed_gives_the_same_bits() -> None:
    results, models = [], []
    for elsewhere, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(elsewhere)
        np.random.seed(elsewhere)
        model = noisy_model()
        results.append(tune(model, augmented(), epochs=2, train="all", seed=seed))
        models.append(model)
    assert values(models[0]) == values(models[1])
    assert [replace(r, seconds=0) for r in results[0].history] == [replace(r, seconds=0) for r in results[1].history]
    assert values(models[0]) != values(models[2])


def test_the_attack_handed_in_is_as_before() -> None:
    attack = PGD(steps=1, seed=3)
    one, two = SMALL.build(), SMALL.build()
    tune(one, batches(4), attack=attack)
    tune(two, batches(4), attack=attack)
    assert values(one) == values(two)
    model = SMALL.build()
    ((x, y),) = batches(4)
    assert torch.equal(attack(model, x, y), PGD(steps=1, seed=3)(model, x, y))


# No trace but what was asked for.


def traces(world: World) -> list[str]:
    """What differs, apart from the values of tensors."""
    now = world._look()
    return [key for key in now if now[key] != world.before.get(key) and not key.startswith("values of")]


@pytest.mark.parametrize("train", ["bn", "bn-params", "bn-stats", "all", "as-is"])
def test_modes_flags_gradients_and_random_state_are_as_before(train: str) -> None:
    model = lived_in(nn.Sequential(SMALL.build(), nn.Dropout(0.2)))
    with tracing():
        world = World(model)
        tune(model, shuffled(), train=train, epochs=2)
        assert traces(world) == []


def broken(data: Batches, error: BaseException) -> Iterator[tuple[Tensor, Tensor]]:
    yield from data
    raise error


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("where", ["loader", "attack", "callback", "on_step", "loss", "forward", "optimizer"])
@pytest.mark.parametrize("train", ["bn", "bn-params", "all"])
def test_an_exception_leaves_the_model_as_after_the_last_whole_step(
    where: str, error: BaseException, train: str
) -> None:
    data = batches(4, 4, 4)
    expected = lived_in(SMALL.build())
    # The third step breaks, or what comes after the second.
    tune(expected, data[:2], train=train, schedule="constant")
    model = lived_in(SMALL.build())
    calls = {"training": 0}

    def breaks_on_third_call(*arguments: object) -> Tensor:
        calls["loss"] = calls.get("loss", 0) + 1
        if calls["loss"] == 3:
            raise error
        return F.cross_entropy(*arguments, reduction="none")

    class Breaking(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            calls["step"] = calls.get("step", 0) + 1
            if calls["step"] == 3:
                raise error
            super().step()

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls["attack"] = calls.get("attack", 0) + 1
        if calls["attack"] == 3:
            model.train()
            model(x)
            raise error
        return x + 0.01

    def at_the_end(module: nn.Module, inputs: object, output: object) -> None:
        if module.training and torch.is_grad_enabled():
            calls["training"] += 1
            if calls["training"] == 3:
                raise error

    def stop(record: object, _: nn.Module) -> None:
        if isinstance(record, EpochRecord) or record.step == 1:
            raise error

    options: dict[str, object] = {
        "loader": {},
        "attack": {"attack": attack},
        "callback": {"callbacks": [stop]},
        "on_step": {"on_step": stop},
        "loss": {"loss": breaks_on_third_call},
        "forward": {},
        "optimizer": {
            "optimizer": lambda parameters: Breaking(
                parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
        },
    }[where]
    if where == "attack":
        expected = lived_in(SMALL.build())
        tune(expected, data[:2], train=train, schedule="constant", attack=Recording())
    if where == "forward":
        model[10].register_forward_hook(at_the_end)
    given: object = data
    if where == "loader":
        given = broken(data[:2], error)
    elif where == "callback":
        given = data[:2]
    world = World(model)
    with pytest.raises(type(error)):
        tune(model, given, train=train, schedule="constant", **options)
    assert traces(world) == []
    assert values(model) == values(expected)


# Batches that cannot be trained on.


def test_a_loss_that_is_not_finite_is_skipped_with_one_warning() -> None:
    data = batches(4, 4, 4, 4)

    def sometimes_nan(value: float) -> Callable[[Tensor, Tensor], Tensor]:
        calls = []

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            calls.append(1)
            factor = value if len(calls) in (3, 4) else 1.0
            return F.cross_entropy(logits, y, reduction="none") * factor

        return loss

    expected = SMALL.build()
    first = tune(expected, data[:2], schedule="constant", train="all")
    for value in (torch.nan, torch.inf, -torch.inf):
        model = SMALL.build()
        steps = []
        with pytest.warns(BNSurgeryWarning, match="step 2: the loss is not finite; the step is skipped") as caught:
            result = tune(
                model,
                data,
                schedule="constant",
                train="all",
                loss=sometimes_nan(value),
                on_step=lambda record, _: steps.append(record.step),  # noqa: B023 - called at once
            )
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert values(model) == values(expected)
        record = result.history[0]
        assert (record.steps, record.skipped, record.examples, result.steps, result.skipped) == (2, 2, 8, 4, 2)
        assert record.loss == first.history[0].loss
        assert steps == [0, 1]


class Averaging(nn.Module):
    """Puts a new tensor in the place of a buffer with each pass; calls its BN layer by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.register_buffer("average", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(input=x.flatten(1))
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return self.head(x)


def test_a_buffer_that_a_pass_replaces_is_put_back_with_the_step() -> None:
    model = Averaging()
    x, y = torch.rand(4, 3, 2, 2), torch.randint(4, (4,))
    tune(model, [(x, y)], attack=None)
    before, held = values(model), model.average
    with pytest.warns(BNSurgeryWarning, match="not finite"):
        tune(model, [(torch.full_like(x, math.nan), y)], attack=None)
    assert values(model) == before
    assert model.average is held


def test_a_batch_of_one_is_left_out_where_a_layer_is_called_by_name() -> None:
    model = Averaging()
    with pytest.warns(BNSurgeryWarning, match="one value per channel"):
        result = tune(model, [(torch.rand(1, 3, 2, 2), torch.zeros(1).long())], attack=None)
    assert result.history[0].left_out == 1


def test_a_gradient_that_is_not_finite_is_skipped_too() -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * torch.inf

    model = SMALL.build()
    before = values(model)
    with pytest.warns(BNSurgeryWarning, match="step 0: the gradient of '[^']+' is not finite"):
        result = tune(
            model, batches(4), attack=None, loss=lambda logits, y: F.cross_entropy(Spike.apply(logits), y)[None]
        )
    assert changed(before, model) == set()
    assert result.skipped == 1
    assert math.isnan(result.history[0].loss)
    assert result.history[0].examples == 0


def test_statistics_of_a_clean_pass_are_guarded_too() -> None:
    model = SMALL.build()
    before = values(model)
    with pytest.warns(BNSurgeryWarning, match="not finite"):
        tune(model, batches(4), train="bn-stats", loss=lambda logits, y: logits[:, 0] * torch.nan)
    assert changed(before, model) == set()


@pytest.mark.parametrize("train", ["bn", "bn-stats", "all"])
@pytest.mark.parametrize(
    "attack", [FAST, None, PGD(steps=1, bn="batch"), PGD(steps=1, bn="train")], ids=["eval", "None", "batch", "train"]
)
def test_a_last_batch_of_one_is_left_out_with_one_warning(train: str, attack: PGD | None) -> None:
    expected, model = SMALL.build(), SMALL.build()
    whole = tune(expected, batches(4, 4), train=train, attack=attack, schedule="constant")
    data = batches(4, 4)
    data.append((data[0][0][:1], data[0][1][:1]))
    with pytest.warns(BNSurgeryWarning, match=r"step 2: .*one value per channel.*left out") as caught:
        result = tune(model, data, train=train, attack=attack, schedule="constant")
    assert len(caught) == 1
    assert values(model) == values(expected)
    assert (result.history[0].left_out, result.history[0].steps, result.history[0].examples) == (1, 2, 8)
    assert result.history[0].loss == whole.history[0].loss


def test_a_batch_of_one_trains_where_its_layers_see_many_values() -> None:
    model = SHARED.build()
    result = tune(model, batches(1, 1, case=SHARED))
    assert (result.history[0].steps, result.history[0].left_out) == (2, 0)


def test_a_batch_of_one_trains_where_statistics_are_fixed() -> None:
    result = tune(SMALL.build(), batches(1, 1), train="bn-params")
    assert (result.history[0].steps, result.history[0].left_out) == (2, 0)


# Wrappers.


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["DataParallel", "compile"],
)
@pytest.mark.parametrize("train", ["bn", "bn-params", "all"])
def test_wrapped_models_train_as_what_is_inside(wrap: Callable[[nn.Module], nn.Module], train: str) -> None:
    torch._dynamo.reset()
    plain, inside = SMALL.build(), SMALL.build()
    expected = tune(plain, batches(4, 4), train=train, epochs=2)
    wrapped = wrap(inside)
    world = World(inside)
    result = tune(wrapped, batches(4, 4), train=train, epochs=2)
    assert traces(world) == []
    assert result.trainable == expected.trainable
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(inside.state_dict()[name], tensor, rtol=1e-5, atol=1e-6), name
    assert changed(values(SMALL.build()), inside) == changed(values(SMALL.build()), plain)


# Refusals.

X, Y = SMALL.example(), SMALL.labels()
BATCH = "data must yield pairs (x, y) of tensors, got "


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((X, Y), {}, "data must be an iterable of (x, y) batches, got one pair of tensors: use a DataLoader"),
        ([X, Y], {}, "data must be an iterable of (x, y) batches, got one pair of tensors: use a DataLoader"),
        (3, {}, "data must be an iterable of (x, y) batches, got int"),
        (None, {}, "data must be an iterable of (x, y) batches, got NoneType"),
        ([], {}, "data yielded no batch in epoch 0"),
        (iter(()), {}, "data yielded no batch in epoch 0: it must be an iterable that can be gone over each epoch"),
        ([(X, Y + 5)], {}, "y must lie in 0 ... 9, got labels from"),
        ([(X, Y + 5)], {"attack": None}, "y must lie in 0 ... 9, got labels from"),
        ([(X, Y - 5)], {"train": "bn-stats", "attack": None}, "y must lie in 0 ... 9, got labels from -"),
        ([(X, Y[:3])], {}, "y must have shape (6,) to go with x (6, 3, 8, 8), got (3,)"),
        ([(X, Y.float())], {}, "y must hold integer labels, got torch.float32"),
        ([((255 * X).to(torch.uint8), Y)], {}, "x must be floating point, got torch.uint8"),
        ([(255 * X, Y)], {}, "x must lie in bounds=(0, 1), got values from"),
        ([X], {}, BATCH + "a tensor (6, 3, 8, 8) of torch.float32"),
        ([(X, Y, Y)], {}, BATCH + "a tuple of 3"),
        ([{"x": X}], {}, BATCH + "a dict"),
        ([(X, Y)], {"epochs": 0}, "epochs must be at least 1, got 0"),
        ([(X, Y)], {"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ([(X, Y)], {"max_seconds": 0}, "max_seconds must be above 0, got 0"),
        ([(X, Y)], {"max_seconds": math.nan}, "max_seconds must be above 0, got nan"),
        (
            [(X, Y)],
            {"step_precision": "float16"},
            "step_precision must be one of 'model', 'auto', 'bfloat16', got 'float16'",
        ),
        (
            [(X, Y)],
            {"eps_warmup": 1},
            "eps_warmup must be a whole number from 0 to below epochs=1, got 1",
        ),
        ([(X, Y)], {"eps_warmup": -1}, "eps_warmup must be a whole number from 0 to below epochs=1, got -1"),
        ([(X, Y)], {"eps_warmup": 0.5}, "eps_warmup must be a whole number from 0 to below epochs=1, got 0.5"),
        ([(X, Y)], {"eps_warmup": math.nan}, "eps_warmup must be a whole number from 0 to below epochs=1, got nan"),
        ([(X, Y)], {"eps_warmup": 1, "epochs": 2, "attack": None}, "eps_warmup goes with a PGD as attack, got None"),
        (
            [(X, Y)],
            {"eps_warmup": 1, "epochs": 2, "attack": torchattacks.FGSM(SMALL.build())},
            "eps_warmup goes with a PGD as attack, got torchattacks.FGSM",
        ),
        ([(X, Y)], {"clean_fraction": 1.5}, "clean_fraction must lie in [0, 1], got 1.5"),
        ([(X, Y)], {"clean_fraction": -0.1}, "clean_fraction must lie in [0, 1], got -0.1"),
        ([(X, Y)], {"clean_fraction": math.nan}, "clean_fraction must lie in [0, 1], got nan"),
        (
            [(X, Y)],
            {"train": "BN"},
            "train must be one of 'bn', 'bn-params', 'bn-stats', 'all', 'as-is', got 'BN'",
        ),
        (
            [(X, Y)],
            {"schedule": "exponential"},
            "schedule must be one of 'constant', 'linear', 'cosine', 'step' or a function, got 'exponential'",
        ),
        ([(X, Y)], {"also": "11"}, "also='11' matches nothing; the nearest names are '1'"),
        ([(X, Y)], {"train": "as-is", "also": "0"}, "also= goes with the other kinds of train=: with 'as-is', set"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused_by_name(data: object, options: dict[str, object], message: str) -> None:
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        tune(model, data, **options)
    assert world.unchanged()


@pytest.mark.parametrize("attack", ["pgd-20", 3, torchattacks.PGD], ids=str)
def test_what_is_no_attack_is_refused(attack: object) -> None:
    with pytest.raises(TypeError, match=re.escape("an attack must be a PGD, a torchattacks or AutoAttack object")):
        tune(SMALL.build(), Untouchable(), attack=attack)


def test_data_that_can_be_gone_over_only_once_is_refused_in_the_second_epoch() -> None:
    model = SMALL.build()
    with pytest.raises(
        ValueError,
        match="data yielded no batch in epoch 1: it must be an iterable that can be gone over each epoch",
    ):
        tune(model, iter(batches(4, 4)), epochs=2, schedule="constant")
    expected = SMALL.build()
    tune(expected, batches(4, 4), schedule="constant")
    assert values(model) == values(expected)


@pytest.mark.parametrize("train", ["bn", "bn-params", "bn-stats"])
def test_a_model_without_bn_is_refused(train: str) -> None:
    with pytest.raises(NoBatchNormError, match="Sequential has no batch-normalization layer"):
        tune(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), batches(4), train=train)


def test_where_nothing_requires_a_gradient_as_is_is_refused() -> None:
    with pytest.raises(ValueError, match="train='as-is', and no parameter requires a gradient"):
        tune(SMALL.build().requires_grad_(False), batches(4), train="as-is")


@pytest.mark.filterwarnings("ignore:no BN layer has a gamma or beta")
def test_where_bn_has_nothing_to_train_that_is_said() -> None:
    with pytest.raises(ValueError, match="train='bn', and no BN layer has a gamma or beta: nothing trains; name some"):
        tune(AFFINE_FREE.build(), batches(4), train="bn")


def test_a_lazy_model_is_refused() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(BNSurgeryError, match="lazy and not yet initialised: run a forward pass first"):
        tune(model, batches(4))


def test_a_gradient_that_is_not_finite_in_the_last_parameter_alone_is_noticed() -> None:
    model = SMALL.build()

    def poison(logits: Tensor, y: Tensor) -> Tensor:
        # sqrt(0) is finite, and its slope is not.
        return F.cross_entropy(logits, y, reduction="none") + (model[8].bias.sum() * 0).sqrt()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(BNSurgeryWarning, match="the gradient of '8.bias' is not finite"):
        run = adv_finetune(model, batches(6), epochs=1, attack=None, loss=poison, progress=False)
    assert run.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_record_of_a_run_without_a_whole_step_is_json_without_nan() -> None:
    model = SMALL.build()
    with pytest.warns(BNSurgeryWarning, match="not finite"):
        run = adv_finetune(
            model, batches(6), epochs=1, attack=None, loss=lambda logits, y: logits.sum(1) * math.nan, progress=False
        )
    assert json.loads(json.dumps(run.record(), allow_nan=False))["history"][0]["loss"] is None


def test_a_batch_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="data yielded a batch without examples in epoch 0"):
        tune(SMALL.build(), [(torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))])


@pytest.mark.parametrize("argument", [{"epochs": 1.5}, {"epochs": 1, "max_steps": 2.5}], ids=str)
def test_counts_must_be_whole(argument: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be a whole number, got \d\.5"):
        adv_finetune(SMALL.build(), batches(1), **argument)


def test_a_dataset_in_place_of_a_loader_is_told_the_remedy() -> None:
    data: object = TensorDataset(torch.rand(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="put a Dataset in a DataLoader"):
        adv_finetune(SMALL.build(), data, epochs=1)


def test_adversarial_examples_of_one_image_in_a_mixed_batch_meet_batch_statistics() -> None:
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.warns(BNSurgeryWarning, match="one value per channel"):
        run = adv_finetune(
            SMALL.build(), [(x, y)], epochs=1, clean_fraction=0.5, attack=PGD(steps=1, bn="batch"), progress=False
        )
    assert run.history[0].left_out == 1


def test_one_callback_needs_no_list() -> None:
    seen = []
    tune(SMALL.build(), batches(6), epochs=2, callbacks=lambda record, _: seen.append(record.epoch))
    assert seen == [0, 1]
