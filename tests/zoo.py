"""The architectures of torchvision and timm that have BN layers: their names, families, constructors and inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._tracing import leaves

Task = Literal["classification", "segmentation", "detection", "video", "flow"]

SEED = 0
CLASSES = 10
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320)
"""Edges of the inputs that are tried, the smallest first."""
LARGE = 40_000_000
"""Parameters from which on batches are smaller, so that the whole zoo takes minutes."""
FEWEST_OF_TIMM = 150
PER_MODULE = 3
"""Of each of timm's modules, the smallest architectures by parameters."""
LARGEST_OF_TIMM = 30_000_000
"""Parameters; larger ones of timm are left out, unless a module has no smaller."""


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo."""

    package: Literal["torchvision", "timm"]
    name: str
    family: str
    task: Task = "classification"

    def __str__(self) -> str:
        return f"{self.package}/{self.name}"

    def make(self) -> nn.Module:
        """The network as its library builds it, with random weights."""
        if self.package == "timm":
            import timm

            return timm.create_model(self.name, num_classes=CLASSES)
        import torchvision

        options: dict[str, Any] = {} if self.task == "flow" else {"num_classes": CLASSES}
        if self.task in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if self.task == "detection" and not self.name.startswith("ssd"):
            options |= {"min_size": 128, "max_size": 160}  # else images are enlarged to 800 pixels
        if self.family in ("googlenet", "inception"):
            options["init_weights"] = False  # the other way takes minutes, and warns
        return torchvision.models.get_model(self.name, weights=None, **options)

    def inputs(self, size: int, batch: int, seed: int = SEED) -> tuple[Any, ...]:
        """Positional arguments of a forward pass in evaluation mode."""
        generator = torch.Generator().manual_seed(seed)
        frames = 16 if self.name == "s3d" else 8  # the fewest that it takes
        shape = (3, frames, size, size) if self.task == "video" else (3, size, size)
        x = torch.rand(batch, *shape, generator=generator)
        if self.task == "detection":
            return (list(x),)
        if self.task == "flow":
            return x, x.roll(2, -1)
        return (x,)

    def build(self, size: int, batch: int) -> nn.Module:
        """The network with gamma, beta and statistics away from their initial values, the same each time."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(SEED)
            model = self.make()
            settle(self, model, self.inputs(size, batch, seed=SEED + 1))
        return model.eval()

    def loss(self, model: nn.Module, args: tuple[Any, ...], seed: int = SEED) -> Tensor:
        """A training loss on random labels."""
        generator = torch.Generator().manual_seed(seed)
        if self.task == "detection":
            (images,) = args
            outputs = model(images, [_target(image, generator, self.name) for image in images])
        else:
            outputs = model(*args)
        losses = [_loss(tensor, generator) for tensor in leaves(outputs, Tensor) if tensor.requires_grad]
        return torch.stack(losses).sum()

    def outputs(self, model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
        """All that a network returns, of a detector what its backbone does too: few boxes may be left."""
        seen: list[Tensor] = []
        backbone = getattr(model, "backbone", None) if self.task == "detection" else None
        hook = None
        if backbone is not None:
            hook = backbone.register_forward_hook(lambda _m, _i, out: seen.extend(leaves(out, Tensor)))
        try:
            with torch.no_grad():
                return [*leaves(model(*args), Tensor), *seen]
        finally:
            if hook is not None:
                hook.remove()

    def classifier(self, model: nn.Module) -> nn.Module:
        """What gives logits (N, K), for attacks: a wrapper where the network gives a map or a flow."""
        return _Mean(model, self.task) if self.task in ("segmentation", "flow") else model


@dataclass(frozen=True)
class Case:
    """An architecture, built, with the smallest inputs that it takes."""

    architecture: Architecture
    model: nn.Module
    size: int
    batch: int
    wrapped: nn.Module | None = None
    dtype: torch.dtype = torch.float32

    @property
    def given(self) -> nn.Module:
        """What the library is handed: the model, or a wrapper around it."""
        return self.model if self.wrapped is None else self.wrapped

    @cached_property
    def args(self) -> tuple[Any, ...]:
        return cast_all(self.architecture.inputs(self.size, self.batch), self.dtype)

    @property
    def x(self) -> Tensor:
        return self.args[0]

    def loss(self, model: nn.Module | None = None) -> Tensor:
        return self.architecture.loss(self.model if model is None else model, self.args)

    def outputs(self, model: nn.Module, dtype: torch.dtype | None = None) -> list[Tensor]:
        return self.architecture.outputs(model, cast_all(self.args, dtype or self.dtype))


def case_of(architecture: Architecture) -> Case:
    """Builds it, with the smallest inputs on which it trains and evaluates."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(SEED)
        model = architecture.make()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        small = parameters <= LARGE and architecture.task == "classification"
        size, batch = next(
            (size, batch)
            for size in _sizes(architecture, model)
            if _runs(architecture, model, size, batch := 4 if small and size <= 128 else 2)
        )
        del model
    return Case(architecture, architecture.build(size, batch), size, batch)


def cast_all(args: Any, dtype: torch.dtype) -> Any:
    """Tensors in lists and tuples in another dtype."""
    if isinstance(args, Tensor):
        return args.to(dtype)
    return type(args)(cast_all(part, dtype) for part in args)


def settle(architecture: Architecture, model: nn.Module, args: tuple[Any, ...]) -> None:
    """Gives BN layers random gamma and beta, and the statistics of a batch, then moved by random factors.

    Without the first a mistake would not show; without the second activations of deep networks would vanish or explode.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for layer in layers:
            if layer.weight is not None:
                layer.weight.uniform_(0.6, 1.4)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.2)
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    with torch.no_grad():
        model(*args)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
            continue
        deviation = layer.running_var.clamp(min=1e-6).sqrt()
        layer.running_mean.add_(0.1 * deviation * torch.randn_like(deviation))
        layer.running_var.mul_(torch.empty_like(deviation).uniform_(0.7, 1.4)).add_(1e-3)
        layer.num_batches_tracked.fill_(7)
    model.eval()


