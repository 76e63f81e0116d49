"""What people read is right, and no name that a user may choose breaks it."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console, RenderableType

from expertprune.artifacts.evaluation import Average, CorpusResult, Evaluation, Measured, Settings, TaskResult
from expertprune.artifacts.expert import CorpusRecord, Expert
from expertprune.artifacts.plan import (
    BaseReference,
    KindCount,
    LayerPlan,
    Parameters,
    Plan,
    StructureBudget,
    UnitReasons,
)
from expertprune.files import EXPERT_FILE, folder_size
from expertprune.reporting.card import purpose, write_card
from expertprune.reporting.explain import explain
from expertprune.reporting.tables import plan_table, retention_rows, retention_table
from expertprune.spec.schema import Spec
from expertprune.units import KeptUnits, LayerShape
from tests.experts import described

HOSTILE = [
    "[bold]red[/bold]",
    "[/]",
    "{{ 1 / 0 }} {% raw %}",
    "**bold** _it_ `code` # heading",
    "<script>alert(1)</script>",
    "ünï/日本",
]


def numbers(base: float, expert: float, retention: float | None, low: float | None, high: float | None) -> Measured:
    return Measured(examples=3, base=base, expert=expert, retention=retention, low=low, high=high)


def an_evaluation(corpus: str = "language/en") -> Evaluation:
    note = "the base (0.0000) is no better than chance (0.2500), so retention is undefined"
    asked = {"base": 0.0, "expert": 0.25, "retention": math.nan, "gained": 3, "lost": 0, "chance": 0.25, "note": note}
    task = {"suite": "own", "group": "general", "backend": "hf", "metric": "exact_match", "agreement": 0.4}
    kept = {"retention": 0.8, "low": 0.7, "high": 0.9, "gained": 2, "lost": 14}
    return Evaluation(
        settings=Settings(resamples=2000),
        corpora={
            corpus: CorpusResult(
                group="expert",
                documents=3,
                questions=12,
                metrics={
                    "bits_per_byte": numbers(0.5, 2 / 3, 0.75, 0.70004, 0.79996),
                    "kl": Measured(examples=3, expert=0.25, low=0.125, high=0.375),
                    "questions": Measured(examples=12, **asked),
                },
            ),
            "task/qa": CorpusResult(
                group="expert", documents=1, questions=0, metrics={"perplexity": numbers(8.0, 8.0, 8.0, 8.0, 8.0)}
            ),
        },
        generation={"sums": TaskResult(examples=50, base=0.75, expert=0.65, **kept, **task)},
        summary={"general": {"accuracy": Average(retention=0.8, low=0.7, high=0.9, metrics=["sums"], undefined=[])}},
    )


def a_plan(name: str = "made-up", base: str = "owner/model", value: str = "en") -> Plan:
    def why(language: int, general: int, shared: tuple[int, int]) -> UnitReasons:
        return UnitReasons(
            threshold=0.1,
            protected={"language": language, "general": general},
            shared=KindCount(units=shared[0], kept=shared[1]),
            expert_exclusive=KindCount(units=32 - shared[0], kept=24 - shared[1]),
            general_exclusive=KindCount(units=0, kept=0),
        )

    shape = LayerShape(24, 32, 6, 3, 4)
    kept = KeptUnits(tuple(range(24)), (0, 1, 2, 3), (0, 1))
    spec = {
        "name": "made-up", "base": base, "budget": {"ffn": 0.25},
        "dimensions": {"language": [value, "de"], "task": ["qa"]}, "relevance": "impact",
    }  # fmt: skip
    return Plan(
        name=name,
        base=BaseReference(model=base, digest="0123abcd"),
        parameters=Parameters(before=12345, after=10000),
        spec=Spec.model_validate(spec).document(),
        shapes=[shape] * 2,
        layers=[
            LayerPlan(
                kept, {"ffn": why(20, 4, (10, 9)), "kv_groups": UnitReasons(threshold=0.2, protected={"language": 2})}
            ),
            LayerPlan(
                kept, {"ffn": why(21, 3, (12, 5)), "kv_groups": UnitReasons(threshold=0.3, protected={"language": 2})}
            ),
        ],
        budget={
            "ffn": StructureBudget(requested=0.25, of=32, kept=24, removed=8),
            "query_heads": StructureBudget(requested=0, of=6, kept=4, removed=2),
            "kv_groups": StructureBudget(requested=1, of=3, kept=2, removed=1),
        },
    )


def an_expert(
    folder: Path, name: str = "made-up", base: str = "owner/model", value: str = "en", **changes: Any
) -> Expert:
    plan = a_plan(name, base, value)
    record = described(folder).base.model_copy(update={"model": base})
    corpora = {
        f"language/{value}": CorpusRecord(digest="c", documents=["a", "b", "c"]),
        "task/qa": CorpusRecord(digest="d", documents=["e"]),
    }
    found = described(folder, plan=plan, base=record, corpora=corpora, evaluation=an_evaluation(f"language/{value}"))
    return replace(found, **changes)


def shown(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=250, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"[│┃]", line)[1:-1]]


def table_rows(text: str) -> dict[str, list[str]]:
    """The rows of a printed table by their first cell."""
    return {row[0]: row[1:] for row in map(cells, text.splitlines()) if row}


# --- retention ------------------------------------------------------------------------------------------------------


def test_retention_rows_say_every_metric_and_the_averages() -> None:
    assert retention_rows(an_evaluation()) == [
        ["language/en", "bits per byte", "0.5000", "0.6667", "0.7500", "0.7000 to 0.8000"],
        ["language/en", "KL to base, bits/token", "", "0.2500", "", "0.1250 to 0.3750"],
        ["language/en", "accuracy (12 questions, +3 −0)", "0.0000", "0.2500", "undefined", "undefined to undefined"],
        ["task/qa", "perplexity", "8.0000", "8.0000", "8.0000", "8.0000 to 8.0000"],
        [
            "sums",
            "exact_match (50 examples, +2 −14, 40% as the base)",
            "0.7500",
            "0.6500",
            "0.8000",
            "0.7000 to 0.9000",
        ],
        ["general", "mean of 1, accuracy of tasks", "", "", "0.8000", "0.7000 to 0.9000"],
    ]


@pytest.mark.parametrize("corpus", ["language/en", *HOSTILE])
def test_the_retention_table_names_each_corpus_once_and_as_it_is(corpus: str) -> None:
    text = shown(retention_table(an_evaluation(corpus)))
    assert text.count(corpus) == 2  # in the table, and in the note below it
    assert "accuracy: the base (0.0000) is no better than chance (0.2500)" in text
    assert "nan" not in text


# --- plans ----------------------------------------------------------------------------------------------------------


def test_the_plan_table_sums_over_layers() -> None:
    rows = table_rows(shown(plan_table(a_plan())))
    assert rows["ffn"] == [
        "24 of 32",
        "language 41, general 7",
        "14 of 22 kept",
        "34 of 42 kept",
        "0 of 0 kept",
    ]
    assert rows["kv_groups"] == ["2 of 3", "language 4", "", "", ""]


@pytest.mark.parametrize(("kept", "who"), [(6, "not cut"), (4, "left with their KV groups")])
def test_the_plan_table_tells_uncut_heads_from_those_that_left_with_their_group(kept: int, who: str) -> None:
    plan = a_plan()
    budget = {**plan.budget, "query_heads": plan.budget["query_heads"].model_copy(update={"kept": kept})}
    assert table_rows(shown(plan_table(replace(plan, budget=budget))))["query_heads"] == [
        f"{kept} of 6",
        who,
        "",
        "",
        "",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_an_explanation_shows_any_name_and_base_as_it_is(tmp_path: Path, text: str) -> None:
    assert f"plan {text}" in shown(explain(a_plan(text)))
    explained = shown(explain(an_expert(tmp_path, base=text)))
    assert text in explained
    assert "10,000 of 12,345 (81.0%)" in explained


# --- the model card -------------------------------------------------------------------------------------------------


def card(expert: Expert) -> str:
    write_card(expert)
    return (expert.folder / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_was_cut_and_what_was_kept(tmp_path: Path) -> None:
    text = card(an_expert(tmp_path))
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/model",
        "tags": ["expertprune", "pruned"],
    }
    for line in (
        "# made-up",
        "An expert cut from `owner/model` for language en, de; task qa, without post-training:",
        "10,000 of 12,345 parameters",
        "(81.0%). It loads like any other checkpoint of its architecture, in",
        "| ffn | 24 | 32 |",
        "| query_heads | 4 | 6 |",
        "| kv_groups | 2 | 3 |",
        "| language/en | bits per byte | 0.5000 | 0.6667 | 0.7500 | 0.7000 to 0.8000 |",
        "| language/en | accuracy (12 questions, +3 −0) | 0.0000 | 0.2500 | undefined | undefined to undefined |",
        "| task/qa | perplexity | 8.0000 | 8.0000 | 8.0000 | 8.0000 to 8.0000 |",
    ):
        assert line in text.splitlines()
    assert "language/en (3 documents), task/qa (1 documents)." in text
    assert "(https://example.org/paper)" in text
    assert "general relevance weighted 0.25" in text
    assert "Not evaluated yet" not in text


def test_the_tables_of_the_card_are_whole(tmp_path: Path) -> None:
    """A blank line inside, or text right after, would end a table or join it."""
    lines = card(an_expert(tmp_path)).splitlines()
    starts = [i for i, line in enumerate(lines) if re.fullmatch(r"[|-]+", line) and line.startswith("|-")]
    assert len(starts) == 2
    for start, rows in zip(starts, (3, 6), strict=True):
        columns = lines[start].count("|")
        table = lines[start - 1 : start + 1 + rows]
        assert [line.count("|") for line in table] == [columns] * (rows + 2)
        assert lines[start - 2] == ""
        assert lines[start + 1 + rows].strip() == ""


def test_the_card_of_an_expert_without_evaluation_says_so(tmp_path: Path) -> None:
    text = card(an_expert(tmp_path, evaluation=None))
    assert "Not evaluated yet" in text
    assert "95% interval" not in text


def test_the_card_speaks_of_general_relevance_only_where_there_is_some(tmp_path: Path) -> None:
    expert = an_expert(tmp_path)
    expert.plan.spec["compose"]["fusion"] |= {"method": "shared_exclusive"}
    text = card(expert)
    assert "shared/exclusive fusion with general relevance" in text
    assert "2510.22489" in text
    expert = an_expert(tmp_path)
    expert.plan.spec["general"] = []
    text = card(expert)
    assert "fusion" not in text
    assert "general relevance" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_the_card_takes_any_name_as_it_is(tmp_path: Path, text: str) -> None:
    written = card(an_expert(tmp_path, name=text, base=text, value=text))
    assert f"# {text}\n" in written
    assert f"An expert cut from `{text}` for language {text}, de; task qa" in written
    assert f"| language/{text} | bits per byte |" in written


@pytest.mark.parametrize("base", ["[bold]red[/bold]", "my model: v2", "/models/a #1", "123"])
def test_the_front_matter_names_any_base(tmp_path: Path, base: str) -> None:
    assert front_matter(card(an_expert(tmp_path, base=base)))["base_model"] == base


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path: Path) -> None:
    text = card(an_expert(tmp_path, value="a|b"))
    row = next(line for line in text.splitlines() if "bits per byte" in line)
    assert len(re.split(r"(?<!\\)\|", row)) == 8


def test_the_description_is_json_that_anything_reads_also_with_undefined_retention(tmp_path: Path) -> None:
    card(an_expert(tmp_path))

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    json.loads((tmp_path / EXPERT_FILE).read_text(encoding="utf-8"), parse_constant=refuse)


# --- small things ---------------------------------------------------------------------------------------------------


def test_purpose(tmp_path: Path) -> None:
    assert purpose(an_expert(tmp_path).spec) == "language en, de; task qa"


def test_folder_size_counts_files_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "deep" / "b").write_bytes(b"123")
    assert folder_size(tmp_path) == 8
