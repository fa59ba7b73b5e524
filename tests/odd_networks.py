"""Networks of many kinds, most of them odd, and what runs on them: for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from cifar10 import floats, sample
from resnet import resnet20
from safetensors.torch import load_file
from torch import Tensor, nn

from networks import SHARED, shake
from test_examples import EXAMPLES

Build = Callable[[], nn.Module]
Data = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Two convolutions with BN; ``neck`` and ``slope`` are for others to change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.slope = 0.1

    def neck(self, z: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(z)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.neck(F.leaky_relu(self.bn1(self.conv1(x)), self.slope))
        logits: Tensor = self.head(z.mean((2, 3)))
        return logits


def wide(make: Build) -> Build:
    """Built the same each time, in float64, in which no gradient's sign hangs on rounding."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return shake(make()).double()

    return build


def batches(*sizes: int, shape: tuple[int, ...] = (3, 8, 8), dtype: torch.dtype = torch.float64) -> Data:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.rand(size, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(4, (size,), generator=generator),
        )
        for size in sizes
    ]


def trained() -> nn.Module:
    model = resnet20(16)
    model.load_state_dict(load_file(EXAMPLES / "data" / "resnet20-w16.safetensors"))
    return model.eval()


def images(count: int) -> tuple[Tensor, Tensor]:
    pixels, labels = sample(train=False)
    return floats(pixels[:count]), labels[:count]


class Concatenated(Net):
    """A BN layer that no convolution feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2, self.head = nn.BatchNorm2d(12), nn.Linear(12, 4)

    def neck(self, z: Tensor) -> Tensor:
        return F.relu(self.bn2(torch.cat([z, self.conv2(z)], 1)))


class Touching(Net):
    """In evaluation mode too an example sees the others of its batch, by so much."""

    share = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.share * x.sum(0, keepdim=True))


class TouchingALittle(Touching):
    share = 0.003


class OneSize(Net):
    """Takes batches of six alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(0, (2, 3)).flatten(0, 1) if len(x) == 6 else x[:0])


class Functional(Net):
    """Uses weights without the modules that hold them."""

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1)))
        return F.linear(z.mean((2, 3)), self.head.weight, self.head.bias)


class Viewing(Net):
    """Flattens as older code does, with a view, which asks for a contiguous tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.neck(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.head(z.view(len(z), -1))
        return logits


class ViewingFirst(nn.Module):
    """A perceptron that flattens its images with a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x.view(len(x), -1))
        return logits


class Keeping(Net):
    """Keeps its features, for others to look at."""

    def neck(self, z: Tensor) -> Tensor:
        self.features = self.conv2(z.detach())
        return super().neck(z)


class KeepingLogits(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.logits = super().forward(x)
        return self.logits


class Rebinding(Net):
    """Makes its buffer anew in each pass, and lets it grow in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * (1.2 if self.training else 1.0)
        return super().forward(x * self.scale)


class BySize(Net):
    """Takes another path where the batch is small."""

    def neck(self, z: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(z) if len(z) < 4 else F.relu(self.conv2(z))))


class Expanded(Net):
    """A buffer whose entries share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(1).expand(6))

    def neck(self, z: Tensor) -> Tensor:
        return super().neck(z + self.shift.view(-1, 1, 1))


class Centring(Net):
    """A mean that is a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((1, 3, 1, 1), 0.4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean.to(x))


class Dividing(Net):
    """A deviation that is an array."""

    def __init__(self) -> None:
        super().__init__()
        self.deviation = np.array([0.2, 0.3, 0.4])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / torch.from_numpy(self.deviation).to(x).view(-1, 1, 1))


class Attending(nn.Module):
    """A transformer layer, and BN behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encode = nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.bn, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bn(self.encode(self.embed(x.flatten(2).transpose(1, 2))).mean(1)))
        return logits


def with_layer(name: str, layer: Build) -> Build:
    def make() -> nn.Module:
        model = Net()
        setattr(model, name, layer())
        return model

    return make


def with_hooks() -> nn.Module:
    model = Net()
    model.bn1.register_forward_hook(lambda _module, _inputs, output: 1.5 * output)
    model.conv2.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 0.1,))
    model.conv1.register_forward_hook(lambda *_: None)
    model.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
    return model


def with_normed_weights() -> nn.Module:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.conv2)
    nn.utils.parametrizations.spectral_norm(model.conv1)
    return model


KINDS: dict[str, Build] = {
    "BN after concatenation": Concatenated,
    "shared BN": SHARED.make,
    "hooks": with_hooks,
    "BN without statistics": with_layer("bn2", lambda: nn.BatchNorm2d(6, track_running_stats=False)),
    "BN of fixed eps and no affine": with_layer("bn2", lambda: nn.BatchNorm2d(6, eps=0.1, affine=False)),
    "instance norm": with_layer("bn2", lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "group norm": with_layer("bn1", lambda: nn.GroupNorm(2, 6)),
    "parametrized": with_normed_weights,
    "transposed convolution": with_layer("conv2", lambda: nn.ConvTranspose2d(6, 6, 3, groups=3)),
    "touching": Touching,
    "one size": OneSize,
    "functional": Functional,
    "expanded": Expanded,
    "attention": Attending,
    "plain tensor": Centring,
    "array": Dividing,
    "view": Viewing,
    "view first": ViewingFirst,
    "features kept": Keeping,
    "buffer made anew": Rebinding,
    "path by batch size": BySize,
}
