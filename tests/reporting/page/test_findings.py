"""The numbers of a report: from the files of an expert, in one place."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertprune.artifacts.evaluation import Evaluation, Settings, TaskResult
from expertprune.artifacts.plan import VocabularyPlan
from expertprune.errors import CheckpointError, PlanError
from expertprune.reporting.page import headline_rows, report
from expertprune.reporting.page.evidence import read_artifacts
from expertprune.reporting.page.findings import Remains, ReportData, findings, metric_rows
from expertprune.reporting.page.lineup import lineup
from expertprune.units import KeptRows
from tests.experts import about, copied, measured, throughput
from tests.html import parsed, words

Build = tuple[Path, Path]


def report_of(folder: Path, store: Path) -> ReportData:
    return findings(read_artifacts(folder, store))


def test_size_is_that_of_the_plan_and_of_the_weights_files(tiny_build: Build, tiny_llama: Path) -> None:
    folder, store = tiny_build
    size = report_of(folder, store).size
    # per layer: 8 of 32 neurons of three vectors each, 1 of 3 KV groups: 2 query heads and one KV head of 4 channels
    removed = 3 * (8 * 3 * 24 + (2 * 2 * 4 + 2 * 4) * 24)
    before = 2 * 64 * 24 + 24 + 3 * (24 * 24 + 2 * 12 * 24 + 24 * 24 + 3 * 32 * 24 + 2 * 24)
    assert size.parameters == Remains(before, before - removed, (before - removed) / before)
    assert size.weights.base == sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    assert size.weights.expert == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size.weights.fraction == size.weights.expert / size.weights.base


def test_the_headline_is_bits_per_byte_over_documents_whatever_else_was_measured(
    tiny_build: Build, tmp_path: Path
) -> None:
    folder, store = tiny_build
    found = report_of(measured(copied(tiny_build, tmp_path / "e")), store)
    corpora = about(folder)["evaluation"]["corpora"]
    for group, names in (("expert", ["language/en", "domain/medical", "task/qa"]), ("general", ["general/general"])):
        rows = [row for name in names for row in corpora[name]["per_document"]]
        base, expert = (sum(row[f"{side}_bits"] for row in rows) for side in ("base", "expert"))
        kept = found.retention[group]
        assert kept is not None
        assert kept.retention == pytest.approx(base / expert)
        assert kept.low < kept.retention < kept.high
        assert kept.examples == len(rows)
    assert found.missing == {}
    assert found.speed is not None
    assert (found.speed.ratio, found.speed.low, found.speed.high) == (1.125, 1.1, 1.15)
    assert found.throughput is not None
    assert found.throughput.of_limit == pytest.approx(0.9)  # 1.125 / 1.25
    memory = {row.metric: row for row in found.throughput.rows}["memory_bytes"]
    assert (memory.base, memory.ratio) == (2e9, None)
    assert (found.throughput.settings["rounds"], found.throughput.arguments) == (3, ["--seed", "a b"])
    verdicts = [row.verdict for row in found.metrics]
    counts = {verdict: verdicts.count(verdict) for verdict in ("loss", "open", "gain")}  # type: ignore[arg-type]
    assert {row.verdict for row in found.metrics if row.retention is None} == {None}  # of a distance
    # What the expert is for comes first.
    names = ["language/en", "domain/medical", "task/qa", "choices", "general/general", "sums"]
    assert list(dict.fromkeys(row.name for row in found.metrics)) == names
    assert found.outcome == {"metrics": sum(counts.values()), **counts}
    assert min(counts["loss"], counts["open"]) >= 1  # the made-up task, the made-up generation
    document = found.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_one_round_has_no_spread_and_a_disturbed_one_is_said(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "e")
    measurement = throughput()
    measurement["load"]["rounds"] = 1
    measurement["ratios"]["output_tokens_per_second"] = {"median": 1.5, "low": 1.5, "high": 1.5}
    (folder / "throughput.json").write_text(json.dumps(measurement))
    found = report_of(folder, tiny_build[1])
    assert found.speed is not None
    assert found.throughput is not None
    assert (found.speed.ratio, found.speed.low, found.speed.high) == (1.5, None, None)
    assert found.throughput.beyond_limit is True  # 1.5 against 1.25
    assert headline_rows(found.document())[-1][1] == "1.5000 (one round), output tokens/s"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.8, 0.99, "loss"), (0.9, 1.0, "open"), (0.9, 1.1, "open"), (1.0, 1.1, "open"), (1.01, 1.1, "gain"),
     (math.nan, math.nan, None)],
)  # fmt: skip
def test_the_interval_decides_whether_something_was_lost(low: float, high: float, verdict: str | None) -> None:
    task = TaskResult(suite="own", group="expert", backend="hf", metric="acc", examples=1, base=1, expert=1, retention=1,
                      low=low, high=high)  # fmt: skip
    (row,) = metric_rows(Evaluation(settings=Settings(resamples=2000), tasks={"task": task}))
    assert row.verdict == verdict
    assert row.low == (None if math.isnan(low) else low)


def test_what_the_spec_does_not_name_comes_last_and_is_counted_nowhere(tiny_build: Build, tmp_path: Path) -> None:
    before = report_of(*tiny_build)
    command = f"expertprune evaluate {tiny_build[0]} --other de --other math --other software"
    assert before.missing["others"].command == command
    evaluation = about(tiny_build[0])["evaluation"]
    other = {"language/de": evaluation["corpora"]["task/qa"] | {"group": "other"}}
    evaluation["corpora"] = {f"other/{name}": each for name, each in other.items()} | evaluation["corpora"]
    folder = copied(tiny_build, tmp_path / "e", evaluation=evaluation)
    found = report_of(folder, tiny_build[1])
    assert (found.retention, found.outcome) == (before.retention, before.outcome)
    assert [row for row in found.metrics if row.group != "other"] == before.metrics
    assert found.metrics[-1].name == "other/language/de"
    assert "others" not in found.missing
    report(folder, store=tiny_build[1])
    tables = [words(table) for table in parsed((folder / "report.html").read_text()).iter("table")]
    assert ["other/language/de" in each for each in tables[:2]] == [False, True]


def test_what_is_missing_names_the_command_that_fills_it_in(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "an expert's", evaluation=None)
    found = report_of(folder, tmp_path / "empty")
    assert (found.metrics, found.relevance, found.alignment) == ([], None, {})
    assert found.retention == {"expert": None, "general": None}
    quoted = f"'{tmp_path}/an expert'\"'\"'s'"
    commands = {section: entry.command for section, entry in found.missing.items()}
    assert commands == {
        "metrics": f"expertprune evaluate {quoted}",
        "alignment": f"expertprune evaluate {quoted} --suite general",
        "throughput": f"expertprune bench {quoted}",
        "relevance": f"expertprune profile SPEC --store {tmp_path}/empty",
    }
    for corpus in ("language/en", "domain/medical", "task/qa", "general/general"):
        assert corpus in found.missing["relevance"].reason


def test_a_profile_that_cannot_be_read_is_as_one_that_is_not_there(tiny_build: Build, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_build[1], tmp_path / "store"))
    folder = copied(tiny_build, tmp_path / "e")
    document = about(folder)
    (store / "profiles" / f"{document['plan']['profiles']['task/qa']}.safetensors").write_bytes(b"no profile")
    found = report_of(folder, store)
    assert found.relevance is None
    assert "no profile of task/qa that" in found.missing["relevance"].reason
    assert [corpus.stored for corpus in found.provenance.corpora] == [True, True, False, True]
    document["spec"]["relevance"]["criterion"] = "magnitude"  # it sees no corpus, so no command fills this in
    (folder / "expertprune.json").write_text(json.dumps(document))
    found = report_of(folder, tiny_build[1])
    assert (found.relevance, found.missing["relevance"].command) == (None, None)


def test_vocabulary_rows_that_were_cut_are_a_part_of_the_size(tiny_build: Build) -> None:
    assert report_of(*tiny_build).size.vocabulary is None
    artifacts = read_artifacts(*tiny_build)
    plan = replace(artifacts.expert.plan, vocabulary=VocabularyPlan(KeptRows(64, tuple(range(48)), ()), "tokenizer"))
    found = findings(replace(artifacts, expert=replace(artifacts.expert, plan=plan)))
    assert found.size.vocabulary == Remains(64, 48, 0.75)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("model-*.safetensors", None, r"model-.*\.safetensors"),
        ("model-*.safetensors", -100, r"model-.*\.safetensors"),  # it ends early
        ("model.safetensors.index.json", None, "holds no weights"),
        ("config.json", None, "config.json"),
        ("expertprune.json", None, "is no expert"),
        ("expertprune.json", "{", "not valid JSON"),
        ("throughput.json", "[]", "throughput.json: is no timing"),
        ("throughput.json", "{", "throughput.json: not valid JSON"),
        ("throughput.json", json.dumps(throughput(limit="much")), "limit: must be a number"),
    ],
)
def test_a_half_written_folder_is_refused(
    tiny_build: Build, tmp_path: Path, file: str, content: str | int | None, error: str
) -> None:
    folder = copied(tiny_build, tmp_path / "e")
    path = max(folder.glob(file), default=folder / file)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else path.read_bytes()[:content])
    with pytest.raises(CheckpointError, match=error):
        report_of(folder, tiny_build[1])


def test_a_damaged_description_is_named(tiny_build: Build, tmp_path: Path) -> None:
    plan = about(tiny_build[0])["plan"]
    del plan["layers"]
    with pytest.raises(PlanError, match=r"expertprune\.json"):
        report_of(copied(tiny_build, tmp_path / "plan", plan=plan), tiny_build[1])
    for number, damaged in enumerate(({"corpora": {"task/qa": {}}}, {"corpora": {}, "tasks": {"a": {"base": 1}}}, [1])):
        with pytest.raises(CheckpointError, match=r"expertprune\.json: damaged"):
            report_of(copied(tiny_build, tmp_path / str(number), evaluation=damaged), tiny_build[1])


def test_experts_of_one_base_on_the_same_documents_can_be_compared(tiny_build: Build, tmp_path: Path) -> None:
    first, second = report_of(*tiny_build), report_of(measured(copied(tiny_build, tmp_path / "e")), tiny_build[1])
    found = lineup([first, second])
    kept = {row.label: [cell and cell.kept for cell in row.cells] for row in found.structures}
    # three layers of 24, 4 and 2
    assert kept == {"FFN neurons": [72, 72], "query heads": [12, 12], "KV groups": [6, 6]}
    assert found.notes == []
    rows = {(row.name, row.label): row for row in found.rows}
    assert all(rows[metric.name, metric.label].cells == [metric, metric] for metric in first.metrics)
    assert {(row.values, row.retention) for row in found.rows} == {(None, None)}
    (choices,) = (row for row in found.rows if row.name == "choices")  # the first was not measured on it
    assert [cell and cell.retention for cell in choices.cells] == [None, 0.8]


def test_another_base_makes_retention_relative(tiny_build: Build, tmp_path: Path) -> None:
    def reasons(name: str, **changes: Any) -> dict[str, tuple[str | None, str | None]]:
        base = about(tiny_build[0])["base"] | {"digest": "another"} | changes
        other = report_of(copied(tiny_build, tmp_path / name, base=base), tiny_build[1])
        found = lineup([report_of(*tiny_build), other])
        assert any("different bases" in note for note in found.notes)
        return {row.label: (row.values, row.retention) for row in found.rows}

    tokens = reasons("tokens", model="other", tokenizer_digest="another")
    assert tokens["bits per byte"] == (None, "relative to different bases")
    assert tokens["perplexity"] == ("different tokenizers", "different tokenizers")
    assert tokens["KL to base, bits/token"][0] == "different tokenizers"
    weights = reasons("weights")
    assert weights["perplexity"][0] is None
    assert weights["KL to base, bits/token"][0] == "compared with different bases"


def test_other_documents_cannot_be_compared(tiny_build: Build, tmp_path: Path) -> None:
    evaluation = about(tiny_build[0])["evaluation"]
    evaluation["corpora"]["task/qa"]["per_document"][0]["digest"] = "another"
    other = report_of(copied(tiny_build, tmp_path / "e", evaluation=evaluation), tiny_build[1])
    found = lineup([report_of(*tiny_build), other])
    assert {row.name for row in found.rows if row.values == "not the same documents"} == {"task/qa"}
