"""Ways to fine-tune BN layers adversarially: this library, three attack packages each with a plain loop, and by hand.

Each makes the same step: examples by PGD (L-infinity, eps 8/255, step 2/255, random start) with the model in evaluation
mode, then SGD with Nesterov momentum on gamma and beta, with the model in training mode.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import torch
import torch.nn.functional as F
from resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery import PGD, adv_finetune

EPS, STEP = 8 / 255, 2 / 255
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
BASELINE = "torchattacks + loop"
CAREFUL = ("careful, float32", "careful, bfloat16")
COMPILED = "bnsurgery compiled"

Batch: TypeAlias = tuple[Tensor, Tensor]
Attack: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Run: TypeAlias = Callable[[nn.Module, Sequence[Batch], Callable[[], None]], None]
"""Fine-tunes a model on batches, and calls back after each step."""


@dataclass(frozen=True)
class Case:
    """A model, its inputs and the attack.

    Attributes:
        architecture: ``"resnet"``, the CIFAR ResNet of ``examples/resnet.py``, or a name of ``torchvision.models``.
        batch: batch size.
        size: height and width of the images.
        classes: number of classes.
        depth: of the CIFAR ResNet.
        width: of the CIFAR ResNet.
        attack_steps: of PGD.
    """

    architecture: str = "resnet"
    batch: int = 128
    size: int = 32
    classes: int = 10
    depth: int = 20
    width: int = 16
    attack_steps: int = 10

    def model(self, device: torch.device, seed: int) -> nn.Module:
        """The model with random weights."""
        torch.manual_seed(seed)
        if self.architecture == "resnet":
            return ResNet(self.depth, self.width, self.classes).to(device)
        import torchvision

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build = getattr(torchvision.models, self.architecture)
            model: nn.Module = build(weights=None, num_classes=self.classes)
        return model.to(device)

    def batches(self, count: int, device: torch.device, seed: int) -> list[Batch]:
        """Batches of uniform random images in [0, 1] and random labels: what they show does not change the time."""
        generator = torch.Generator().manual_seed(seed)
        return [
            (
                torch.rand(self.batch, 3, self.size, self.size, generator=generator).to(device),
                torch.randint(self.classes, (self.batch,), generator=generator).to(device),
            )
            for _ in range(count)
        ]


def contender(name: str, case: Case) -> Run:
    """The contender of that name, its package imported."""
    return CONTENDERS[name](case)


def bnsurgery(case: Case, **options: Any) -> Run:
    """``bnsurgery.adv_finetune``."""

    def run(model: nn.Module, batches: Sequence[Batch], done: Callable[[], None]) -> None:
        attack = PGD(EPS, case.attack_steps, STEP)
        result = adv_finetune(
            model, batches, epochs=1, attack=attack, progress=False, on_step=lambda *_: done(), **options
        )
        if sum(epoch.steps for epoch in result.history) != len(batches):
            raise RuntimeError("a step was skipped: a loss or gradient was not finite")

    return run


def compiled(case: Case) -> Run:
    """``bnsurgery.adv_finetune`` with ``compile=True``, compiled anew in each call."""
    inner = bnsurgery(case, compile=True)

    def run(model: nn.Module, batches: Sequence[Batch], done: Callable[[], None]) -> None:
        torch.compiler.reset()
        inner(model, batches, done)

    return run


def loop(make: Callable[[nn.Module], Attack]) -> Run:
    """The loop that users of an attack package write."""

    def run(model: nn.Module, batches: Sequence[Batch], done: Callable[[], None]) -> None:
        model.requires_grad_(False)
        parameters = [p for m in model.modules() if isinstance(m, _BatchNorm) for p in (m.weight, m.bias)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
        attack = make(model)
        for x, y in batches:
            adversarial = attack(x, y)
            model.train()
            loss = F.cross_entropy(model(adversarial), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            float(loss.detach())  # as for a log
            done()

    return run


def quietly(attack: Attack) -> Attack:
    """An attack whose warnings are not shown."""

    def quiet(x: Tensor, y: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attack(x, y)

    return quiet


def torchattacks_pgd(case: Case) -> Callable[[nn.Module], Attack]:
    """PGD of torchattacks; it puts the model in evaluation mode itself."""
    import torchattacks

    return lambda model: quietly(torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=case.attack_steps))


def art_pgd(case: Case) -> Callable[[nn.Module], Attack]:
    """PGD of the Adversarial Robustness Toolbox; it puts the model in evaluation mode itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

    def make(model: nn.Module) -> Attack:
        device = next(model.parameters()).device
        classifier = PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=(3, case.size, case.size),
            nb_classes=case.classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier,
            eps=EPS,
            eps_step=STEP,
            max_iter=case.attack_steps,
            num_random_init=1,
            batch_size=case.batch,
            verbose=False,
        )
        return quietly(lambda x, y: torch.from_numpy(attack.generate(x=x.cpu().numpy(), y=y.cpu().numpy())).to(device))

    return make


def foolbox_pgd(case: Case) -> Callable[[nn.Module], Attack]:
    """PGD of foolbox."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox

    def make(model: nn.Module) -> Attack:
        device = next(model.parameters()).device
        wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=device)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=case.attack_steps, random_start=True)

        def craft(x: Tensor, y: Tensor) -> Tensor:
            model.eval()
            made: Tensor = attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=EPS)
            return made.detach()

        return quietly(craft)

    return make


def careful_pgd(case: Case, *, bfloat16: bool) -> Callable[[nn.Module], Attack]:
    """What a careful engineer writes in plain PyTorch, without fusing."""

    def make(model: nn.Module) -> Attack:
        model.to(memory_format=torch.channels_last)

        def craft(x: Tensor, y: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            model.eval()
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trainable:
                parameter.requires_grad_(False)
            low, high = (x - EPS).clamp_(0, 1), (x + EPS).clamp_(0, 1)
            current = torch.empty_like(x).uniform_(-EPS, EPS).add_(x).clamp_(0, 1)
            for _ in range(case.attack_steps):
                current.requires_grad_(True)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
                    logits = model(current)
                loss = F.cross_entropy(logits.float(), y)
                (gradient,) = torch.autograd.grad(loss, current)
                current = torch.clamp(current.detach().add_(gradient.sign_(), alpha=STEP), low, high)
            for parameter in trainable:
                parameter.requires_grad_(True)
            return current

        return craft

    return make


CONTENDERS: dict[str, Callable[[Case], Run]] = {
    "bnsurgery": bnsurgery,
    "bnsurgery float32": lambda case: bnsurgery(case, precision="float32"),
    COMPILED: compiled,
    BASELINE: lambda case: loop(torchattacks_pgd(case)),
    "ART": lambda case: loop(art_pgd(case)),
    "foolbox": lambda case: loop(foolbox_pgd(case)),
    CAREFUL[0]: lambda case: loop(careful_pgd(case, bfloat16=False)),
    CAREFUL[1]: lambda case: loop(careful_pgd(case, bfloat16=True)),
}
"""By name; the plain loop is the same for all but the first three."""
