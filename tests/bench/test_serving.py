"""README's table of throughput: its cells, and that nothing else of a README changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.serving import EXPERTS, HEADER, fill, row, table
from expertprune.serving.throughput import summary
from expertprune.spec.reading import load_spec
from tests.serving.test_throughput import run


def measured() -> dict[str, Any]:
    """Ratios 1.5 and 1.2, whose median is 1.35; the limit is 1.5, of which that is 90%."""
    runs = [
        run("base", 100, 64, 600),
        run("expert", 150, 96, 400),
        run("base", 100, 64, 600),
        run("expert", 120, 96, 400),
    ]
    settings = {"rounds": 2, "prompts": 32, "input_tokens": 128, "output_tokens": 64, "concurrency": 8}
    return summary(runs) | {"settings": settings, "machine": "a machine", "versions": {"vllm": "1"}}


def test_a_row_shows_the_ratio_beside_its_limit() -> None:
    cells = [cell.strip() for cell in row("expert", measured()).strip("|").split("|")]
    # Time to first token: 1/1.5 and 1/1.2, median 0.75; KV cache 96/64; memory 400/600.
    expected = ["expert", "100", "135", "1.350 (1.200 to 1.500)", "1.500", "90%", "0.75", "1.50", "0.67", "1.00"]
    assert cells == expected
    assert len(cells) == HEADER.splitlines()[0].strip("|").count("|") + 1


def test_a_readme_changes_between_its_marks_only(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- serving -->\nold\n<!-- /serving -->\nafter\n")
    text = table({"expert": measured()})
    fill(readme, text)
    assert readme.read_text() == f"before\n<!-- serving -->\n{text}\n<!-- /serving -->\nafter\n"
    assert text.endswith("8 at a time; a machine; vllm 1.")
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        fill(readme, text)


def test_every_expert_of_the_table_is_a_legal_spec() -> None:
    spec = Path(__file__).parents[2] / "profiles" / "english-medical-qa.yaml"
    for base, changes in EXPERTS.values():
        assert load_spec(spec, {"base": base, **changes}).base.model == base