def torchvision_architectures() -> list[Architecture]:
    """Every architecture of the installed torchvision that has a BN layer, quantizable ones unquantized."""
    import torchvision
    from torchvision.models import detection, optical_flow, quantization, segmentation, video

    tasks: list[tuple[Any, Task]] = [
        (torchvision.models, "classification"),
        (quantization, "classification"),
        (segmentation, "segmentation"),
        (detection, "detection"),
        (video, "video"),
        (optical_flow, "flow"),
    ]
    found = []
    for module, task in tasks:
        for name in torchvision.models.list_models(module=module):
            family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
            prefix = {"segmentation": "segmentation ", "detection": "detection ", "video": "video "}.get(task, "")
            quantized = "quantized " if module is quantization else ""
            architecture = Architecture("torchvision", name, f"{prefix}{quantized}{family}", task)
            if _has_bn(architecture.make):
                found.append(architecture)
    return found


def timm_architectures() -> list[Architecture]:
    """The smallest of each of timm's modules, then the smallest of all, until there are enough; those that have BN.

    Sizes are numbers of parameters, found without values. Takes minutes.
    """
    import timm

    by_module: dict[str, list[tuple[int, str]]] = {}
    for name in timm.list_models():
        made = _on_meta(lambda name=name: timm.create_model(name, num_classes=CLASSES))
        if made is not None and any(isinstance(module, _BatchNorm) for module in made.modules()):
            size = sum(parameter.numel() for parameter in made.parameters())
            by_module.setdefault(type(made).__module__.rpartition(".")[2], []).append((size, name))
    chosen: dict[str, str] = {}
    for module, entries in sorted(by_module.items()):
        smallest = sorted(entries)
        for rank, (size, name) in enumerate(smallest[:PER_MODULE]):
            if rank == 0 or size <= LARGEST_OF_TIMM:
                chosen[name] = module
    rest = sorted((size, name, module) for module, entries in by_module.items() for size, name in entries)
    for _, name, module in rest:
        if len(chosen) >= FEWEST_OF_TIMM:
            break
        chosen.setdefault(name, module)
    return [Architecture("timm", name, module) for name, module in sorted(chosen.items())]


def _has_bn(make: Callable[[], nn.Module]) -> bool:
    made = _on_meta(make)
    return made is None or any(isinstance(module, _BatchNorm) for module in made.modules())


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module | None:
    """A network without values; None where it cannot be built so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return make()
        except Exception:
            return None


def _sizes(architecture: Architecture, model: nn.Module) -> Iterator[int]:
    own = getattr(model, "default_cfg", None) or {}
    edge = own.get("input_size", (3, 224, 224))[-1]
    if not own.get("fixed_input_size"):
        yield from (size for size in SIZES if size < edge)
    yield edge
    yield from (size for size in SIZES if size > edge)


def _runs(architecture: Architecture, model: nn.Module, size: int, batch: int) -> bool:
    try:
        args = architecture.inputs(size, batch)
        for training in (True, False):
            model.train(training)
            with torch.set_grad_enabled(training):
                if training:
                    finite = bool(torch.isfinite(architecture.loss(model, args)))
                else:
                    model(*args)
        return finite
    except Exception:
        return False


def _target(image: Tensor, generator: torch.Generator, name: str) -> dict[str, Tensor]:
    """Boxes, and what else detectors train on."""
    height, width = image.shape[-2:]
    corner = torch.rand(2, 2, generator=generator) * 0.4
    scale = torch.tensor([width, height])
    boxes = torch.cat([corner * scale, (corner + 0.4) * scale], 1).to(image)
    labels = torch.randint(1, 2 if "keypoint" in name else CLASSES, (2,), generator=generator)
    masks = torch.rand(2, height, width, generator=generator).round().to(torch.uint8)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    keypoints = torch.cat([middle, torch.ones(2, 1).to(middle)], 1)[:, None].expand(2, 17, 3)
    return {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}


def _loss(outputs: Tensor, generator: torch.Generator) -> Tensor:
    if outputs.dim() == 2:
        labels = torch.randint(outputs.shape[1], (len(outputs),), generator=generator)
        return F.cross_entropy(outputs.float(), labels)
    return outputs.float().pow(2).mean()


class _Mean(nn.Module):
    """A network that gives a map or a flow, as one of logits (N, K)."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, x: Tensor) -> Tensor:
        if self.task == "flow":
            logits: Tensor = self.model(x, x.roll(2, -1))[-1].mean((2, 3))
        else:
            logits = self.model(x)["out"].mean((2, 3))
        return logits
