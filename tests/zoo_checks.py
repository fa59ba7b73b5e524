"""One check for each operation of the library on an architecture: right, refused by name, or wrong.

What an operation gives is compared with a reference that does not use the library: hooks that see what each BN layer is
given, torch's own functions, and the network as it was. What an operation is not to change is compared bit for bit.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnsurgery
from bnsurgery import PGD, BNSurgeryError, BNSurgeryWarning, Engine, analysis, fuse_bn
from bnsurgery._replicas import Replicas, craft_on_copy
from bnsurgery.adapters import craft
from zoo import Case, cast_all

EPS = torch.finfo(torch.float32).eps
HALF = (torch.float16, torch.bfloat16)
EPSILON = 2 / 255
"""Of the attack."""
PGD_3 = PGD(eps=EPSILON, steps=3, step_size=EPSILON / 2)
MOST_FOR_EVALUATE = 10_000_000
"""Parameters; larger networks are attacked, and not evaluated too."""
MOST_FOR_TWO = 300_000_000
"""Parameters; of larger networks there is no room for a second one in float64, and what is held is on the disk."""


class Wrong(AssertionError):  # noqa: N818 - a finding
    """An operation did something else than the reference."""


class Refused(Exception):  # noqa: N818 - a finding, not an error
    """The library said no, and why."""


def must(condition: object, message: str) -> None:
    """Raises :class:`Wrong` unless the condition holds."""
    if not condition:
        raise Wrong(message)


class Photograph:
    """What a network is, to the bit: values, modes, flags, hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.values = kept(state_of(model))
        self.state = _state(model)

    def same(self, model: nn.Module, *, but: Callable[[str], bool] = lambda _: False) -> None:
        """Raises :class:`Wrong` where anything differs but the values named."""
        now = state_of(model)
        must(now.keys() == self.values.keys(), "state_dict has other keys")
        for name, value in now.items():
            if not but(name):
                must(equal(value, self.values[name]), f"{name} changed")
        after = _state(model)
        for key, value in self.state.items():
            must(after.get(key) == value, f"{key}: {value} before, {after.get(key)} after")
        others = sorted(after.keys() ^ self.state.keys())
        must(not others, f"other modules or parameters: {others[:3]}")

    def restore(self, model: nn.Module) -> None:
        """Puts the values back."""
        _write(model, self.values)


def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Puts values back in place; ``load_state_dict`` may want more than they are, as torchvision's MNASNet does."""
    for name, value in state_of(model).items():
        if not equal(value, values[name]):
            value.copy_(values[name])


