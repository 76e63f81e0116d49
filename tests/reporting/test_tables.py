"""What people read is right, and no name that a user may choose breaks it."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console, RenderableType

from expertprune.artifacts.expert import Expert
from expertprune.files import EXPERT_FILE, folder_size
from expertprune.reporting.card import purpose, write_card
from expertprune.reporting.explain import explain
from expertprune.reporting.tables import plan_table, retention_rows, retention_table
from tests.experts import described

HOSTILE = [
    "[bold]red[/bold]",
    "[/]",
    "{{ 1 / 0 }} {% raw %}",
    "**bold** _it_ `code` # heading",
    "<script>alert(1)</script>",
    "ünï/日本",
]


def an_evaluation(corpus: str = "language/en") -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "settings": {"interval": 0.95},
        "corpora": {
            corpus: {
                "documents": 3,
                "questions": 12,
                "metrics": {
                    "bits_per_byte": {
                        "base": 0.5,
                        "expert": 2 / 3,
                        "retention": 0.75,
                        "low": 0.70004,
                        "high": 0.79996,
                    },
                    "kl": {"expert": 0.25, "low": 0.125, "high": 0.375},
                    "questions": {
                        "base": 0.0,
                        "expert": 0.25,
                        "retention": math.nan,
                        "low": math.nan,
                        "high": math.nan,
                        "lost": 0.0,
                        "gained": 3.0,
                    },
                },
            },
            "task/qa": {"documents": 1, "metrics": {"perplexity": dict.fromkeys(
                ("base", "expert", "retention", "low", "high"), 8.0)}},
        },
    }  # fmt: skip


def a_plan() -> dict[str, Any]:
    def why(language: int, general: int, shared: tuple[int, int]) -> dict[str, Any]:
        return {
            "threshold": 0.1,
            "protected": {"language": language, "general": general},
            "shared": {"units": shared[0], "kept": shared[1]},
            "expert_exclusive": {"units": 32 - shared[0], "kept": 24 - shared[1]},
            "general_exclusive": {"units": 0, "kept": 0},
        }

    return {
        "kind": "plan",
        "name": "made-up",
        "base": {"model": "nowhere"},
        "parameters": {"before": 12345, "after": 10000},
        "budget": {
            "ffn": {"requested": 0.25, "of": 32, "kept": 24, "removed": 8},
            "query_heads": {"requested": 0, "of": 6, "kept": 4, "removed": 2},
            "kv_groups": {"requested": 1, "of": 3, "kept": 2, "removed": 1},
        },
        "layers": [
            {"why": {"ffn": why(20, 4, (10, 9)), "kv_groups": {"threshold": 0.2, "protected": {"language": 2}}}},
            {"why": {"ffn": why(21, 3, (12, 5)), "kv_groups": {"threshold": 0.3, "protected": {"language": 2}}}},
        ],
    }


def an_expert(name: str = "made-up", base: str = "owner/model", corpus: str = "language/en") -> dict[str, Any]:
    plan = a_plan()
    spec = {
        "name": name,
        "base": {"model": base},
        "dimensions": {"language": [corpus.partition("/")[2], "de"], "domain": [], "task": ["qa"]},
        "general": ["general"],
        "relevance": {"criterion": "impact"},
        "compose": {"rule": "intersection", "allocation": "uniform", "fusion": {"method": "weighted", "lambda": 0.25}},
        "compensation": {"method": "least_squares"},
    }
    return {
        "kind": "expert",
        "name": name,
        "base": {"model": base, "digest": "0123abcd"},
        "ancestor": None,
        "parameters": plan["parameters"],
        "corpora": {
            corpus: {"digest": "c", "documents": ["a", "b", "c"]},
            "task/qa": {"digest": "d", "documents": ["e"]},
        },
        "versions": {"expertprune": "0.1.0", "torch": "2"},
        "criterion_paper": "https://example.org/paper",
        "spec": spec,
        "plan": plan,
        "evaluation": an_evaluation(corpus),
    }


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


def test_retention_rows_say_every_metric_of_every_corpus() -> None:
    assert retention_rows(an_evaluation()) == [
        ["language/en", "bits per byte", "0.5000", "0.6667", "0.7500", "0.7000 to 0.8000"],
        ["language/en", "KL to base, bits/token", "", "0.2500", "", "0.1250 to 0.3750"],
        [
            "language/en",
            "accuracy (12 questions)",
            "0.0000",
            "0.2500",
            "undefined",
            "undefined to undefined",
        ],
        ["task/qa", "perplexity", "8.0000", "8.0000", "8.0000", "8.0000 to 8.0000"],
    ]


def test_the_retention_table_names_each_corpus_once() -> None:
    text = shown(retention_table(an_evaluation()))
    assert text.count("language/en") == text.count("task/qa") == 1
    assert "undefined" in text
    assert "nan" not in text
    first = next(cells(line) for line in text.splitlines() if "bits per byte" in line)
    assert first == ["language/en", "bits per byte", "0.5000", "0.6667", "0.7500", "0.7000 to 0.8000"]


@pytest.mark.parametrize("corpus", HOSTILE)
def test_the_retention_table_shows_any_corpus_name_as_it_is(corpus: str) -> None:
    assert corpus in shown(retention_table(an_evaluation(corpus)))


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


def test_the_plan_table_says_what_is_not_cut() -> None:
    plan = a_plan()
    plan["budget"]["query_heads"] |= {"kept": 6, "removed": 0}
    assert table_rows(shown(plan_table(plan)))["query_heads"] == ["6 of 6", "not cut", "", "", ""]


def test_the_plan_table_does_not_call_heads_uncut_that_left_with_their_group() -> None:
    row = table_rows(shown(plan_table(a_plan())))["query_heads"]
    assert row[0] == "4 of 6"
    assert row[1] != "not cut"


@pytest.mark.parametrize("name", HOSTILE)
def test_an_explanation_shows_any_name_of_a_plan_as_it_is(name: str) -> None:
    assert f"plan {name}" in shown(explain({**a_plan(), "spec": an_expert()["spec"], "name": name}))


@pytest.mark.parametrize("base", HOSTILE)
def test_an_explanation_shows_any_base_as_it_is(base: str) -> None:
    about = an_expert(base=base)
    text = shown(explain({**about, "folder": "out", "bytes": 10**6}))
    assert base in text
    assert "10,000 of 12,345 (81.0%)" in text


# --- the model card -------------------------------------------------------------------------------------------------


class Told(Expert):
    """An expert that says of itself what it is told to."""

    told: dict[str, Any]

    def document(self) -> dict[str, Any]:
        return self.told


def card(folder: Path, about: dict[str, Any]) -> str:
    expert = Told(**vars(described(folder)))
    object.__setattr__(expert, "told", about)
    write_card(expert)
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_was_cut_and_what_was_kept(tmp_path: Path) -> None:
    text = card(tmp_path, an_expert())
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
        "| language/en | accuracy (12 questions) | 0.0000 | 0.2500 | undefined | undefined to undefined |",
        "| task/qa | perplexity | 8.0000 | 8.0000 | 8.0000 | 8.0000 to 8.0000 |",
    ):
        assert line in text.splitlines()
    assert "language/en (3 documents), task/qa (1 documents)." in text
    assert "(https://example.org/paper)" in text
    assert "general relevance weighted 0.25" in text
    assert "Not evaluated yet" not in text


def test_the_tables_of_the_card_are_whole(tmp_path: Path) -> None:
    """A blank line inside, or text right after, would end a table or join it."""
    lines = card(tmp_path, an_expert()).splitlines()
    starts = [i for i, line in enumerate(lines) if re.fullmatch(r"[|-]+", line) and line.startswith("|-")]
    assert len(starts) == 2
    for start, rows in zip(starts, (3, 4), strict=True):
        columns = lines[start].count("|")
        table = lines[start - 1 : start + 1 + rows]
        assert [line.count("|") for line in table] == [columns] * (rows + 2)
        assert lines[start - 2] == ""
        assert lines[start + 1 + rows].strip() == ""


def test_the_card_of_an_expert_without_evaluation_says_so(tmp_path: Path) -> None:
    about = {**an_expert(), "evaluation": None}
    text = card(tmp_path, about)
    assert "Not evaluated yet" in text
    assert "95% interval" not in text


def test_the_card_speaks_of_general_relevance_only_where_there_is_some(tmp_path: Path) -> None:
    about = an_expert()
    about["spec"]["compose"]["fusion"] = {"method": "shared_exclusive", "lambda": 0.5}
    text = card(tmp_path, about)
    assert "shared/exclusive fusion with general relevance" in text
    assert "2510.22489" in text
    about["spec"]["general"] = []
    text = card(tmp_path, about)
    assert "fusion" not in text
    assert "general relevance" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_the_card_takes_any_name_as_it_is(tmp_path: Path, text: str) -> None:
    about = an_expert(name=text, base=text, corpus=f"language/{text}")
    written = card(tmp_path, about)
    assert f"# {text}\n" in written
    assert f"An expert cut from `{text}` for language {text}, de; task qa" in written
    assert f"| language/{text} | bits per byte |" in written


@pytest.mark.parametrize("base", ["[bold]red[/bold]", "my model: v2", "/models/a #1", "123"])
def test_the_front_matter_names_any_base(tmp_path: Path, base: str) -> None:
    assert front_matter(card(tmp_path, an_expert(base=base)))["base_model"] == base


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path: Path) -> None:
    text = card(tmp_path, an_expert(corpus="language/a|b"))
    row = next(line for line in text.splitlines() if "bits per byte" in line)
    assert len(re.split(r"(?<!\\)\|", row)) == 8


def test_the_description_is_json_that_anything_reads_also_with_undefined_retention(tmp_path: Path) -> None:
    card(tmp_path, an_expert())

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    json.loads((tmp_path / EXPERT_FILE).read_text(encoding="utf-8"), parse_constant=refuse)


# --- small things ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimensions", "text"),
    [
        ({"language": ["de"], "domain": [], "task": []}, "language de"),
        ({"language": ["de", "en"], "domain": ["medical"], "task": ["qa"]}, "language de, en; domain medical; task qa"),
    ],
)
def test_purpose(dimensions: dict[str, list[str]], text: str) -> None:
    assert purpose({"dimensions": dimensions}) == text


def test_folder_size_counts_files_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "deep" / "b").write_bytes(b"123")
    assert folder_size(tmp_path) == 8
