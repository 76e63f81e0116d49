"""What people read is right, and no name that a user may choose breaks it."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console, RenderableType

from expertprune.artifacts.evaluation import (
    Average,
    CorpusResult,
    DocumentBits,
    Evaluation,
    Measured,
    Settings,
    TaskResult,
)
from expertprune.artifacts.expert import CorpusRecord, Expert
from expertprune.artifacts.plan import (
    BaseReference,
    KindCount,
    LayerPlan,
    Parameters,
    Plan,
    StructureBudget,
    UnitReasons,
)  # fmt: skip
from expertprune.files import EXPERT_FILE
from expertprune.reporting.card import write_card
from expertprune.reporting.explain import explain
from expertprune.reporting.tables import other_rows, plan_table, retention_rows, retention_table
from expertprune.spec.schema import Spec
from expertprune.units import KeptUnits, LayerShape
from tests.calling import strict
from tests.experts import described

HOSTILE = [
    "[bold]red[/bold]",
    "[/]",
    "{{ 1 / 0 }} {% raw %}",
    "**bold** _it_ `code` # heading",
    "<script>alert(1)</script>",
    "ünï/日本",
    "my model: v2 #1",
    "123",
    "a|b",
]


def an_evaluation(corpus: str = "language/en") -> Evaluation:
    note = "the base (0.0000) is no better than chance (0.2500), so retention is undefined"
    asked = {"base": 0.0, "expert": 0.25, "retention": math.nan, "gained": 3, "lost": 0, "chance": 0.25, "note": note}
    task = {"suite": "own", "group": "general", "backend": "hf", "metric": "exact_match", "agreement": 0.4}
    kept = {"retention": 0.8, "low": 0.7, "high": 0.9}
    first = {
        "bits_per_byte": Measured(examples=3, base=0.5, expert=2 / 3, retention=0.75, low=0.70004, high=0.79996),
        "kl": Measured(examples=3, expert=0.25, low=0.125, high=0.375),
        "questions": Measured(examples=12, **asked),
    }
    second = {"perplexity": Measured(examples=3, base=8, expert=8, retention=8, low=8, high=8)}
    return Evaluation(
        settings=Settings(resamples=2000),
        corpora={
            corpus: CorpusResult(group="expert", documents=3, questions=12, metrics=first),
            "task/qa": CorpusResult(group="expert", documents=1, questions=0, metrics=second),
        },
        generation={"sums": TaskResult(examples=50, base=0.75, expert=0.65, gained=2, lost=14, **kept, **task)},
        summary={"general": {"accuracy": Average(**kept, metrics=["sums"], undefined=[])}},
    )


def a_plan(name: str = "made-up", base: str = "owner/model", value: str = "en") -> Plan:
    def why(language: int, general: int, shared: int, kept: int) -> dict[str, UnitReasons]:
        ffn = UnitReasons(
            threshold=0.1,
            protected={"language": language, "general": general},
            shared=KindCount(units=shared, kept=kept),
            expert_exclusive=KindCount(units=32 - shared, kept=24 - kept),
            general_exclusive=KindCount(units=0, kept=0),
        )
        return {"ffn": ffn, "kv_groups": UnitReasons(threshold=0.2, protected={"language": 2})}

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
        shapes=[LayerShape(24, 32, 6, 3, 4)] * 2,
        layers=[LayerPlan(kept, why(20, 4, 10, 9)), LayerPlan(kept, why(21, 3, 12, 5))],
        budget={
            "ffn": StructureBudget(requested=0.25, of=32, kept=24, removed=8),
            "query_heads": StructureBudget(requested=0, of=6, kept=4, removed=2),
            "kv_groups": StructureBudget(requested=1, of=3, kept=2, removed=1),
        },
    )


def an_expert(folder: Path, name: str = "made-up", base: str = "owner/model", value: str = "en") -> Expert:
    record = described(folder).base.model_copy(update={"model": base})
    corpora = {
        f"language/{value}": CorpusRecord(digest="c", documents=["a", "b", "c"]),
        "task/qa": CorpusRecord(digest="d", documents=["e"]),
    }
    evaluation = an_evaluation(f"language/{value}")
    return described(folder, plan=a_plan(name, base, value), base=record, corpora=corpora, evaluation=evaluation)


def shown(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=250, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def card(expert: Expert) -> str:
    write_card(expert)
    return (expert.folder / "README.md").read_text(encoding="utf-8")


def table_rows(text: str) -> dict[str, list[str]]:
    """The rows of a printed table by their first cell."""
    rows = [[cell.strip() for cell in re.split(r"[│┃]", line)[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_retention_rows_say_every_metric_and_the_averages() -> None:
    assert retention_rows(an_evaluation()) == [
        ["language/en", "bits per byte", "0.5000", "0.6667", "0.7500", "0.7000 to 0.8000"],
        ["language/en", "KL to base, bits/token", "", "0.2500", "", "0.1250 to 0.3750"],
        ["task/qa", "perplexity", "8.0000", "8.0000", "8.0000", "8.0000 to 8.0000"],
        ["language/en", "accuracy (12 questions, +3 −0)", "0.0000", "0.2500", "undefined", "no interval"],
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


def test_the_headline_is_bits_per_byte_over_documents_whatever_tasks_say() -> None:
    """Base (40 + 30) / 40 bytes, expert (50 + 50) / 40; a document of two corpora counts once."""

    def bits(digest: str, base: float, expert: float) -> DocumentBits:
        return DocumentBits(
            digest=digest, tokens=9, bytes=20, base_bits=base, expert_bits=expert, kl_bits=0, expert_tokens=9,
            expert_bytes=20,
        )  # fmt: skip

    measured = an_evaluation()
    rows = [bits("a", 40, 50), bits("b", 30, 50)]
    corpora = {name: each.model_copy(update={"per_document": rows}) for name, each in measured.corpora.items()}
    first, *rest = retention_rows(measured.model_copy(update={"corpora": corpora}))
    assert first[:5] == ["expert", "bits per byte, all 2 documents", "1.7500", "2.5000", "0.7000"]
    assert rest == retention_rows(measured)


def test_what_the_spec_does_not_name_stands_apart_and_counts_in_no_average(tmp_path: Path) -> None:
    expert = an_expert(tmp_path)
    before = an_evaluation()
    other = before.corpora["task/qa"].model_copy(update={"group": "other"})
    measured = before.model_copy(update={"corpora": {**before.corpora, "other/de": other}})
    assert retention_rows(measured) == retention_rows(before)
    row = ["other/de", "perplexity", "8.0000", "8.0000", "8.0000", "8.0000 to 8.0000"]
    assert other_rows(measured) == [row]
    rows = [*table_rows(shown(retention_table(measured)))]
    assert rows.index("other/de") == rows.index("not named in the spec:") + 1 > rows.index("sums")
    text = card(replace(expert, evaluation=measured))
    assert re.search(r"\n\nNot named in the spec: .*\n\n\|.*\n\|.*\n\| other/de \| perplexity \|", text)


def test_the_plan_table_sums_over_layers() -> None:
    plan = a_plan()
    rows = table_rows(shown(plan_table(plan)))
    assert rows["ffn"] == ["24 of 32", "language 41, general 7", "14 of 22 kept", "34 of 42 kept", "0 of 0 kept"]
    assert rows["kv_groups"] == ["2 of 3", "language 4", "", "", ""]
    assert rows["query_heads"] == ["4 of 6", "left with their KV groups", "", "", ""]
    heads = plan.budget["query_heads"].model_copy(update={"kept": 6})
    uncut = replace(plan, budget={**plan.budget, "query_heads": heads})
    assert table_rows(shown(plan_table(uncut)))["query_heads"] == ["6 of 6", "not cut", "", "", ""]


def test_the_card_counts_shared_and_exclusive_units(tmp_path: Path) -> None:
    text = card(an_expert(tmp_path))
    assert "\n|---|---|---|---|\n| ffn | 14 of 22 kept | 34 of 42 kept | 0 of 0 kept |\n\nMethod:" in text
    assert "differ by at most 0.1 of their sum" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_any_name_is_shown_as_it_is(tmp_path: Path, text: str) -> None:
    table = shown(retention_table(an_evaluation(text)))
    assert table.count(text) == 3  # with its text, with its questions, and in the note below the table
    assert "accuracy: the base (0.0000) is no better than chance (0.2500)" in table
    assert "nan" not in table
    assert f"plan {text}" in shown(explain(a_plan(text)))
    explained = shown(explain(an_expert(tmp_path, base=text)))
    assert text in explained
    assert "10,000 of 12,345 (81.0%)" in explained
    written = card(an_expert(tmp_path, name=text, base=text, value=text))
    plain = text.replace("<", "&lt;")  # Markdown shows it as it is, and runs nothing
    assert f"# {plain}\n" in written
    assert f"An expert cut from `{plain}` for language {plain}, de; task qa" in written
    escaped = plain.replace("|", "\\|")
    assert f"| language/{escaped} | bits per byte |" in written
    assert yaml.safe_load(written.split("---\n")[1])["model-index"][0]["name"] == plain
    strict((tmp_path / EXPERT_FILE).read_text(encoding="utf-8"))  # with an undefined retention


def test_the_card_says_what_was_cut_and_what_was_kept(tmp_path: Path) -> None:
    text = card(an_expert(tmp_path))
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/model",
        "base_model_relation": "finetune",
        "language": ["en", "de"],
        "tags": ["expertprune", "pruned", "qa"],
    }
    for line in (
        "# made-up",
        "An expert cut from `owner/model` for language en, de; task qa, without post-training:",
        "10,000 of 12,345 parameters",
        "(81.0%). It loads like any other checkpoint of its architecture, in",
        "| ffn | 24 | 32 |",
        "| query_heads | 4 | 6 |",
        "| kv_groups | 2 | 3 |",
        *(f"| {' | '.join(row)} |" for row in retention_rows(an_evaluation())[2:]),
    ):
        assert line in text.splitlines()
    assert "language/en (3 documents), task/qa (1 documents)." in text
    assert "(https://example.org/paper)" in text
    assert "shared/exclusive fusion with general relevance (after" in text
    assert "2510.22489" in text
    assert "Not evaluated yet" not in text
    # A blank line inside a table, or text right after it, would end or join it.
    tables = re.findall(r"\n\n(\|.*?\|)\n\n", text, re.DOTALL)
    assert [len(table.splitlines()) for table in tables] == [2 + 3, 2 + 1, 2 + 6]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    bare = card(replace(an_expert(tmp_path), evaluation=None))
    assert "Not evaluated yet" in bare
    assert "95% interval" not in bare


def test_the_card_speaks_of_general_relevance_only_where_there_is_some(tmp_path: Path) -> None:
    expert = an_expert(tmp_path)
    expert.plan.spec["compose"]["fusion"] |= {"method": "weighted"}
    text = card(expert)
    assert "general relevance weighted 0.25" in text
    assert "2510.22489" not in text
    expert = an_expert(tmp_path)
    expert.plan.spec["general"] = []
    text = card(expert)
    assert "fusion" not in text
    assert "general relevance" not in text
