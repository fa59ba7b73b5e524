"""The README, the changelog and the API pages: examples run, links lead somewhere, every public name is there."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import quickstart
import torch

import bnsurgery

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
API = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md"))}

TARGET = re.compile(r"""\]\(<?([^)\s>]+)|\b(?:src|href)=["']([^"']+)""")
"""Where a Markdown link or image, or an HTML attribute, leads."""


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def relative_targets(text: str) -> list[str]:
    targets = [markdown or html for markdown, html in TARGET.findall(text)]
    return [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


def test_the_python_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = fences(README, "python")
    assert blocks, "README.md has no Python example"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)


def test_fences_and_targets_are_found() -> None:
    text = '```python\na = 1\n```\n[b](docs/b.md#c) [d](#d) ![e](e.png) <img src="f.png"> [g](https://g.org)'
    assert fences(text, "python") == ["a = 1\n"]
    assert relative_targets(text) == ["docs/b.md", "e.png", "f.png"]


@pytest.mark.parametrize("target", relative_targets(README))
def test_what_the_readme_links_to_exists(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("name", bnsurgery.__all__)
def test_every_public_name_is_documented_once(name: str) -> None:
    directive = re.compile(rf"^\.\. auto(?:function|class|exception):: bnsurgery\.{name}(?:\(\))?$", re.MULTILINE)
    assert len([page for page, text in API.items() for _ in directive.findall(text)]) == 1


def test_the_index_of_the_api_lists_every_page() -> None:
    (toctree,) = fences(API["index.md"], r"\{toctree\}")
    listed = [f"{line}.md" for line in toctree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted(API.keys() - {"index.md"})


def test_the_changelog_has_a_section_for_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(bnsurgery.__version__)}\]", changelog, flags=re.MULTILINE)


def test_the_readmes_figures_are_those_of_the_committed_record() -> None:
    record = json.loads((ROOT / "examples/results/quickstart/record.json").read_text(encoding="utf-8"))
    before, after = record["before"]["autoattack"], record["after"]["autoattack"]
    text = (
        f"the first {before['examples']} test images) its robust error falls from {before['robust_error']:.1f}% to "
        f"{after['robust_error']:.1f}% (standard error {after['standard_error']:.1f} points), while its clean error "
        f"rises from {before['clean_error']:.1f}% to {after['clean_error']:.1f}%. "
        f"The two networks differ by a file of {record['patch_bytes']:,} bytes."
    )
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert text in readme
    assert f"the script itself took {record['seconds']:.0f} s" in readme


def test_the_committed_record_is_of_the_scripts_defaults() -> None:
    record = json.loads((ROOT / "examples/results/quickstart/record.json").read_text(encoding="utf-8"))
    defaults = quickstart.arguments([])
    assert record["settings"]["lr"] == defaults.lr
    assert record["settings"]["epochs"] == len(record["finetuning"]["history"]) == 5
    assert f"default: {record['settings']['epochs']} on the sample" in (ROOT / "examples/quickstart.py").read_text(
        "utf-8"
    )
    assert record["seed"] == defaults.seed
    assert record["versions"]["bnsurgery"] == bnsurgery.__version__
    gain = record["before"]["autoattack"]["robust_error"] - record["after"]["autoattack"]["robust_error"]
    assert gain >= 8
    assert record["seconds"] <= 120


def test_the_committed_output_and_record_are_of_the_same_run() -> None:
    folder = ROOT / "examples/results/quickstart"
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    output = (folder / "output.txt").read_text(encoding="utf-8")
    assert f"AutoAttack {record['after']['autoattack']['robust_error']:5.1f}%" in output
    assert f"{record['seconds']:.0f} s on {record['hardware']}" in output
    assert (folder / "patch.safetensors").stat().st_size == record["patch_bytes"]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "benchmarks/results").glob("*.md"))])
def test_the_tables_of_benchmarks_are_those_of_the_result_files(name: str, tables: ModuleType) -> None:
    path = ROOT / "benchmarks/results" / f"{name}.json"
    assert tables.TABLES[name](json.loads(path.read_text("utf-8"))) == path.with_suffix(".md").read_text("utf-8")


def test_the_readmes_table_is_that_of_the_result_file(tables: ModuleType) -> None:
    record = json.loads((ROOT / "benchmarks/results/throughput.json").read_text("utf-8"))
    assert f"<!-- steps -->\n{tables.in_short(record)}<!-- end of steps -->" in README
