"""evaluate: the figures of AutoAttack by hand, examples counted one by one, and nobody is allowed to cheat."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pyautoattack
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnsurgery import PGD, AttackRow, BNSurgeryError, BNSurgeryWarning, Evaluation, evaluate
from bnsurgery._evaluating import InPixels, percent, plan
from bnsurgery.adapters import AUTOATTACK_PARTS
from networks import SMALL
from test_attacks import MEAN, STD, Bomb, Normalize, World, lived_in, to_input, tracing

CLASSES = 6


def task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six faint patterns under noise: easy, but for some examples only just."""
    patterns = torch.rand(CLASSES, 1, 6, 6, generator=torch.Generator().manual_seed(99)) - 0.5
    y = torch.arange(count) % CLASSES
    noise = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.25 * patterns[y] + 0.12 * noise).clamp(0, 1), y


@pytest.fixture(scope="module")
def hardened() -> nn.Module:
    """A small network, adversarially trained by a loop written out here, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, CLASSES)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, y = task(256, 0)
        for _ in range(6):
            for rows in torch.randperm(256).split(64):
                adversarial = x[rows].clone().requires_grad_()
                F.cross_entropy(model(adversarial), y[rows]).backward()
                adversarial = (x[rows] + 0.03 * adversarial.grad.sign()).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(model(adversarial), y[rows]).backward()
                optimizer.step()
    return model.train().requires_grad_(True)


class Above(nn.Module):
    """Class 1 where the one pixel is above a half, else class 0: all can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        value = x.flatten(1).mean(1)
        return torch.stack([0.5 - value, value - 0.5], 1)


PIXELS = [0.10, 0.42, 0.47, 0.58, 0.90, 0.30, 0.54]
LABELS = [0, 0, 0, 1, 1, 1, 1]  # the sixth is wrong from the start


def line() -> tuple[Tensor, Tensor]:
    return torch.tensor(PIXELS).view(-1, 1, 1, 1), torch.tensor(LABELS)


class Push:
    """Moves every example so far towards the other class, and remembers what it was given."""

    def __init__(self, far: float) -> None:
        self.far = far
        self.given: list[list[float]] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.given.append([round(value, 4) for value in x.flatten().tolist()])
        return x + self.far * (1 - 2 * y).view(-1, 1, 1, 1)


# Against AutoAttack by hand.


def by_hand(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, parts: tuple[str, ...]) -> Tensor:
    attack = pyautoattack.AutoAttack(model.eval(), norm=norm, eps=eps, version="standard", seed=7)
    attack.attacks_to_run = list(parts)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = CLASSES - 1
    with torch.random.fork_rng(), tracing():
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=8)
    with torch.no_grad():
        robust = model(adversarial).argmax(1) == y
    model.train()
    return robust


@pytest.mark.slow
def test_autoattack_breaks_the_same_examples_as_by_hand(hardened: nn.Module) -> None:
    x, y = task(12, 5)
    result = evaluate(hardened, (x, y), eps=0.03, batch_size=8, seed=7, progress=False)
    robust = by_hand(hardened, x, y, "Linf", 0.03, AUTOATTACK_PARTS)
    assert 0 < int(robust.sum()) < 12
    assert torch.equal(result.robust, robust)
    assert result.robust_error == pytest.approx(100 * (1 - robust.double().mean()))
    assert [row.attack for row in result.rows] == list(AUTOATTACK_PARTS)


@pytest.mark.parametrize(
    ("norm", "theirs", "eps", "parts"),
    [
        ("linf", "Linf", 0.03, ("apgd-t",)),
        ("l2", "L2", 0.15, ("apgd-ce",)),
        ("l2", "L2", 0.15, ("apgd-t", "apgd-ce")),
        ("l2", "L2", 0.15, ("fab-t",)),
    ],
)
def test_parts_of_autoattack_break_the_same_examples_as_by_hand(
    hardened: nn.Module, norm: str, theirs: str, eps: float, parts: tuple[str, ...]
) -> None:
    x, y = task(18, 5)
    result = evaluate(hardened, (x, y), attacks=parts, norm=norm, eps=eps, batch_size=8, seed=7, progress=False)
    robust = by_hand(hardened, x, y, theirs, eps, parts)
    assert 0 < int(robust.sum()) < 18
    assert torch.equal(result.robust, robust)


