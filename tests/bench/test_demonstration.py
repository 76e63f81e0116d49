"""README's figures of `make demo` are written from the expert's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.demonstration import FOLDER, filled, printed, retained, timed
from expertprune.artifacts.expert import Expert
from tests.documents import page
from tests.serving.test_throughput import run, timing


def test_only_what_stands_between_marks_is_written_anew() -> None:
    text = "a\n<!-- demo -->\nold\n<!-- /demo -->\nb\n<!-- speed -->\nold\n<!-- /speed -->\n"
    assert filled(text, {"speed": "new\n"}) == text.replace("<!-- speed -->\nold", "<!-- speed -->\nnew")
    with pytest.raises(ValueError, match="retention"):
        filled(text, {"retention": "new\n"})
    assert filled(page("README.md"), {"demo": "", "retention": "", "speed": ""}) != page("README.md")


def test_the_figures_are_those_of_the_expert(tiny_build: tuple[Path, Path]) -> None:
    expert = Expert.load(tiny_build[0])
    assert expert.evaluation is not None
    before, after = expert.plan.parameters.before, expert.plan.parameters.after
    assert f"parameters: {after:,} of {before:,} ({100 * after / before:.1f}%)\n" in printed(expert)
    for name, found in expert.evaluation.corpora.items():
        numbers = found.metrics["bits_per_byte"]
        cells = f"| {name} | bits per byte | {numbers.base:.4f} | {numbers.expert:.4f} | {numbers.retention:.4f} |"
        assert cells in retained(expert)


def test_the_sentence_on_speed_has_the_median_of_pairs() -> None:
    # 64 tokens/s against 96 and 80: ratios 1.5 and 1.25, whose median is 1.375, and a median speed of 88.
    runs = [run("base", 64, 64, 600), run("expert", 96, 96, 400), run("base", 64, 64, 600), run("expert", 80, 96, 400)]
    text = " ".join(timed(timing(runs)).split())
    assert "generates 88.0 tokens/s where the base generates 64.0: 1.38 times as fast (1.25 to 1.50)" in text
    assert f"OUT := {FOLDER}\n" in page("Makefile")
