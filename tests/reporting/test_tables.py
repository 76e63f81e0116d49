"""What people read is right, and no name that a user may choose breaks it."""

from __future__ import annotations

import copy
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
)  # fmt: skip
from expertprune.artifacts.expert import CorpusRecord, Expert
from expertprune.files import EXPERT_FILE
from expertprune.reporting.card import write_card
from expertprune.reporting.explain import explain
from expertprune.reporting.tables import other_rows, plan_table, retention_rows, retention_table, widths
from tests.calling import strict

Build = tuple[Path, Path]
HOSTILE = ["[bold]red[/bold]", "[/]", "{{ 1 / 0 }} {% raw %}", "**bold** _it_ `code` # heading",
           "<script>alert(1)</script>", "my model: v2 #1", "123", "a|b"]  # fmt: skip


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
            "other/de": CorpusResult(group="other", documents=1, questions=0, metrics=second),
        },
        generation={"sums": TaskResult(examples=50, base=0.75, expert=0.65, gained=2, lost=14, **kept, **task)},
        summary={"general": {"accuracy": Average(**kept, metrics=["sums"], undefined=[])}},
    )


def an_expert(
    build: Build, folder: Path, name: str = "made-up", base: str = "owner/model", value: str = "en"
) -> Expert:
    """The tiny expert under another name, of another base, for another language, with made-up numbers."""
    found = Expert.load(build[0])
    spec = copy.deepcopy(found.plan.spec)
    spec["dimensions"]["language"] = [value, "de"]
    record = found.base.model_copy(update={"model": base})
    plan = replace(found.plan, name=name, spec=spec, base=found.plan.base.model_copy(update={"model": base}))
    texts = {f"language/{value}": ["a", "b", "c"], "task/qa": ["e"]}
    corpora = {corpus: CorpusRecord(digest="c", documents=documents) for corpus, documents in texts.items()}
    evaluation = an_evaluation(f"language/{value}")
    return replace(found, plan=plan, base=record, corpora=corpora, evaluation=evaluation, folder=folder)


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
    """What the spec does not name stands apart, and counts in no average."""
    evaluation = an_evaluation()
    rows = [
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
    assert retention_rows(evaluation) == rows
    assert other_rows(evaluation) == [["other/de", "perplexity", "8.0000", "8.0000", "8.0000", "8.0000 to 8.0000"]]
    printed = [*table_rows(shown(retention_table(evaluation)))]
    assert printed.index("other/de") == printed.index("not named in the spec:") + 1 > printed.index("sums")
    # Above them is what is kept over all documents: base 40 + 30 of 40 bytes, expert 50 + 50, the same in two corpora.
    about = {"tokens": 9, "bytes": 20, "kl_bits": 0, "expert_tokens": 9, "expert_bytes": 20, "expert_bits": 50}
    documents = [DocumentBits(digest=f"{bits}", base_bits=bits, **about) for bits in (40, 30)]
    corpora = {name: each.model_copy(update={"per_document": documents}) for name, each in evaluation.corpora.items()}
    first, *rest = retention_rows(evaluation.model_copy(update={"corpora": corpora}))
    assert first[:5] == ["expert", "bits per byte, all 2 documents", "1.7500", "2.5000", "0.7000"]
    assert rest == rows


def test_layers_that_go_have_no_width() -> None:
    assert widths([40, 0, 48], gone=[1]) == "40 to 48 (mean 44)"
    assert widths([40, 0, 40], gone=[1]) == "40"


def test_the_plan_table_sums_over_layers(tiny_build: Build) -> None:
    plan = Expert.load(tiny_build[0]).plan
    rows = table_rows(shown(plan_table(plan)))
    why = [layer.why["ffn"] for layer in plan.layers if layer.why]
    protected = {source: sum(each.protected.get(source, 0) for each in why) for source in why[0].protected}
    kinds = [[getattr(each, kind) for each in why] for kind in ("shared", "expert_exclusive", "general_exclusive")]
    who, *counts = rows["ffn"][1:]
    assert who == ", ".join(f"{source} {units}" for source, units in protected.items())
    assert counts == [f"{sum(each.kept for each in kind)} of {sum(each.units for each in kind)} kept" for kind in kinds]
    assert (rows["ffn"][0], rows["kv_groups"][0]) == ("16 to 32 (mean 24) of 32", "1 to 3 (mean 2) of 3")
    assert rows["query_heads"] == ["2 to 6 (mean 4) of 6", "left with their KV groups", "", "", ""]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_name_is_shown_as_it_is(tiny_build: Build, tmp_path: Path, text: str) -> None:
    table = shown(retention_table(an_evaluation(text)))
    assert table.count(text) == 3  # with its text, with its questions, and in the note below the table
    assert "accuracy: the base (0.0000) is no better than chance (0.2500)" in table
    assert "nan" not in table
    expert = an_expert(tiny_build, tmp_path, name=text, base=text, value=text)
    assert f"plan {text}" in shown(explain(expert.plan))
    assert text in shown(explain(expert))
    written = card(expert)
    plain = text.replace("<", "&lt;")  # Markdown shows it as it is, and runs nothing
    assert f"# {plain}\n" in written
    assert f"An expert cut from `{plain}` for language {plain}, de; domain medical; task qa" in written
    escaped = plain.replace("|", "\\|")
    assert f"| language/{escaped} | bits per byte |" in written
    assert yaml.safe_load(written.split("---\n")[1])["model-index"][0]["name"] == plain
    strict((tmp_path / EXPERT_FILE).read_text(encoding="utf-8"))  # with an undefined retention


def test_the_card_says_what_was_cut_and_what_was_kept(tiny_build: Build, tmp_path: Path) -> None:
    expert = an_expert(tiny_build, tmp_path)
    text = card(expert)
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "owner/model",
        "base_model_relation": "finetune", "language": ["en", "de"], "tags": ["expertprune", "pruned", "medical", "qa"],
    }  # fmt: skip
    for line in (
        f"{expert.plan.parameters.after:,} of {expert.plan.parameters.before:,} parameters",
        "| ffn | 16 to 32 (mean 24) | 32 |",
        "| query_heads | 2 to 6 (mean 4) | 6 |",
        f"| ffn | {' | '.join(table_rows(shown(plan_table(expert.plan)))['ffn'][2:])} |",  # shared and exclusive ones
        *(f"| {' | '.join(row)} |" for row in (*retention_rows(an_evaluation()), *other_rows(an_evaluation()))),
    ):
        assert line in text.splitlines()
    assert "language/en (3 documents), task/qa (1 documents)." in text
    assert "shared/exclusive fusion with general relevance (after" in text
    # A blank line inside a table, or text right after it, would end or join it.
    tables = re.findall(r"\n\n(\|.*?\|)\n\n", text, re.DOTALL)
    assert [len(table.splitlines()) for table in tables] == [2 + 3, 2 + 2, 2 + 6, 2 + 1]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    written = {"task/qa": CorpusRecord(digest="c", documents=["e"], generated="by base from prompts")}
    bare = card(replace(expert, evaluation=None, corpora=written))
    assert "task/qa (1 documents, generated by base from prompts)." in bare
    assert "Not evaluated yet" in bare
    assert "95% interval" not in bare
    # It speaks of general relevance only where there is some.
    weighted, none = (an_expert(tiny_build, tmp_path) for _ in range(2))
    weighted.plan.spec["compose"]["fusion"] |= {"method": "weighted"}
    assert "general relevance weighted 0.25" in card(weighted)
    none.plan.spec["general"] = []
    assert not re.search("fusion|general relevance", card(none))
