"""The same results on a CUDA device as on the CPU, and nothing left behind there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bnsurgery import (
    PGD,
    BNSurgeryWarning,
    Engine,
    adv_finetune,
    bn_state,
    evaluate,
    fold_bn,
    freeze_except_bn,
    fuse_bn,
    recalibrate_bn,
)
from bnsurgery._replicas import Replicas, craft_on_copy
from networks import LIGHT, RESNET20, SMALL, Case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact_convolutions() -> object:
    """TF32 has ten bits: too few to compare with the CPU."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("case", LIGHT, ids=repr)
def test_fold_and_fuse_equal_evaluation_mode(case: Case) -> None:
    model, x = case.build().cuda().eval(), case.example().cuda()
    fused = fuse_bn(model, x)
    assert {affine.weight.device.type for affine in fold_bn(model).values()} == {"cuda"}
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ["pooled", "exact", "ema"])
def test_recalibration_equals_the_cpus(estimator: str) -> None:
    model = RESNET20.build(torch.float64)
    other = copy.deepcopy(model).cuda()
    data = [RESNET20.example(dtype=torch.float64)] * 2
    recalibrate_bn(model, data, estimator=estimator)
    recalibrate_bn(other, data, estimator=estimator)
    for name, value in bn_state(other).items():
        assert torch.allclose(value.cpu().double(), bn_state(model)[name].double(), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_equals_the_cpus_from_the_same_start(norm: str) -> None:
    model, x, y = SMALL.build(torch.float64), SMALL.example(dtype=torch.float64), SMALL.labels()
    attack = PGD(0.1, 5, 0.03, norm)
    made = attack(copy.deepcopy(model).cuda(), x.cuda(), y.cuda())
    assert made.is_cuda
    assert torch.allclose(made.cpu(), PGD(0.1, 5, 0.03, norm)(model, x, y), atol=1e-9)


def test_no_call_moves_the_devices_random_state() -> None:
    model, x, y = SMALL.build().cuda(), SMALL.example().cuda(), SMALL.labels().cuda()
    before = torch.cuda.get_rng_state()
    PGD()(model, x, y)
    evaluate(model, (x, y), attacks=["pgd-2", lambda model, x, y: x + 1e-3 * torch.rand_like(x)], progress=False)
    adv_finetune(model, [(x, y)], epochs=1, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_fine_tuning_moves_batches_and_changes_bn_alone() -> None:
    model = SMALL.build().cuda()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with freeze_except_bn(model) as frozen:
        trainable = set(frozen.trainable)
    run = adv_finetune(model, [(SMALL.example(), SMALL.labels())] * 2, epochs=2, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert run.steps == 4
    assert trainable <= changed
    assert changed <= bn_state(model).keys()


def test_autoattack_on_the_device_counts_as_by_hand() -> None:
    from pyautoattack import AutoAttack

    model, x, y = SMALL.build().cuda().eval(), SMALL.example(32), SMALL.labels(32)
    result = evaluate(model, (x, y), eps=0.001, progress=False)
    by_hand = AutoAttack(model, eps=0.001, norm="Linf", seed=0, device="cuda")
    made, _ = by_hand.run_standard_evaluation(x.cuda(), y.cuda(), batch_size=250)
    with torch.no_grad():
        assert int(result.robust.sum()) == int((model(made).argmax(1).cpu() == y).sum())


@pytest.mark.parametrize("attack", [PGD(0.1, 5, 0.03), PGD(0.1, 5, 0.03, "l2"), PGD(0.1, 5, 0.03, best=True)], ids=repr)
def test_a_captured_step_makes_the_same_examples_and_follows_the_model(attack: PGD) -> None:
    ends = []
    for engine in (Engine(), Engine(cuda_graph=False), "plain"):
        model = SMALL.build(torch.float64).cuda()
        data = [(SMALL.example(size, dtype=torch.float64), SMALL.labels(size)) for size in (6, 6, 4)]
        adv_finetune(model, data, epochs=3, attack=attack, lr=0.1, engine=engine, progress=False)
        ends.append(model.state_dict())
    captured, eager, plain = ends
    for name, value in plain.items():
        assert torch.allclose(captured[name].double(), value.double(), rtol=1e-6, atol=1e-8), name
        assert torch.allclose(eager[name].double(), value.double(), rtol=1e-6, atol=1e-8), name


def test_a_step_that_cannot_be_captured_runs_without() -> None:
    class Waiting(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inside(x)
            return logits * (1 if float(logits.sum()) < 1e9 else 2)

    model, attack = Waiting(SMALL.build()).cuda(), PGD(0.1, 3, 0.03)
    with pytest.warns(BNSurgeryWarning, match="cannot be captured in a CUDA graph"):
        run = adv_finetune(model, [(SMALL.example(), SMALL.labels())] * 2, epochs=1, attack=attack, progress=False)
    assert run.steps == 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_low_precision_fine_tunes_on_the_device(precision: str) -> None:
    model = RESNET20.build().cuda()
    data = [(RESNET20.example(), RESNET20.labels())] * 3
    run = adv_finetune(model, data, epochs=2, lr=0.01, precision=precision, progress=False)
    assert run.skipped == 0
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_evaluation_counts_the_same_examples_as_without_the_engine() -> None:
    model, pair = RESNET20.build(torch.float64).cuda(), (RESNET20.example(dtype=torch.float64), RESNET20.labels())
    fast, plain = (
        evaluate(model, pair, attacks=["pgd-5"], engine=engine, progress=False) for engine in ("fast", "plain")
    )
    assert torch.equal(fast.robust, plain.robust)


@pytest.mark.parametrize("attack", [PGD(0.1, 4, 0.03), PGD(0.1, 4, 0.03, "l2"), PGD(0.1, 4, 0.03, best=True)], ids=repr)
def test_a_step_is_captured_once_and_replayed_with_the_models_new_values(attack: PGD) -> None:
    model = SMALL.build(torch.float64).cuda().eval()
    x, y = SMALL.example(dtype=torch.float64).cuda(), SMALL.labels().cuda()
    replicas = Replicas(model, Engine(), dtype=None, compile=False)
    graphs: list[object] = []
    for _ in range(3):
        replica = replicas.fresh(x)
        assert replica is not None
        made = craft_on_copy(replica, attack, x, y, generator=torch.Generator().manual_seed(3))
        plain = attack(model, x, y, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(made, plain, rtol=0, atol=1e-9)
        graphs += [step for _, step, _ in replica._steps._held.values()]
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.2)
    assert None not in graphs
    assert len({id(graph) for graph in graphs}) == 1


def test_a_captured_step_follows_tensors_that_are_plain_attributes() -> None:
    class Centred(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mean = SMALL.build(torch.float64), torch.full((3, 1, 1), 0.5, device="cuda")

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner((x - self.mean) ** 2)
            return logits

    model, attack = Centred().cuda().eval(), PGD(0.1, 4, 0.03)
    x, y = SMALL.example(dtype=torch.float64).cuda(), SMALL.labels().cuda()
    replicas = Replicas(model, Engine(), dtype=None, compile=False)
    for mean in (0.5, 0.1, 0.9):
        model.mean.fill_(mean)
        replica = replicas.fresh(x)
        assert replica is not None
        made = craft_on_copy(replica, attack, x, y, generator=torch.Generator().manual_seed(3))
        plain = attack(model, x, y, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(made, plain, rtol=0, atol=1e-9)