def test_an_autoattack_object_breaks_the_same_examples_as_by_hand(hardened: nn.Module) -> None:
    x, y = task(18, 5)
    attack = pyautoattack.AutoAttack(hardened, eps=0.03, version="custom", attacks=["apgd-ce"], seed=7)
    attack.apgd.n_restarts = 1
    result = evaluate(hardened, (x, y), attacks=[attack], eps=0.03, batch_size=8, progress=False)
    assert torch.equal(result.robust, by_hand(hardened, x, y, "Linf", 0.03, ("apgd-ce",)))
    assert [row.attack for row in result.rows] == ["AutoAttack"]


# Counted by hand.


def test_examples_are_counted_one_by_one() -> None:
    first, second = Push(0.05), Push(0.09)
    result = evaluate(Above(), line(), attacks=[first, second], eps=0.1, progress=False)
    assert result.examples == 7
    assert result.correct.tolist() == [True, True, True, True, True, False, True]
    assert result.robust.tolist() == [True, False, False, False, True, False, False]
    assert result.clean_error == pytest.approx(100 / 7)
    assert result.robust_error == pytest.approx(500 / 7)
    rows = [replace(row, robust_error=round(row.robust_error, 6), seconds=0) for row in result.rows]
    assert rows == [
        AttackRow("Push", tried=6, broken=2, rejected=0, robust_error=round(300 / 7, 6), seconds=0),
        AttackRow("Push", tried=4, broken=2, rejected=0, robust_error=round(500 / 7, 6), seconds=0),
    ]
    assert all(row.seconds >= 0 for row in result.rows)
    assert (result.eps, result.norm, result.seed) == (0.1, "linf", 0)
    assert result.adversarial is None


def test_broken_examples_are_not_attacked_again_and_batches_are_packed_anew() -> None:
    first, second = Push(0.05), Push(0.09)
    evaluate(Above(), line(), attacks=[first, second], eps=0.1, batch_size=3, progress=False)
    assert first.given == [[0.1, 0.42, 0.47], [0.58, 0.9, 0.54]]
    assert second.given == [[0.1, 0.42, 0.58], [0.9]]


def test_where_nothing_is_left_no_attack_is_called() -> None:
    push = Push(0.05)
    x, y = line()
    result = evaluate(Above(), (x, 1 - y), attacks=[Push(0.5), push, "square"], eps=0.5, progress=False)
    assert result.robust_error == 100
    assert push.given == []
    assert [(row.tried, row.broken, row.robust_error) for row in result.rows[1:]] == [(0, 0, 100)] * 2


def test_without_attacks_robust_error_is_clean_error() -> None:
    result = evaluate(Above(), line(), attacks=(), progress=False)
    assert result.rows == ()
    assert result.robust_error == result.clean_error == pytest.approx(100 / 7)
    assert torch.equal(result.robust, result.correct)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1)), min_size=1, max_size=12),
    st.lists(st.integers(1, 30), max_size=3),
    st.integers(1, 5),
)
def test_any_sequence_of_attacks_gives_what_each_example_meets(
    examples: list[tuple[int, int]], pushes: list[int], batch_size: int
) -> None:
    # In hundredths, and never on the boundary.
    x = torch.tensor([(hundredths + 0.5) / 101 for hundredths, _ in examples]).view(-1, 1, 1, 1)
    y = torch.tensor([label for _, label in examples])
    attacks = [lambda _, x, y, far=far: (x + far / 100 * (1 - 2 * y.view(-1, 1, 1, 1))).clamp(0, 1) for far in pushes]
    result = evaluate(Above(), (x, y), attacks=attacks, eps=0.3, batch_size=batch_size, progress=False)
    model = Above()
    wrong = [model(x).argmax(1) != y] + [model(attack(model, x, y)).argmax(1) != y for attack in attacks]
    assert torch.equal(result.correct, ~wrong[0])
    assert torch.equal(result.robust, ~torch.stack(wrong).any(0))
    for count, row in enumerate(result.rows, 1):
        assert row.tried == int((~torch.stack(wrong[:count]).any(0)).sum())
        assert row.broken == row.tried - int((~torch.stack(wrong[: count + 1]).any(0)).sum())
        assert row.robust_error == pytest.approx(percent(torch.stack(wrong[: count + 1]).any(0)))


