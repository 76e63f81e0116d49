"""The numbers of a report: from the files of an expert, in one place."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertprune.artifacts.evaluation import CorpusResult, Evaluation, Group, Measured, Settings, TaskResult
from expertprune.artifacts.plan import VocabularyPlan
from expertprune.errors import CheckpointError, PlanError
from expertprune.reporting.page import headline_rows
from expertprune.reporting.page.evidence import read_artifacts
from expertprune.reporting.page.findings import Remains, ReportData, findings, metric_rows
from expertprune.reporting.page.lineup import lineup
from expertprune.units import KeptRows
from tests.experts import about, copied, measured, throughput

Build = tuple[Path, Path]


def report_of(folder: Path, store: Path) -> ReportData:
    return findings(read_artifacts(folder, store))


# --- size, retention, speed -----------------------------------------------------------------------------------------


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


def test_a_measurement_of_throughput_keeps_what_has_no_ratio(tiny_build: Build, tmp_path: Path) -> None:
    found = report_of(measured(copied(tiny_build, tmp_path / "e")), tiny_build[1]).throughput
    assert found is not None
    rows = {row.metric: row for row in found.rows}
    assert (rows["memory_bytes"].base, rows["memory_bytes"].ratio) == (2e9, None)
    assert (found.settings["rounds"], found.settings["prompts"], found.arguments) == (3, 32, ["--seed", "a b"])


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


# --- metrics --------------------------------------------------------------------------------------------------------


def shard(folder: Path) -> Path:
    """The last file of its weights."""
    return max(folder.glob("model-*.safetensors"))


def evaluation(corpora: dict[str, Measured], **tasks: TaskResult) -> Evaluation:
    """One metric, `perplexity`, of each corpus."""
    return Evaluation(
        settings=Settings(resamples=2000),
        corpora={
            name: CorpusResult(
                group="general" if name.startswith("general") else "expert",
                documents=numbers.examples,
                questions=0,
                metrics={"perplexity": numbers},
            )
            for name, numbers in corpora.items()
        },
        tasks=tasks,
    )


def numbers(low: float = 0.9, high: float = 0.95, examples: int = 1) -> Measured:
    return Measured(examples=examples, base=1.0, expert=1.0, retention=1.0, low=low, high=high)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.8, 0.99, "loss"), (0.9, 1.0, "open"), (0.9, 1.1, "open"), (1.0, 1.1, "open"), (1.01, 1.1, "gain"),
     (math.nan, math.nan, None)],
)  # fmt: skip
def test_the_interval_decides_whether_something_was_lost(low: float, high: float, verdict: str | None) -> None:
    (row,) = metric_rows(evaluation({"task/qa": numbers(low, high)}))
    assert row.verdict == verdict
    assert row.low == (None if math.isnan(low) else low)


def test_a_distance_has_no_verdict() -> None:
    (row,) = metric_rows(evaluation({"task/qa": Measured(examples=1, expert=0.5, low=0.4, high=0.6)}))
    assert (row.verdict, row.retention, row.expert) == (None, None, 0.5)


def test_what_the_expert_is_for_comes_first() -> None:
    def task(group: Group) -> TaskResult:
        return TaskResult(suite="own", group=group, backend="hf", metric="acc", **numbers(examples=3).model_dump())

    measured = evaluation(
        {"general/general": numbers(), "task/qa": numbers(examples=2)}, a=task("general"), b=task("expert")
    )
    rows = metric_rows(measured)
    assert [row.name for row in rows] == ["task/qa", "b", "general/general", "a"]
    assert [row.examples for row in rows] == [2, 3, 1, 3]


def test_outcomes_are_counted(tiny_build: Build, tmp_path: Path) -> None:
    found = report_of(measured(copied(tiny_build, tmp_path / "e")), tiny_build[1])
    verdicts = [row.verdict for row in found.metrics]
    assert found.outcome == {
        "metrics": sum(verdict is not None for verdict in verdicts),
        "loss": verdicts.count("loss"), "open": verdicts.count("open"), "gain": verdicts.count("gain"),
    }  # fmt: skip
    assert found.outcome["loss"] >= 1  # the made-up task
    assert found.outcome["open"] >= 1  # the made-up generation


# --- what is not there ----------------------------------------------------------------------------------------------


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
    folder, store = tiny_build
    shutil.copytree(store / "profiles", tmp_path / "store" / "profiles")
    digest = about(folder)["plan"]["profiles"]["task/qa"]
    (tmp_path / "store" / "profiles" / f"{digest}.safetensors").write_bytes(b"no profile")
    found = report_of(folder, tmp_path / "store")
    assert found.relevance is None
    assert "no profile of task/qa that" in found.missing["relevance"].reason
    assert [corpus.stored for corpus in found.provenance.corpora] == [True, True, False, True]


def test_a_criterion_that_sees_no_corpus_has_no_relevance_by_corpus(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "e")
    document = about(folder)
    document["spec"]["relevance"]["criterion"] = "magnitude"
    (folder / "expertprune.json").write_text(json.dumps(document))
    found = report_of(folder, tiny_build[1])
    assert found.relevance is None
    assert found.missing["relevance"].command is None


def test_vocabulary_rows_that_were_cut_are_a_part_of_the_size(tiny_build: Build) -> None:
    assert report_of(*tiny_build).size.vocabulary is None
    artifacts = read_artifacts(*tiny_build)
    plan = replace(artifacts.expert.plan, vocabulary=VocabularyPlan(KeptRows(64, tuple(range(48)), ()), "tokenizer"))
    found = findings(replace(artifacts, expert=replace(artifacts.expert, plan=plan)))
    assert found.size.vocabulary == Remains(64, 48, 0.75)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda folder: shard(folder).unlink(), r"model-.*\.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "holds no weights"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "expertprune.json").unlink(), "is no expert"),
        (lambda folder: (folder / "expertprune.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "throughput.json").write_text("[]"), "throughput.json: is no timing"),
        (lambda folder: (folder / "throughput.json").write_text("{"), "throughput.json: cannot be read"),
    ],
)
def test_a_half_written_folder_is_refused(tiny_build: Build, tmp_path: Path, change: Any, error: str) -> None:
    folder = copied(tiny_build, tmp_path / "e")
    change(folder)
    with pytest.raises(CheckpointError, match=error):
        read_artifacts(folder, tiny_build[1])


def test_weights_that_end_early_are_refused(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "e")
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard(folder).name):
        read_artifacts(folder, tiny_build[1])


@pytest.mark.parametrize("key", ["layers", "profiles", "budget"])
def test_a_damaged_plan_is_named(tiny_build: Build, tmp_path: Path, key: str) -> None:
    plan = about(tiny_build[0])["plan"]
    del plan[key]
    with pytest.raises(PlanError, match=r"expertprune\.json"):
        read_artifacts(copied(tiny_build, tmp_path / "e", plan=plan), tiny_build[1])


@pytest.mark.parametrize(
    "evaluation", [{"corpora": {"task/qa": {}}}, {"corpora": {}, "tasks": {"a": {"base": 1}}}, [1]]
)
def test_a_damaged_evaluation_is_named(tiny_build: Build, tmp_path: Path, evaluation: Any) -> None:
    folder = copied(tiny_build, tmp_path / "e", evaluation=evaluation)
    with pytest.raises(CheckpointError, match=r"expertprune\.json: damaged"):
        report_of(folder, tiny_build[1])


def test_a_damaged_measurement_is_named(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "e")
    (folder / "throughput.json").write_text(json.dumps(throughput(limit="much")))
    with pytest.raises(CheckpointError, match="limit: Input should be a valid number"):
        report_of(folder, tiny_build[1])


# --- side by side ---------------------------------------------------------------------------------------------------


def changed(build: Build, to: Path, **base: Any) -> ReportData:
    return report_of(copied(build, to, base=about(build[0])["base"] | base), build[1])


def test_experts_of_one_base_on_the_same_documents_can_be_compared(tiny_build: Build, tmp_path: Path) -> None:
    first, second = report_of(*tiny_build), changed(tiny_build, tmp_path / "e")
    found = lineup([first, second])
    kept = {row.label: [cell and cell.kept for cell in row.cells] for row in found.structures}
    # three layers of 24, 4 and 2
    assert kept == {"FFN neurons": [72, 72], "query heads": [12, 12], "KV groups": [6, 6]}
    assert found.notes == []
    assert [row.cells for row in found.rows] == [[metric, metric] for metric in first.metrics]
    assert {(row.values, row.retention) for row in found.rows} == {(None, None)}


def test_another_base_makes_retention_relative(tiny_build: Build, tmp_path: Path) -> None:
    other = changed(tiny_build, tmp_path / "e", digest="another", model="other", tokenizer_digest="another")
    found = lineup([report_of(*tiny_build), other])
    reasons = {row.label: (row.values, row.retention) for row in found.rows}
    assert reasons["bits per byte"] == (None, "relative to different bases")
    assert reasons["perplexity"] == ("different tokenizers", "different tokenizers")
    assert reasons["KL to base, bits/token"][0] == "different tokenizers"
    assert any("different bases" in note for note in found.notes)


def test_a_distance_to_another_base_is_another_distance(tiny_build: Build, tmp_path: Path) -> None:
    found = lineup([report_of(*tiny_build), changed(tiny_build, tmp_path / "e", digest="another")])
    assert {row.values for row in found.rows if row.label.startswith("KL")} == {"distances to different bases"}
    assert {row.values for row in found.rows if row.label == "perplexity"} == {None}


def test_other_documents_cannot_be_compared(tiny_build: Build, tmp_path: Path) -> None:
    evaluation = about(tiny_build[0])["evaluation"]
    evaluation["corpora"]["task/qa"]["per_document"][0]["digest"] = "another"
    other = report_of(copied(tiny_build, tmp_path / "e", evaluation=evaluation), tiny_build[1])
    found = lineup([report_of(*tiny_build), other])
    unlike = {row.name for row in found.rows if row.values == "not the same documents"}
    assert unlike == {"task/qa"}


def test_what_one_expert_was_not_measured_on_has_no_cell(tiny_build: Build, tmp_path: Path) -> None:
    found = lineup([report_of(*tiny_build), report_of(measured(copied(tiny_build, tmp_path / "e")), tiny_build[1])])
    row = next(row for row in found.rows if row.name == "choices")
    assert [cell and cell.retention for cell in row.cells] == [None, 0.8]


def test_the_data_is_plain(tiny_build: Build, tmp_path: Path) -> None:
    document = report_of(measured(copied(tiny_build, tmp_path / "e")), tiny_build[1]).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
