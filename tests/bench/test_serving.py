"""The table of throughput."""

from __future__ import annotations

from pathlib import Path

from bench.serving import COLUMNS, EXPERTS, note, row
from expertprune.spec.reading import load_spec
from tests.serving.test_throughput import run, timing


def test_a_row_shows_the_ratio_beside_its_limit() -> None:
    # Ratios 1.5 and 1.2, whose median is 1.35; the limit is 1.5, of which that is 90%.
    runs = [
        run("base", 100, 64, 600),
        run("expert", 150, 96, 400),
        run("base", 100, 64, 600),
        run("expert", 120, 96, 400),
    ]
    measured = timing(runs)
    # Time to first token: 1/1.5 and 1/1.2, median 0.75; KV cache 96/64; memory 400/600.
    expected = ["expert", "100", "135", "1.350 (1.200 to 1.500)", "1.500", "90%", "0.75", "1.50", "0.67", "1.00"]
    assert row("expert", measured) == expected
    assert len(expected) == len(COLUMNS)
    assert note(measured).endswith("8 at a time; a machine.")


def test_every_expert_of_the_table_is_a_legal_spec() -> None:
    spec = Path(__file__).parents[2] / "profiles" / "english-medical-qa.yaml"
    for base, changes in EXPERTS.values():
        assert load_spec(spec, {"base": base, **changes}).base.model == base