# Cheats.


def outside_eps(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 1 - x


def outside_bounds(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x + 0.15 * (2 * (x > 0.5).float() - 1)


def nan(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


def infinite(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(x, torch.inf)


@pytest.mark.parametrize(
    ("cheat", "eps", "rejected"),
    # 1 - x is within 0.2 of x for 0.42, 0.47, 0.58 and 0.54, and within 0.1 for 0.47 and 0.54. 0.10 - 0.15 and
    # 0.90 + 0.15 are out of bounds.
    [(outside_eps, 0.2, 2), (outside_eps, 0.1, 4), (outside_bounds, 0.2, 2), (nan, 0.2, 6), (infinite, 0.2, 6)],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_moved_out_of_the_threat_do_not_count(
    cheat: Callable[..., Tensor], eps: float, rejected: int, norm: str
) -> None:
    message = re.escape(
        f"{cheat.__name__} moved {rejected} of 6 examples out of the {norm} ball of eps {eps} or out of bounds: "
        "they do not count as broken"
    )
    with pytest.warns(BNSurgeryWarning, match=message) as caught:
        result = evaluate(Above(), line(), attacks=[cheat], eps=eps, norm=norm, keep_adversarial=True, progress=False)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    row = result.rows[0]
    broken = {(outside_eps, 0.2): 4, (outside_eps, 0.1): 2}.get((cheat, eps), 0)
    assert (row.tried, row.broken, row.rejected) == (6, broken, rejected)
    assert bool(result.adversarial.isfinite().all())
    assert int((Above()(result.adversarial).argmax(1) != torch.tensor(LABELS)).sum()) == 1 + broken


def test_l2_is_measured_over_all_pixels() -> None:
    x, y = torch.full((2, 1, 2, 2), 0.52), torch.tensor([1, 1])

    def move(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x - 0.04  # an L2 distance of 0.08

    assert evaluate(Above(), (x, y), attacks=[move], eps=0.081, norm="l2", progress=False).robust_error == 100
    with pytest.warns(BNSurgeryWarning, match="move moved 2 of 2 examples out of the l2 ball of eps 0.079"):
        assert evaluate(Above(), (x, y), attacks=[move], eps=0.079, norm="l2", progress=False).robust_error == 0


def test_a_pgd_of_a_larger_eps_cheats() -> None:
    with pytest.warns(BNSurgeryWarning, match=r"PGD\(eps=0.4.* examples out of the linf ball of eps 0.01"):
        result = evaluate(Above(), line(), attacks=PGD(0.4, 5, 0.2, random_start=False), eps=0.01, progress=False)
    assert result.robust_error == result.clean_error


def test_rounding_is_no_cheat() -> None:
    x, y = line()

    def by_rounding(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.1 * (1 + 2e-6) * (1 - 2 * y).view(-1, 1, 1, 1)

    assert evaluate(Above(), (x, y), attacks=[by_rounding], eps=0.1, progress=False).rows[0].rejected == 0


def test_bounds_are_those_that_were_said() -> None:
    x, y = line()
    result = evaluate(Above(), (x, y), attacks=[outside_bounds], eps=0.2, bounds=(-1, 2), progress=False)
    assert result.rows[0].rejected == 0
    with pytest.warns(BNSurgeryWarning, match="Push moved 2 of 6 examples out of the linf ball of eps 0.2 or out of b"):
        result = evaluate(Above(), (x, y), attacks=[Push(-0.02)], eps=0.2, bounds=(0.09, 0.91), progress=False)
    assert result.rows[0].rejected == 2


def test_an_attack_that_returns_another_shape_is_refused() -> None:
    model = lived_in(SMALL.build())
    world = World(model)

    def crop(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x[..., 1:]

    with pytest.raises(BNSurgeryError, match=r"crop must return inputs of shape \(6, 3, 8, 8\), got a tensor"):
        evaluate(model, (SMALL.example(), right(model)), attacks=[crop], progress=False)
    assert world.unchanged()


def right(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """The labels that the model gives in evaluation mode, found on a copy."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(SMALL.example() if x is None else x).argmax(1)


# The record.


def test_standard_error_is_that_of_a_share() -> None:
    result = evaluate(Above(), line(), attacks=[Push(0.09)], eps=0.1, progress=False)
    assert result.standard_error == pytest.approx(100 * math.sqrt(5 / 7 * 2 / 7 / 7))


def test_record_is_ready_for_json() -> None:
    result = evaluate(Above(), line(), attacks=[Push(0.05), "pgd-2"], eps=0.1, seed=3, progress=False)
    record = json.loads(json.dumps(result.record()))
    assert record == {
        "examples": 7,
        "clean_error": result.clean_error,
        "robust_error": result.robust_error,
        "standard_error": result.standard_error,
        "eps": 0.1,
        "norm": "linf",
        "seed": 3,
        "rows": [
            {
                "attack": row.attack,
                "tried": row.tried,
                "broken": row.broken,
                "rejected": row.rejected,
                "robust_error": row.robust_error,
                "seconds": row.seconds,
            }
            for row in result.rows
        ],
    }


def test_str_is_a_small_table() -> None:
    row = AttackRow("apgd-ce", 90, 30, 0, 40.0, 1.26)
    long = AttackRow(repr(PGD()), 60, 10, 0, 50.0, 0.04)
    tensor = torch.tensor([True])
    result = Evaluation(100, 10.0, 50.0, (row, long), 8 / 255, "linf", 0, tensor, tensor)
    width = len(f"after {PGD()!r}") + 2
    assert str(result).splitlines() == [
        "100 examples, linf, eps 0.03137",
        "clean error".ljust(width) + " 10.00%",
        "after apgd-ce".ljust(width) + " 40.00%  (1.3 s)",
        f"after {PGD()!r}".ljust(width) + " 50.00%  (0.0 s)",
        "robust error".ljust(width) + " 50.00%  +- 5.0 (one standard error)",
    ]
    assert "clean error                  10.00%" in str(replace(result, rows=(row,)))


def test_adversarial_examples_are_kept_on_demand() -> None:
    x, y = line()
    result = evaluate(Above(), (x, y), attacks=[Push(0.05), Push(0.09)], eps=0.1, keep_adversarial=True, progress=False)
    expected = [0.10, 0.51, 0.52, 0.49, 0.90, 0.30, 0.49]
    assert result.adversarial.flatten().tolist() == pytest.approx(expected)
    assert x.flatten().tolist() == pytest.approx(PIXELS)


def test_kept_examples_are_inputs_of_the_model_also_where_data_is_normalised() -> None:
    model = lived_in(SMALL.build())
    x = to_input(SMALL.example(30))
    y = right(model, x)
    result = evaluate(
        model, (x, y), attacks=["pgd-5"], eps=0.03, mean=MEAN, std=STD, keep_adversarial=True, progress=False
    )
    assert 0 < result.robust_error < 100
    assert torch.equal(right(model, result.adversarial) == y, result.robust)
    assert torch.allclose(result.adversarial[result.robust], x[result.robust], atol=1e-5)


# Data.


def batches(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: batches(x, y, 4, 1, 2),
        lambda x, y: [[part, labels] for part, labels in batches(x, y, 4, 3)],
        lambda x, y: iter(batches(x, y, 5, 2)),
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=3),
        lambda x, y: batches(x, y.to(torch.uint8), 7),
        lambda x, y: (x, y.int()),
        lambda x, y: (x.double(), y),
    ],
    ids=["pair", "list pair", "tuples", "lists", "iterator", "loader", "uint8 labels", "int32 labels", "float64"],
)
def test_data_comes_in_many_forms(form: Callable[[Tensor, Tensor], object]) -> None:
    result = evaluate(Above(), form(*line()), attacks=[Push(0.09)], eps=0.1, batch_size=2, progress=False)
    assert result.robust.tolist() == [True, False, False, False, True, False, False]


@pytest.mark.parametrize("most", [1, 3, 4, 7, 100])
def test_max_examples_takes_the_first_and_reads_no_further(most: int) -> None:
    x, y = line()
    read = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for pair in batches(x, y, 3, 3, 1):
            read.append(len(pair[0]))
            yield pair

    whole = evaluate(Above(), (x, y), attacks=[Push(0.09)], eps=0.1, progress=False)
    for data in ((x, y), stream()):
        result = evaluate(Above(), data, attacks=[Push(0.09)], eps=0.1, max_examples=most, progress=False)
        assert result.examples == min(most, 7)
        assert torch.equal(result.robust, whole.robust[:most])
    assert read == [3, 3, 1][: math.ceil(most / 3)]


def test_the_batch_size_does_not_matter() -> None:
    model = SMALL.build()
    x = SMALL.example(30)
    attack = PGD(0.15, 5, 0.08, random_start=False)
    results = [
        evaluate(model, (x, right(model, x)), attacks=[attack], eps=0.15, batch_size=size, progress=False)
        for size in (1, 4, 30, 100)
    ]
    assert 0 < results[0].robust_error < 100
    assert all(torch.equal(result.robust, results[0].robust) for result in results)


def test_a_named_pgd_is_the_one_by_hand() -> None:
    model = SMALL.build().eval()
    x = SMALL.example(30)
    y = right(model, x)
    for steps in (1, 7):
        result = evaluate(
            model, (x, y), attacks=f"pgd-{steps}", eps=0.15, seed=11, keep_adversarial=True, progress=False
        )
        attack = PGD(0.15, steps, 2.5 * 0.15 / steps)
        made = attack(model, x, y, generator=torch.Generator().manual_seed(11))
        with torch.no_grad():
            assert torch.equal(result.robust, model(made).argmax(1) == y)
        assert torch.equal(result.adversarial[~result.robust], made[~result.robust])
        assert result.rows[0].attack == f"pgd-{steps}"
        assert 0 < result.robust_error < 100


def test_each_attack_starts_from_the_seed_whatever_ran_before() -> None:
    draws = []

    def record(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        draws.append(float(torch.rand(())))
        return x

    for attacks, seed in (([record], 0), ([idle, record], 0), ([record], 1)):
        evaluate(Above(), line(), attacks=attacks, seed=seed, batch_size=4, progress=False)
    assert draws[:2] == draws[2:4]
    assert draws[0] != draws[1]
    assert draws[:2] != draws[4:]


# The model.


def idle(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x + 0 * torch.rand(())


def test_mean_and_std_equal_normalisation_inside() -> None:
    model = lived_in(SMALL.build())
    pixels = SMALL.example(30)
    x = to_input(pixels)
    y = right(model, x)
    inside = nn.Sequential(Normalize(MEAN, STD), model)
    options = {"attacks": ["pgd-5", "apgd-ce"], "eps": 0.02, "progress": False, "batch_size": 16}
    expected = evaluate(inside, (pixels, y), **options)
    world = World(model)
    result = evaluate(model, (x, y), mean=MEAN, std=STD, **options)
    assert world.unchanged()
    assert 0 < result.robust_error < 100
    assert torch.equal(result.robust, expected.robust)
    assert [row.broken for row in result.rows] == [row.broken for row in expected.rows]


def test_in_pixels_is_normalisation_and_its_inverse() -> None:
    x = SMALL.example()
    model = InPixels(nn.Identity(), torch.float32, MEAN, STD)
    assert torch.allclose(model(x), Normalize(MEAN, STD)(x), atol=1e-6)
    assert torch.allclose(model.pixels(model(x)), x, atol=1e-6)


@pytest.mark.parametrize("kind", ["PGD", "MultiAttack", "AutoAttack"])
def test_an_attack_on_another_model_is_lent_the_right_one(kind: str) -> None:
    def build(model: nn.Module) -> object:
        if kind == "AutoAttack":
            return pyautoattack.AutoAttack(model, eps=0.15, version="custom", attacks=["apgd-ce"], seed=0)
        parts = [torchattacks.PGD(model, eps=0.15, alpha=0.1), torchattacks.FGSM(model, eps=0.15)]
        return parts[0] if kind == "PGD" else torchattacks.MultiAttack(parts)

    model, other = lived_in(SMALL.build()), SMALL.make()
    attack = build(other)
    data = SMALL.example(30), right(model, SMALL.example(30))
    result = evaluate(model, data, attacks=[attack], eps=0.15, progress=False)
    assert torch.equal(result.robust, evaluate(model, data, attacks=[build(model)], eps=0.15, progress=False).robust)
    assert 0 < result.robust_error < 100
    assert attack.model is other
    assert all(part.model is other for part in getattr(attack, "attacks", ()))


@pytest.mark.parametrize("mean", [None, MEAN], ids=["plain", "normalised"])
def test_leaves_no_trace(mean: list[float] | None) -> None:
    model = lived_in(SMALL.build())
    x = SMALL.example() if mean is None else to_input(SMALL.example())
    y = right(model, x)
    kept = x.clone()
    attacks = ["pgd-2", PGD(bn="train", steps=2), torchattacks.PGD(model, steps=2), "apgd-ce", idle]
    with tracing():
        world = World(model)
        evaluate(model, (x, y), attacks=attacks, eps=8 / 255, mean=mean, std=mean and STD, batch_size=4, progress=False)
        assert world.unchanged()
    assert torch.equal(x, kept)


@pytest.mark.parametrize("shuffle", [False, True])
def test_going_through_a_loader_does_not_move_the_random_state(shuffle: bool) -> None:
    x, y = line()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=shuffle)
    world = World()
    evaluate(Above(), loader, attacks=[Push(0.01)], progress=False)
    assert world.unchanged()


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_leaves_no_trace_when_it_breaks(call: int, error: BaseException) -> None:
    model = nn.Sequential(lived_in(SMALL.build()), Bomb(call, error))
    y = right(model[0])
    world = World(model)
    with pytest.raises(type(error)):
        evaluate(model, (SMALL.example(), y), attacks=["pgd-5"], progress=False)
    assert world.unchanged()


def test_a_model_in_training_mode_is_measured_in_evaluation_mode_and_comes_back() -> None:
    model = SMALL.build().train()
    modes = []
    model[1].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    with torch.no_grad():
        correct = SMALL.build().eval()(SMALL.example()).argmax(1) == SMALL.labels()
    result = evaluate(model, (SMALL.example(), SMALL.labels()), attacks=["pgd-2"], progress=False)
    assert set(modes) == {False}
    assert torch.equal(result.correct, correct)
    assert all(module.training for module in model.modules())


def test_autocast_around_it_is_off_inside() -> None:
    model = SMALL.build()
    data = SMALL.example(), right(model)
    seen = []
    model.register_forward_hook(lambda _, __, logits: seen.append(logits.dtype))
    outside = evaluate(model, data, attacks=["pgd-5"], eps=0.02, keep_adversarial=True, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(model, data, attacks=["pgd-5"], eps=0.02, keep_adversarial=True, progress=False)
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {torch.float32}
    assert torch.equal(inside.adversarial, outside.adversarial)


@pytest.mark.parametrize("attack", ["pgd-3", "apgd-ce"])
@pytest.mark.parametrize("data", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_measured(dtype: torch.dtype, data: str, attack: str) -> None:
    model = SMALL.build(dtype).eval()
    x = SMALL.example(30).to(dtype)  # exact in both
    y = right(model, x)
    given = x if data == "same" else x.float()
    world = World(model)
    # A warning (that the attack moved examples out of the ball, say) would be an error here.
    result = evaluate(model, (given, y), attacks=[attack], eps=0.3, progress=False)
    assert world.unchanged()
    assert result.clean_error == 0
    assert result.rows[0].rejected == 0
    assert result.robust_error > 0


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager"), lambda model: nn.DataParallel(model).eval()],
    ids=["DataParallel", "compile", "DataParallel in eval"],
)
def test_wrapped_models_are_measured_like_what_is_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = SMALL.build()
    data = SMALL.example(30), right(model, SMALL.example(30))
    expected = evaluate(model, data, attacks=["pgd-5"], eps=0.15, progress=False)
    wrapped = wrap(model)
    world = World(model)
    result = evaluate(wrapped, data, attacks=["pgd-5"], eps=0.15, progress=False)
    assert world.unchanged()
    assert 0 < result.robust_error < 100
    assert torch.equal(result.robust, expected.robust)


def test_progress_goes_to_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(Above(), line(), attacks=[Push(0.01), "pgd-2"], progress=False)
    assert capsys.readouterr() == ("", "")
    evaluate(Above(), line(), attacks=[Push(0.01), "pgd-2"], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Push" in err
    assert "pgd-2" in err


# Refusals.

X, Y = SMALL.example(), SMALL.labels()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((X, Y), {"eps": -1}, "eps must be finite and at least 0, got -1"),
        ((X, Y), {"eps": math.nan}, "eps must be finite and at least 0, got nan"),
        ((X, Y), {"norm": "L2"}, "norm must be one of 'linf', 'l2', got 'L2'"),
        ((X, Y), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ((X, Y), {"max_examples": 0}, "max_examples must be at least 1, got 0"),
        ((X, Y), {"mean": MEAN}, "mean and std go together: give both or neither"),
        ((X, Y), {"mean": MEAN, "std": [0.1, 0.0, 0.1]}, "std must be above 0, got [0.1, 0.0, 0.1]"),
        (
            (X, Y),
            {"attacks": "pgd"},
            (
                "attacks must be among 'autoattack', 'apgd-ce', 'apgd-t', 'fab-t', 'square', 'pgd-20', "
                "attack objects and callables, got 'pgd'"
            ),
        ),
        ((X, Y), {"attacks": ["pgd-2", "Square"]}, "attack objects and callables, got 'Square'"),
        ((X, Y), {"attacks": ["pgd-2x"]}, "attack objects and callables, got 'pgd-2x'"),
        (
            (X, Y),
            {"attacks": "autoattack", "bounds": (-1, 1)},
            "AutoAttack knows inputs in [0, 1] alone, got bounds=(-1, 1): rescale the data or use PGD",
        ),
        ((X, Y), {"attacks": ["pgd-1", "square"], "bounds": (0, 2)}, "AutoAttack knows inputs in [0, 1] alone"),
        ((X, Y), {"attacks": ["pgd-1"], "bounds": (1, 0)}, "bounds must be (low, high) with low < high, got (1, 0)"),
        ((X, Y), {"attacks": [Push(0)], "bounds": (1, 0)}, "bounds"),
        ([], {}, "data has no examples"),
        (iter(()), {}, "data has no examples"),
        ((X[:0], Y[:0]), {}, "data has no examples"),
        ([(X[:0], Y[:0])], {}, "data has no examples"),
        ((X + 1, Y), {}, "x must lie in bounds=(0, 1), got values from 1"),
        ((X * torch.nan, Y), {}, "x must lie in bounds=(0, 1), got values from nan to nan"),
        ((to_input(X), Y), {}, "or say mean= and std= if they are normalised"),
        ((X, Y), {"mean": MEAN, "std": [5.0] * 3}, "x must lie in bounds=(0, 1), got values from"),
        ((X, Y + 5), {}, "y must lie in 0 ... 9, got labels from"),
        ((X, Y - 5), {}, "y must lie in 0 ... 9, got labels from -"),
        ((X, Y[:3]), {}, "y must have shape (6,) to go with x (6, 3, 8, 8), got (3,)"),
        ((X, Y.float()), {}, "y must hold integer labels, got torch.float32"),
        (((255 * X).to(torch.uint8), Y), {}, "x must be floating point, got torch.uint8: scale images to [0, 1] first"),
        ([X, Y, X], {}, "data must yield pairs (x, y) of tensors, got a tensor (6, 3, 8, 8) of torch.float32"),
        ([(X, Y, Y)], {}, "data must yield pairs (x, y) of tensors, got a tuple of 3"),
        ([{"x": X}], {}, "data must yield pairs (x, y) of tensors, got a dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused_by_name(data: object, options: dict[str, object], message: str) -> None:
    model = lived_in(SMALL.build())
    world = World(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(model, data, **{"attacks": ["pgd-2"], "progress": False, **options})
    assert world.unchanged()


@pytest.mark.parametrize("attack", [3, object(), torchattacks.PGD, [PGD()]], ids=lambda value: type(value).__name__)
def test_what_is_no_attack_is_refused_before_any_data_is_read(attack: object) -> None:
    def untouchable() -> Iterator[None]:
        raise AssertionError("read")
        yield

    with pytest.raises(TypeError, match=re.escape("an attack must be a PGD, a torchattacks or AutoAttack object")):
        evaluate(Above(), untouchable(), attacks=["pgd-1", attack], progress=False)


def test_data_that_is_not_iterable_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="data must"):
        evaluate(Above(), 3, attacks=["pgd-1"], progress=False)


def test_a_plan_names_each_part() -> None:
    names = [name for name, _ in plan(["autoattack", "pgd-3", PGD(), Push(0.1)], 8 / 255, "linf", (0.0, 1.0))]
    assert names == [*AUTOATTACK_PARTS, "pgd-3", repr(PGD()), "Push"]


def test_an_attack_with_a_normalisation_of_its_own_is_refused_where_evaluate_normalises() -> None:
    attack = PGD(mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"has a normalisation of its own, and with evaluate\(mean=, std=\)"):
        evaluate(SMALL.build(), (SMALL.example(), SMALL.labels()), attacks=[attack], mean=MEAN, std=STD)


@pytest.mark.parametrize("attack", [PGD(1 / 255), PGD(8 / 255, norm="l2")], ids=repr)
def test_an_attack_of_another_threat_than_the_evaluated_is_warned_about(attack: PGD) -> None:
    with pytest.warns(BNSurgeryWarning, match="not of the threat that is evaluated, linf eps 0.03137"):
        evaluate(SMALL.build(), (SMALL.example(), SMALL.labels()), attacks=[attack], progress=False)


def test_a_targeted_pgd_is_refused_for_it_would_be_given_the_true_labels() -> None:
    with pytest.raises(ValueError, match="a targeted PGD takes labels as targets"):
        evaluate(SMALL.build(), (SMALL.example(), SMALL.labels()), attacks=[PGD(targeted=True)], progress=False)


def test_an_eps_beyond_the_bounds_is_refused() -> None:
    data = SMALL.example(), SMALL.labels()
    with pytest.raises(ValueError, match="did you mean 8/255"):
        evaluate(SMALL.build(), data, attacks=["pgd-2"], eps=8)
    with pytest.raises(ValueError, match="did you mean 8/255"):
        evaluate(SMALL.build(), data, attacks=[PGD(8)], eps=8 / 255)


@pytest.mark.parametrize("model_type", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("data_type", [torch.float32, torch.float64], ids=str)
def test_double_precision_is_evaluated_whatever_the_data(model_type: torch.dtype, data_type: torch.dtype) -> None:
    model, x, y = SMALL.build(), SMALL.example(), SMALL.labels()
    expected = evaluate(model, (x, y), attacks=["pgd-2"], progress=False)
    found = evaluate(model.to(model_type), (x.to(data_type), y), attacks=["pgd-2"], progress=False)
    assert torch.equal(found.robust, expected.robust)


@pytest.mark.parametrize("options", [{}, {"mean": [0.5], "std": [0.5]}], ids=["pixels", "normalised"])
def test_outputs_that_are_no_tensor_are_named(options: dict[str, list[float]]) -> None:
    class Dict(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x.flatten(1)}

    with pytest.raises(ValueError, match=r"the model must return logits \(6, classes\), got a dict"):
        evaluate(Dict(), (SMALL.example(), SMALL.labels()), attacks=["pgd-2"], progress=False, **options)
