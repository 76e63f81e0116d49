"""The pages in docs/: what they show is valid, and what is generated is complete."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel

from expertprune.cli import main
from expertprune.composition.scoring import rules
from expertprune.pruning.repair import repairs
from expertprune.relevance import UnitStatistics, criteria
from expertprune.spec.reading import load_spec
from expertprune.spec.schema import Spec
from tests.calling import parsed
from tests.documents import ROOT, blocks, page

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SPECS = [text for name in PAGES for text in blocks("yaml", page(name)) if text.startswith("name:")]
PLUGIN = page("docs/extending.md")
CALLS = [
    shlex.split(line, comments=True)
    for name in PAGES
    for text in blocks("sh", page(name))
    for line in text.replace("\\\n", "").splitlines()
    if line.startswith("expertprune ")
]


@pytest.fixture(scope="module")
def hooks() -> dict[str, Any]:
    """The site's generators."""
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))


def test_specs_are_valid_and_commands_parse(tmp_path: Path) -> None:
    assert len(SPECS) >= 4
    for text in SPECS:
        (tmp_path / "spec.yaml").write_text(text)
        load_spec(tmp_path / "spec.yaml")
    assert {words[1] for words in CALLS} >= {"build", "evaluate", "export", "serve", "vocabulary"}
    for words in CALLS:
        assert parsed(words)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md"])
def test_links_lead_somewhere_in_the_clone(name: str) -> None:
    """The site's own links are checked by `make docs`; README and bench/ are read in the clone too."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_plugin_that_the_page_shows_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (criteria, rules):
        monkeypatch.setattr(registry, "_entries", dict(registry))
    for text in blocks("python", PLUGIN):
        exec(text, {})
    rms = torch.tensor([[1.0, 5.0, 3.0, 2.0]])  # two units of two channels
    ones = torch.ones(4)
    statistics = UnitStatistics(rms, None, ones, ones, weight_norm=torch.ones(2), layer=0, seed=0)
    assert criteria["loudest"].score(statistics).tolist() == [[5.0, 3.0]]
    assert rules["median"](torch.tensor([[1.0, 9.0], [2.0, 8.0], [4.0, 0.0]])).tolist() == [2.0, 8.0]
    groups = {registry.group for registry in (criteria, rules, repairs)} | {"expertprune.families"}
    assert {f"expertprune.{name}" for name in re.findall(r'entry-points."expertprune\.(\w+)"', PLUGIN)} == groups


def keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the models in an annotation; the entries of a mapping have the name `NAME`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield (full := f"{prefix}{field.alias or name}")
            yield from keys(field.annotation, f"{full}.")
    for argument in get_args(annotation):
        yield from keys(argument, f"{prefix}NAME." if get_origin(annotation) is dict else prefix)


def test_the_reference_has_a_row_for_each_key_and_no_other(hooks: dict[str, Any]) -> None:
    expected = list(keys(Spec))
    assert {"budget.ffn", "corpora.sources.NAME.template", "compose.fusion.lambda"} <= set(expected)
    lines = [line for line in hooks["spec_reference"]().splitlines() if line.startswith("| `")]
    rows = {line.split("`")[1]: line for line in lines}
    assert sorted(line.split("`")[1] for line in lines) == sorted(expected)
    assert "| whole number, at least 2 | `512` |" in rows["calibration.max_tokens"]
    assert "| required |" in rows["base.model"]
    assert "| `false` |" in rows["base.trust_remote_code"]
    assert "| `[general]` |" in rows["general"]
    source = "corpora.sources.NAME"  # of a section that a spec may have any number of times
    for name, value in (("documents", "chat"), ("generate.tokens", "200000"), ("generate.from", "prompts"),
                        ("generate.temperature", "1.0"), ("generate.seed", "0")):  # fmt: skip
        assert f"| `{value}` |" in rows[f"{source}.{name}"]
    assert "| text; or list of text |" in rows["evaluate.corpora"]
    assert not any("| value |" in row for row in rows.values())


def test_every_criterion_has_its_formula_and_its_paper_and_every_command_its_help(hooks: dict[str, Any]) -> None:
    sections = dict(part.split("\n", 1) for part in hooks["criteria_reference"]().split("## ")[1:])
    assert set(sections) == set(criteria)
    for name, text in sections.items():
        assert criteria[name].paper in text
        assert len(text.split("Pass:")[0].strip()) > 40
    sections = dict(part.split("\n", 1) for part in hooks["command_reference"]().split("\n## ")[1:])
    assert set(sections) | {min(main.commands)} == set(main.commands)
    assert all("-h, --help" in text for text in sections.values())
