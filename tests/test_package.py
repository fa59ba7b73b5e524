"""The package as a whole: what importing it loads, what it exports, and which module may import which."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bnsurgery

SOURCE = Path(bnsurgery.__file__).parent

OPTIONAL = ("torchvision", "torchattacks", "pyautoattack", "autoattack", "matplotlib", "timm", "PIL")

ORDER = [
    "errors",
    "_records",
    "_allocator",
    "_files",
    "_random",
    "_signals",
    "_ranks",
    "processes",
    "_states",
    "layers",
    "_modes",
    "_data",
    "freezing",
    "_geometry",
    "attacks",
    "adapters",
    "_moments",
    "_recalibration",
    "stats",
    "_tracing",
    "_symbolic",
    "_refusals",
    "_references",
    "_copies",
    "_routing",
    "_branches",
    "surgery",
    "folding",
    "replacement",
    "fusion",
    "engine",
    "_signature",
    "_graphs",
    "_frozen",
    "_fixed",
    "_layouts",
    "_lowering",
    "_replica",
    "_replicas",
    "patches",
    "_nonfinite",
    "_undo",
    "_synchronized",
    "_sharing",
    "_source",
    "_crafting",
    "_troubles",
    "_step",
    "_tuning",
    "_checkpoints",
    "_keeping",
    "_arguments",
    "finetuning",
    "_packing",
    "_evaluating",
    "_rounds",
    "evaluation",
    "_similarity",
    "_transfer",
    "_features",
    "analysis",
    "plots",
]
"""Each module imports only modules to its left (above)."""

PUBLIC = [getattr(bnsurgery, name) for name in bnsurgery.__all__]


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bnsurgery.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if node.module == "bnsurgery":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("bnsurgery."):
                found.add(node.module.split(".")[1])
    return found


def test_importing_the_package_loads_no_optional_package() -> None:
    code = "import sys, bnsurgery; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"bnsurgery", "torch"} <= loaded
    assert not loaded & set(OPTIONAL)


def test_importing_the_package_prints_nothing_and_moves_no_global_state() -> None:
    code = """
import random, torch, numpy
before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1], torch.get_default_dtype()
import bnsurgery
after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1], torch.get_default_dtype()
assert torch.equal(before[0], after[0]) and before[1] == after[1]
assert (before[2] == after[2]).all() and before[3] == after[3]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_lists_exactly_the_public_names_once_and_sorted_by_case() -> None:
    public = {
        name
        for name, value in vars(bnsurgery).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert set(bnsurgery.__all__) == public
    assert len(bnsurgery.__all__) == len(public)


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert bnsurgery.__version__ == importlib.metadata.version("bnsurgery")


@pytest.mark.parametrize("thing", PUBLIC, ids=bnsurgery.__all__)
def test_every_public_name_comes_from_here_and_has_its_own_docstring(thing: type) -> None:
    assert thing.__module__.split(".")[0] == "bnsurgery"
    assert thing.__doc__
    if inspect.isclass(thing):
        assert all(thing.__doc__ != base.__doc__ for base in thing.__mro__[1:])
        assert not thing.__doc__.startswith(f"{thing.__name__}("), "dataclass made this docstring up"
        methods = {name: value for name, value in vars(thing).items() if inspect.isfunction(value)}
        assert [name for name, value in methods.items() if not name.startswith("_") and not value.__doc__] == []


@pytest.mark.parametrize(
    "function", [thing for thing in PUBLIC if inspect.isfunction(thing)], ids=lambda function: function.__name__
)
def test_every_argument_of_a_public_function_is_annotated_and_in_its_docstring(function: object) -> None:
    for name, parameter in inspect.signature(function).parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert f"{name}:" in function.__doc__ or name in ("model", "strict"), name


def test_the_order_of_modules_names_each_module_of_the_package() -> None:
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert sorted(ORDER) == sorted(modules), "give new modules their place in ORDER"


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_before_it(module: str) -> None:
    later = imports_of(module) - set(ORDER[: ORDER.index(module)])
    assert not later, f"{module} imports {sorted(later)}"


def test_errors_import_nothing_of_the_package_and_nothing_imports_the_root() -> None:
    assert imports_of("errors") == set()
    assert all("__init__" not in imports_of(module) for module in ORDER)


def test_the_import_parser_sees_what_is_there() -> None:
    assert {"errors", "layers"} <= imports_of("freezing")
    assert "freezing" in imports_of("finetuning")


def test_finetuning_does_not_import_evaluation_by_any_path() -> None:
    reached, waiting = set(), {"finetuning"}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting |= imports_of(module) - reached
    assert "freezing" in reached
    assert "evaluation" not in reached
    assert "_evaluating" not in reached