def kept(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies; of the largest networks on the disk, for which there is no room in memory."""
    if sum(value.numel() for value in values.values()) <= MOST_FOR_TWO:
        return {name: value.detach().clone() for name, value in values.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values"
        torch.save({name: value.detach() for name, value in values.items()}, path)
        held: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
    return held


def plain(name: str) -> str:
    """A name without the prefixes of wrappers: ``module`` further inside is a network's own."""
    parts = name.split(".")
    while parts and parts[0] in ("_orig_mod", "module"):
        del parts[0]
    return ".".join(part for part in parts if part != "_orig_mod")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The values, without the prefixes of wrappers in their names."""
    return {plain(name): value for name, value in model.state_dict().items()}


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters likewise."""
    return {plain(name): parameter for name, parameter in model.named_parameters()}


def _state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = tuple(len(value) for key, value in vars(module).items() if key.endswith("_hooks"))
        settings = (getattr(module, "momentum", None), getattr(module, "track_running_stats", None))
        found[f"module {name}"] = (type(module), module.training, hooks, settings, tuple(sorted(vars(module))))
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.grad is None)
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def bn_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BN layers, found without the library."""
    return {plain(name): module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def gamma_and_beta(model: nn.Module) -> set[str]:
    """Their names; where they are computed, those of what they are computed from."""
    return {
        f"{name}.{part}"
        for name, layer in bn_of(model).items()
        for part, _ in layer.named_parameters()
        if "." not in part or part.startswith("parametrizations.")
    }


def is_statistic(model: nn.Module) -> Callable[[str], bool]:
    """Whether a name is that of a statistic of a BN layer."""
    names = {f"{name}.{part}" for name, layer in bn_of(model).items() for part, _ in layer.named_buffers(recurse=False)}
    return names.__contains__


@contextmanager
def watched(model: nn.Module, look: Callable[[str, _BatchNorm, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls ``look`` with each BN layer's name, the layer, its input and its output; what it returns is the output."""
    hooks = []
    stance = torch.compiler.set_stance("force_eager")  # what is compiled already would run past the hooks
    for name, layer in bn_of(model).items():
        hooks.append(
            layer.register_forward_hook(lambda own, inputs, output, name=name: look(name, own, inputs[0], output))
        )
    try:
        with stance:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def after(layer: nn.Module, z: Tensor) -> Tensor:
    """What a BN layer does behind its normalisation: timm's drop out and activate."""
    for part in ("drop", "act"):
        own = getattr(layer, part, None)
        if isinstance(own, nn.Module):
            z = copy.copy(own)(z.clone())
    return z


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether no entry differs by more, relative to the largest."""
    if actual.shape != expected.shape:
        return False
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual.double() - expected.double()).abs()[~same]
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return not difference.numel() or float(difference.nan_to_num(nan=math.inf).max()) <= tolerance * max(scale, 1e-30)


def moments(z: Tensor) -> tuple[int, Tensor, Tensor]:
    """Values per channel, their mean, and the sum of their squared deviations, in float64."""
    flat = z.detach().double().movedim(1, 0).flatten(1)
    mean = flat.mean(1)
    return flat.shape[1], mean, (flat - mean[:, None]).square().sum(1)


def near(actual: Tensor, mean_or_variance: Tensor, mean: Tensor, variance: Tensor, *, squared: bool) -> bool:
    """Whether statistics kept in float32 are these, but for rounding of the sums that they are made of."""
    # 64 ulp: torch adds thousands of values in float32 blocks. A large mean cancels in the variance.
    slack = 64 * EPS * (variance + EPS * 64 * mean.square() if squared else variance.sqrt() + mean.abs())
    if actual.dtype in HALF:
        # What is merged is rounded, and so is what comes of it.
        slack = slack + 2 * torch.finfo(actual.dtype).eps * (variance if squared else variance.sqrt() + mean.abs())
    return bool(((actual.double() - mean_or_variance).abs() <= slack + 1e-12).all())


def freeze(case: Case, stats: str) -> str:
    """A step of SGD moves gamma and beta alone; the statistics move as torch says, or stay; undone without loss."""
    model = case.model
    before = Photograph(model)
    trains = gamma_and_beta(model)
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    start = {name: (b["running_mean"].clone(), b["running_var"].clone()) for name, b in _buffers(model).items()}
    calls: dict[str, int] = {}

    def look(name: str, layer: _BatchNorm, z: Tensor, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        held = layer.weight, layer.bias
        z = z.detach()
        with torch.no_grad():
            if stats == "frozen":
                must(not layer.training, f"{name} is in training mode")
                normalized = F.batch_norm(z, *start[name], *held, False, 0.0, layer.eps)
            else:
                must(layer.training, f"{name} is in evaluation mode")
                normalized = F.batch_norm(z, None, None, *held, True, 0.0, layer.eps)
            must(close(output, after(layer, normalized), 1e-5), f"{name} does not normalise as stats={stats!r} says")
            if stats == "update":
                count, mean, squares = moments(z)
                old = expected.get(name, tuple(value.double() for value in start[name]))
                step = 1 / (7 + calls[name]) if layer.momentum is None else layer.momentum
                new = mean, squares / (count - 1)
                expected[name] = tuple(torch.lerp(o, n, step) for o, n in zip(old, new, strict=True))  # type: ignore

    model.train()
    modes = [module.training for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        frozen = bnsurgery.freeze_except_bn(case.given, stats=stats)
        must(set(frozen.trainable) == trains, "other parameters than gamma and beta are to train")
        must(
            {name for name, parameter in parameters_of(model).items() if parameter.requires_grad} == trains,
            "other parameters than gamma and beta require a gradient",
        )
        optimizer = torch.optim.SGD(frozen.parameters(), lr=0.05)
        with watched(model, look):
            loss = case.loss()
        loss.backward()
        gradients = {name: p.grad for name, p in parameters_of(model).items() if p.grad is not None}
        must(gradients.keys() <= trains, "a frozen parameter has a gradient")
        moving = {name: float(gradient.abs().max()) for name, gradient in gradients.items() if gradient.any()}
        optimizer.step()
    now = state_of(model)
    for name, largest in moving.items():
        ulp = torch.finfo(now[name].dtype).eps * float(before.values[name].abs().max())
        must(0.05 * largest <= ulp or not equal(now[name], before.values[name]), f"{name} did not train")
    must(bool(moving), "nothing trained")
    moved = is_statistic(model)
    for name, buffers in _buffers(model).items():
        for key, value in buffers.items():
            if stats != "update" or name not in calls:
                must(equal(value, before.values[f"{name}.{key}"]), f"{name}.{key} moved")
        if stats == "update" and name in calls:
            mean, variance = expected[name]
            must(near(buffers["running_mean"], mean, mean, variance, squared=False), f"{name}.running_mean is wrong")
            must(near(buffers["running_var"], variance, mean, variance, squared=True), f"{name}.running_var is wrong")
            must(int(buffers["num_batches_tracked"]) == 7 + calls[name], f"{name}.num_batches_tracked is wrong")
    model.zero_grad()
    frozen.remove()
    must([module.training for module in model.modules()] == modes, "modes differ after remove()")
    model.eval()
    before.same(model, but=lambda name: name in moving or (stats == "update" and moved(name)))
    before.restore(model)
    return f"{len(calls)} layers"


def _buffers(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    held = {name: dict(layer.named_buffers(recurse=False)) for name, layer in bn_of(model).items()}
    return {name: buffers for name, buffers in held.items() if buffers}


def reset(case: Case) -> str:
    """Means 0, variances 1, counters 0, all else as it was."""
    model = case.model
    before = Photograph(model)
    done = bnsurgery.reset_bn_stats(case.given)
    must(set(done) == set(_buffers(model)), "not all layers were reset")
    for name, buffers in _buffers(model).items():
        for key, value in buffers.items():
            must(bool((value == (1 if key == "running_var" else 0)).all()), f"{name}.{key} is not reset")
    before.same(model, but=is_statistic(model))
    before.restore(model)
    return f"{len(done)} layers"


def recalibrate(case: Case) -> str:
    """The moments of all that a layer is given, in a pass in which BN alone is in training mode, by hooks."""
    model = case.model
    before = Photograph(model)
    data = [case.args, cast_all(case.architecture.inputs(case.size, case.batch + 1, seed=5), case.dtype)]
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for layer in bn_of(model).values():
        layer.train()
    with torch.no_grad(), watched(model, lambda name, _l, z, _o: seen.setdefault(name, []).append(moments(z))):  # type: ignore
        for args in data:
            model(*args)
    model.eval()
    before.restore(model)
    report = bnsurgery.recalibrate_bn(case.given, data, forward=lambda own, args: own(*args))
    must(set(report.layers) == set(seen), "not the layers that were reached")
    must(set(report.kept) == set(bn_of(model)) - set(seen), "not the layers that were not reached")
    for name, buffers in _buffers(model).items():
        if name not in seen:
            for key, value in buffers.items():
                must(equal(value, before.values[f"{name}.{key}"]), f"{name}.{key} moved, and was not reached")
            continue
        count = sum(own for own, _, _ in seen[name])
        mean = sum(own * value for own, value, _ in seen[name]) / count  # type: ignore
        squares = sum(value + own * (part - mean).square() for own, part, value in seen[name])
        variance = squares / (count - 1)  # type: ignore
        must(report.elements[name] == count, f"{name} is said to rest on {report.elements[name]} values, not {count}")
        must(near(buffers["running_mean"], mean, mean, variance, squared=False), f"{name}.running_mean is wrong")
        must(near(buffers["running_var"], variance, mean, variance, squared=True), f"{name}.running_var is wrong")
        must(int(buffers["num_batches_tracked"]) == len(data), f"{name}.num_batches_tracked is wrong")
    before.same(model, but=is_statistic(model))
    before.restore(model)
    return f"{len(seen)} layers"


def recalibrate_exactly(case: Case) -> str:
    """Split in two, the same as the statistics of one batch, in float64."""
    try:
        model = copy.deepcopy(case.model).double()
    except RuntimeError:  # torch cannot copy the weight that its older weight_norm computes
        model = case.model.double()
    x = case.x.double()
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for layer in bn_of(model).values():
        layer.train()
    held = Photograph(model)
    with torch.no_grad(), watched(model, lambda name, _l, z, _o: seen.setdefault(name, []).append(moments(z))):  # type: ignore
        model(x)
    model.eval()
    held.restore(model)
    report = bnsurgery.recalibrate_bn(model, [x[:1], x[1:]], estimator="exact")
    must(set(report.layers) == set(seen), "not the layers that were reached")
    for name, calls in seen.items():
        if len(calls) > 1:
            continue
        count, mean, squares = calls[0]
        buffers = _buffers(model)[name]
        for key, value in (("running_mean", mean), ("running_var", squares / (count - 1))):
            must(close(buffers[key], value, 1e-8), f"{name}.{key} is wrong")
    return f"{len(seen)} layers"


def fold(case: Case) -> str:
    """m z + b is what each layer gives for the z that it is given."""
    model = case.model
    before = Photograph(model)
    folded = bnsurgery.fold_bn(case.given)
    must(set(folded) == set(bn_of(model)), "not the BN layers")
    reached = set()

    def look(name: str, layer: _BatchNorm, z: Tensor, output: Tensor) -> None:
        reached.add(name)
        m, b = (value.double().view(-1, *[1] * (z.dim() - 2)) for value in folded[name])
        # m z and b may cancel: what is rounded is as large as they are.
        scale = float((m * z).abs().max() + b.abs().max()) / max(float(output.abs().max()), 1e-30)
        expected = after(layer, m * z.double() + b)
        ulp = max(EPS, torch.finfo(output.dtype).eps)
        must(close(output, expected, 16 * ulp * max(scale, 1)), f"m z + b of {name} is not what it gives")

    with watched(model, look), torch.no_grad():
        model(*case.args)
        for name, layer in bn_of(model).items():
            if name not in reached:
                dims = 2 if isinstance(layer, nn.BatchNorm2d) else 3 if isinstance(layer, nn.BatchNorm3d) else 0
                z = torch.randn(2, layer.num_features, *[3] * dims, generator=torch.Generator().manual_seed(4))
                layer(z.to(case.dtype))
    before.same(model)
    return f"{len(folded)} layers"


def fuse(case: Case, *, traced: bool = True) -> str:
    """The fused copy gives what the network gives; what is not fused says why."""
    model = case.model
    before = Photograph(model)
    expected = case.outputs(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no BN layer was fused", BNSurgeryWarning)
        copied = fuse_bn(case.given, case.args) if traced else fuse_bn(case.given)
        plan = copied.fusion_plan
        layers = {name for name, _ in bn_of(model).items()}
        must({bn for _, bn in plan.fused} | {bn for bn, _ in plan.skipped} == layers, "a BN layer is in neither list")
        must(len(plan.fused) + len(plan.skipped) == len(layers), "a BN layer is in both lists")
        must(all(reason for _, reason in plan.skipped), "a BN layer is skipped without a reason")
        left = set(bn_of(copied))
        must(left == {name for name, _ in plan.skipped}, "the copy has other BN layers than those skipped")
        must(not copied.training, "the copy is in training mode")
        if not _alike(case.outputs(copied), expected, 1e-4):  # rounding grows with depth: once more in float64
            wide = copy.deepcopy(model).double()
            again = fuse_bn(wide, plan=plan)
            same = _alike(case.outputs(again, torch.float64), case.outputs(wide, torch.float64), 1e-8)
            must(same, "the fused copy gives something else, in float64 too")
    before.same(model)
    kinds = Counter(re.sub(r"'[^']*'", "'...'", reason) for _, reason in plan.skipped)
    others = "".join(f"; {count} not: {reason}" for reason, count in kinds.most_common())
    return f"{len(plan.fused)} of {len(layers)}{others}"


def _alike(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    return len(actual) == len(expected) and all(close(a, e, tolerance) for a, e in zip(actual, expected, strict=True))


def patch(case: Case) -> str:
    """Saved, changed, loaded: the bits are those saved. Swapped: others inside, the same again outside."""
    model = case.model
    before = Photograph(model)
    expected = case.outputs(model)
    held = bnsurgery.bn_state(case.given)
    statistics = {name for name in state_of(model) if is_statistic(model)(name)}
    must(set(held) == gamma_and_beta(model) | statistics, "the patch does not hold gamma, beta and statistics alone")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.safetensors"
        bnsurgery.save_bn_patch(case.given, path)
        other = {name: value + 1 if value.is_floating_point() else value + 3 for name, value in held.items()}
        with bnsurgery.swap_bn(case.given, other):
            now = state_of(model)
            must(all(equal(now[name], value) for name, value in other.items()), "swap_bn did not write the patch")
        before.same(model)
        bnsurgery.load_bn_state(case.given, other)
        now = state_of(model)
        must(all(equal(now[name], value) for name, value in other.items()), "load_bn_state did not write the patch")
        bnsurgery.load_bn_patch(case.given, path)
    before.same(model)
    must(_alike(case.outputs(model), expected, 0), "outputs differ after loading the patch")
    return f"{len(bn_of(model))} layers"


def split(case: Case) -> str:
    """Each branch gives what the network gave; one trains, the other stays; kept alone, it gives the same."""
    model = case.model
    before = Photograph(model)
    expected = case.outputs(model)
    parted = bnsurgery.split_bn(case.given, ("clean", "adv"))
    must(len(bn_of(parted)) == 2 * len(bn_of(model)), "not two branches for each BN layer")
    for branch in ("clean", "adv"):
        with bnsurgery.use_branch(parted, branch):
            must(_alike(case.outputs(parted), expected, 0), f"branch {branch!r} does not give the network's outputs")
    own = {name: value.clone() for name, value in parted.state_dict().items() if ".clean." in f".{name}"}
    others = {name: value.clone() for name, value in parted.state_dict().items() if ".adv." in f".{name}"}
    with torch.random.fork_rng(devices=[]), bnsurgery.use_branch(parted, "adv"):
        torch.manual_seed(12)
        frozen = bnsurgery.freeze_except_bn(parted.train())
        optimizer = torch.optim.SGD(frozen.parameters(), lr=0.05)
        case.loss(parted).backward()
        optimizer.step()
        frozen.remove()
        parted.eval().zero_grad()
        trained = case.outputs(parted)
    now = parted.state_dict()
    must(all(equal(now[name], value) for name, value in own.items()), "the other branch changed")
    must(not all(equal(now[name], value) for name, value in others.items()), "the branch did not train")
    with bnsurgery.use_branch(parted, "clean"):
        must(_alike(case.outputs(parted), expected, 0), "the other branch gives something else")
    for branch, outputs in (("clean", expected), ("adv", trained)):
        kept = bnsurgery.keep_branch(parted, branch)
        must(list(kept.state_dict()) == list(state_of(model)), "the branch kept has other names")
        must(_alike(case.outputs(kept), outputs, 0), f"branch {branch!r} kept gives something else")
        del kept  # of the largest networks there is no room for two
    before.same(model)
    return f"{len(bn_of(model))} layers"


def replace(case: Case, kind: str) -> str:
    """The copy gives what the network gives when a hook puts the other norm in the place of each BN layer."""
    model = case.model
    before = Photograph(model)
    groups = math.gcd(*(layer.num_features for layer in bn_of(model).values()))
    groups = max(number for number in range(1, min(groups, 32) + 1) if groups % number == 0)

    def other(_name: str, layer: _BatchNorm, z: Tensor, _output: Tensor) -> Tensor:
        if kind == "group":
            z = F.group_norm(z, groups, layer.weight, layer.bias, layer.eps)
        elif kind == "instance":
            if z.dim() < 3:
                raise ValueError("no positions")
            z = F.instance_norm(z, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        return after(layer, z)

    expected: list[Tensor] | None
    with watched(model, other):
        try:
            expected = case.outputs(model)
        except ValueError:  # torch has no variance of one value
            expected = None
    copied, report = bnsurgery.replace_bn(case.given, kind, groups=groups)
    must(not bn_of(copied), "BN layers are left")
    must(set(report.layers) == set(bn_of(model)), "not the BN layers")
    affine = {name for name, layer in bn_of(model).items() if layer.weight is not None or layer.bias is not None}
    must(set(report.dropped if kind == "none" else report.carried) == affine, "gamma and beta are misreported")
    inside = tuple(f"{name}." for name in report.layers)
    for name, value in copied.state_dict().items():
        if not name.startswith(inside):
            must(equal(value, before.values[name]), f"{name} differs in the copy")
    if expected is None:
        try:
            case.outputs(copied)
        except ValueError as error:
            must(any(words in str(error) for words in ("values per channel", "spatial", "single value")), str(error))
            before.same(model)
            raise Refused(f"of one value per channel there is no variance ({_first_line(error)})") from None
        raise Wrong("the copy runs where torch's own norm does not")
    must(_alike(case.outputs(copied), expected, 1e-5), f"the copy does not give what {kind} norms give")
    before.same(model)
    return f"{len(report.layers)} layers"


def attack(case: Case) -> str:
    """Examples of the fused copy and of the network itself: inside the ball, and as bad as each other."""
    if case.architecture.task == "detection":
        x = torch.stack(case.args[0])
        bnsurgery.evaluate(case.model, (x, torch.zeros(len(x), dtype=torch.int64)), attacks=[PGD_3], progress=False)
        raise Wrong("a detector, which has no logits, was attacked")
    target, x = case.architecture.classifier(case.model), case.x
    before = Photograph(target)
    if case.wrapped is not None or case.dtype in HALF:
        losses = _losses_of_given(case)
        # Low precision rounds gradients, whose signs steps take: they are then other steps, and as good.
        must(_equally_bad(losses, 0.1 if case.dtype in HALF else 1e-3), f"losses {losses} differ")
        before.same(target)
        return f"loss {losses[0]:.3g} to {losses[1]:.3g}"
    losses = _losses(target, x)
    if not _equally_bad(losses, 1e-2):  # rounding may turn steps of gradients near zero, and steps lead to others
        if sum(parameter.numel() for parameter in target.parameters()) <= MOST_FOR_TWO:  # once more in float64
            losses = _losses(copy.deepcopy(target).double(), x.double())
            must(_equally_bad(losses, 1e-4), f"losses {losses} of the copy and of the network differ, in float64 too")
        else:  # for which there is no room: once more where the loss is all but linear
            losses = _losses(target, x, PGD(eps=EPSILON / 64, steps=3, step_size=EPSILON / 128))
            must(_equally_bad(losses, 1e-2), f"losses {losses} of the copy and of the network differ, close by too")
    if sum(parameter.numel() for parameter in target.parameters()) < MOST_FOR_EVALUATE:
        _evaluates(target, x)
    before.same(target)
    return f"loss {losses[0]:.3g} to {losses[1]:.3g}"


def _losses(target: nn.Module, x: Tensor, attack: PGD = PGD_3) -> tuple[float, float, float]:
    """The clean loss, and those that attacks on a fused copy and on the network itself reach."""
    labels = _labels(target, x, rank=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BNSurgeryWarning)  # no falling back to the network itself
        replica = Replicas(target, Engine(), dtype=None, compile=False).fresh(x)
        must(replica is not None, "there is no copy to attack")
        fast = craft_on_copy(replica, attack, x, labels, generator=torch.Generator().manual_seed(6))  # type: ignore
    plain = craft(attack, target, x, labels, generator=torch.Generator().manual_seed(6))
    for made in (fast, plain):
        must(bool(((made - x).abs() <= attack.eps + 1e-6).all()), "examples outside eps")
        must(bool(((made >= 0) & (made <= 1)).all()), "examples out of bounds")
    with torch.no_grad():
        clean, of_copy, own = (float(F.cross_entropy(target(made), labels)) for made in (x, fast, plain))
    return clean, of_copy, own


def _losses_of_given(case: Case) -> tuple[float, float, float]:
    """As :func:`_losses`, by what the library offers to its users."""
    data = case.x, _labels(case.model, case.x, rank=1)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", BNSurgeryWarning)
        for attack, engine in ((None, "fast"), (PGD_3, "fast"), (PGD_3, "plain")):
            made = analysis.outputs(case.given, data, attack=attack, engine=engine)  # type: ignore[arg-type]
            losses.append(float(F.cross_entropy(made.logits.double(), made.labels)))
    return losses[0], losses[1], losses[2]


def _labels(target: nn.Module, x: Tensor, rank: int = 0) -> Tensor:
    """The classes that the network ranks first: right, or second: of those the gradient does not vanish."""
    with torch.no_grad():
        logits: Tensor = target(x)
    return logits.topk(rank + 1).indices[:, rank]


def _evaluates(target: nn.Module, x: Tensor) -> None:
    """What is said to be broken is."""
    labels = _labels(target, x)
    result = bnsurgery.evaluate(
        target, (x, labels), attacks=[PGD_3], eps=EPSILON, batch_size=len(x), keep_adversarial=True, progress=False
    )
    must(result.rows[0].tried == len(x) and not result.rows[0].rejected, "examples were left out or rejected")
    moved = result.adversarial
    must(moved is not None and bool(((moved - x).abs() <= EPSILON + 1e-6).all()), "examples outside eps")
    must(equal(_labels(target, moved) == labels, result.robust), "examples said to be broken are not, or others are")


def _equally_bad(losses: tuple[float, float, float], tolerance: float) -> bool:
    """Whether both move the loss by as much, and move it: on a random network a few steps may also lower it."""
    clean, fast, plain = losses
    must(plain != clean and fast != clean, f"the attack does nothing: losses {losses}")
    return abs(fast - plain) <= tolerance * abs(plain - clean) + 1e-6 * plain


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


OPERATIONS: dict[str, Callable[[Case], str]] = {
    "freeze, update": lambda case: freeze(case, "update"),
    "freeze, frozen": lambda case: freeze(case, "frozen"),
    "freeze, batch": lambda case: freeze(case, "batch"),
    "reset": reset,
    "recalibrate": recalibrate,
    "recalibrate, exact": recalibrate_exactly,
    "fold": fold,
    "fuse": fuse,
    "fuse, symbolic": lambda case: fuse(case, traced=False),
    "patch": patch,
    "split": split,
    "replace by GroupNorm": lambda case: replace(case, "group"),
    "replace by InstanceNorm": lambda case: replace(case, "instance"),
    "replace by nothing": lambda case: replace(case, "none"),
    "attack": attack,
}
"""By their names in the table."""
MOST_FOR_EXACT = 30
"""BN layers: the exact estimator passes once for each."""


def suits(operation: str, case: Case) -> bool:
    """Whether it is tried: the exact estimator takes one pass for each layer, and is tried on small networks."""
    if operation != "recalibrate, exact":
        return True
    return len(bn_of(case.model)) <= MOST_FOR_EXACT and case.architecture.task == "classification"


def check(operation: str, case: Case) -> dict[str, str]:
    """What came of it: ``right``, ``refused`` with the message, or ``wrong`` with what was."""
    held = kept(state_of(case.model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"verdict": "right", "note": OPERATIONS[operation](case)}
    except Wrong as error:
        return {"verdict": "wrong", "note": str(error)}
    except Refused as error:
        return {"verdict": "refused", "note": str(error)}
    except BNSurgeryError as error:
        return {"verdict": "refused", "note": f"{type(error).__name__}: {_first_line(error)}"}
    except ValueError as error:
        inside = _raised_by_the_library(error)
        return {"verdict": "refused" if inside else "wrong", "note": f"ValueError: {_first_line(error)}"}
    except Exception as error:
        return {"verdict": "wrong", "note": f"{type(error).__name__}: {_first_line(error)}"}
    finally:
        with torch.no_grad():
            _write(case.model, held)
        case.model.eval().zero_grad()


def _raised_by_the_library(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("bnsurgery")
