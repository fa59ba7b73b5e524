"""How the tests run.

One thread, also in the processes that they start; the same Hypothesis examples each time; GPU tests only where there is
a GPU. Nothing depends on which tests ran before, so that they can be shared out among processes (``pytest -n 2``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

import networks  # noqa: F401 - it puts the examples on the path

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile(
    "bnsurgery",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bnsurgery")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo", action="store_true", help="run every architecture of the zoo, which takes an hour")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--zoo"):
        left = [item for item in items if item.get_closest_marker("zoo")]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def handlers() -> Iterator[dict[int, object]]:
    """Who handles SIGINT and SIGTERM: as in a terminal, also where the tests run in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual: dict[int, object] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    for number, handler in usual.items():
        signal.signal(number, handler)  # type: ignore[arg-type]
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
