"""The numbers of a report: from the files of an expert, in one place."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.artifacts.evaluation import (
    CorpusResult,
    DocumentBits,
    Evaluation,
    Measured,
    QuestionAnswers,
    Settings,
    TaskResult,
)
from expertprune.artifacts.plan import VocabularyPlan
from expertprune.artifacts.timing import Timing
from expertprune.errors import CheckpointError
from expertprune.reporting.page import headline_rows
from expertprune.reporting.page.evidence import read_artifacts
from expertprune.reporting.page.findings import Remains, ReportData, findings, metric_rows
from expertprune.reporting.page.lineup import lineup
from expertprune.units import KeptRows
from tests.experts import about, copied, measured, throughput

Build = tuple[Path, Path]
Data = dict[str, Any]


def report_of(folder: Path, store: Path) -> ReportData:
    return findings(read_artifacts(folder, store))


def test_size_is_that_of_the_plan_and_of_the_weights_files(tiny_build: Build, tiny_llama: Path) -> None:
    artifacts = read_artifacts(*tiny_build)
    size = findings(artifacts).size
    # per layer: 8 of 32 neurons of three vectors each, 1 of 3 KV groups: 2 query heads and one KV head of 4 channels
    removed = 3 * (8 * 3 * 24 + (2 * 2 * 4 + 2 * 4) * 24)
    before = 2 * 64 * 24 + 24 + 3 * (24 * 24 + 2 * 12 * 24 + 24 * 24 + 3 * 32 * 24 + 2 * 24)
    assert size.parameters == Remains(before, before - removed, (before - removed) / before)
    files = [sum(path.stat().st_size for path in each.glob("*.safetensors")) for each in (tiny_llama, tiny_build[0])]
    assert size.weights == Remains(*files, files[1] / files[0])
    assert size.vocabulary is None
    plan = replace(artifacts.expert.plan, vocabulary=VocabularyPlan(KeptRows(64, tuple(range(48)), ()), "tokenizer"))
    found = findings(replace(artifacts, expert=replace(artifacts.expert, plan=plan)))
    assert found.size.vocabulary == Remains(64, 48, 0.75)


def test_the_headline_is_bits_per_byte_over_documents_whatever_else_was_measured(
    tiny_build: Build, tmp_path: Path
) -> None:
    folder, store = measured(copied(tiny_build, tmp_path / "e")), tiny_build[1]
    found = report_of(folder, store)
    corpora = about(folder)["evaluation"]["corpora"]
    for group in ("expert", "general"):
        rows = [row for each in corpora.values() if each["group"] == group for row in each["per_document"]]
        base, expert = (sum(row[f"{side}_bits"] for row in rows) for side in ("base", "expert"))
        kept = found.retention[group]
        assert kept is not None
        assert kept.retention == pytest.approx(base / expert)
        assert kept.low < kept.retention < kept.high
        assert kept.examples == len(rows)
    assert found.missing == {}
    verdicts = Counter(row.verdict for row in found.metrics if row.verdict is not None)
    assert {row.verdict for row in found.metrics if row.retention is None} == {None}  # of a distance
    assert found.outcome == {"gain": 0, "no_interval": 0, "metrics": verdicts.total(), **verdicts}
    assert min(verdicts["loss"], verdicts["open"]) >= 1  # the made-up task, the made-up generation
    # What the expert is for comes first.
    names = ["language/en", "domain/medical", "task/qa", "choices", "general/general", "sums"]
    assert list(dict.fromkeys(row.name for row in found.metrics)) == names
    document = found.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_speed_is_told_with_its_limit_and_one_round_without_a_spread(tiny_build: Build, tmp_path: Path) -> None:
    artifacts = read_artifacts(measured(copied(tiny_build, tmp_path / "e")), tiny_build[1])
    once = throughput()
    once["load"]["rounds"], once["ratios"]["output_tokens_per_second"] = 1, {"median": 1.5, "low": 1.5, "high": 1.5}
    expected = {(1.125, 1.1, 1.15): 1.125 / 1.25, (1.5, None, None): 1.5 / 1.25}
    for timing, (speed, of_limit) in zip(
        (artifacts.timing, Timing.model_validate(once)), expected.items(), strict=True
    ):
        found = findings(replace(artifacts, timing=timing))
        assert found.speed is not None
        assert (found.speed.ratio, found.speed.low, found.speed.high) == speed
        assert found.throughput is not None
        assert found.throughput.of_limit == pytest.approx(of_limit)
        assert found.throughput.beyond_limit == (of_limit > 1)
        memory = {row.metric: row for row in found.throughput.rows}["memory_bytes"]
        assert (memory.base, memory.ratio) == (2e9, None)
    assert headline_rows(found.document())[-1][1] == "1.5000 (one round), output tokens/s"


def test_the_interval_decides_whether_something_was_lost() -> None:
    about = {"suite": "own", "group": "expert", "backend": "hf", "metric": "acc", "examples": 1, "base": 1, "expert": 1}
    ends = {
        (0.8, 0.99): "loss",
        (0.9, 1.0): "open",
        (1.0, 1.1): "open",
        (1.01, 1.1): "gain",
        (math.nan, math.nan): None,
    }
    tasks = {str(n): TaskResult(retention=1, low=low, high=high, **about) for n, (low, high) in enumerate(ends)}
    rows = metric_rows(Evaluation(settings=Settings(resamples=2000), tasks=tasks))
    assert [row.verdict for row in rows] == list(ends.values())


def test_a_retention_without_an_interval_is_counted(tiny_build: Build, tmp_path: Path) -> None:
    evaluation = about(tiny_build[0])["evaluation"]
    before = report_of(*tiny_build)
    (first, *_) = (row for row in before.metrics if row.retention is not None)
    evaluation["corpora"][first.name]["metrics"][first.metric] |= {"low": None, "high": None}
    found = report_of(copied(tiny_build, tmp_path / "e", evaluation=evaluation), tiny_build[1])
    assert found.outcome == before.outcome | {
        "no_interval": 1, str(first.verdict): before.outcome[str(first.verdict)] - 1
    }  # fmt: skip
    assert found.outcome["metrics"] == sum(row.retention is not None for row in found.metrics)


def test_other_questions_and_answers_alone_are_not_the_same_examples() -> None:
    """Their counts are equal. Earlier versions did not say whether answers alone count."""
    numbers = Measured(examples=1, expert=1.0)

    def same(question: str = "q", **changes: Any) -> dict[str, str]:
        read = DocumentBits(digest="d", tokens=2, bytes=9, base_bits=1, expert_bits=1, kl_bits=0, expert_tokens=2,
                            expert_bytes=9)  # fmt: skip
        asked = QuestionAnswers(digest=question, base=0, expert=0, base_margin=1, expert_margin=1)
        result = {"group": "expert", "documents": 1, "questions": 1, "per_document": [read], "per_question": [asked],
                  "metrics": {"bits_per_byte": numbers, "questions": numbers}}  # fmt: skip
        corpora = {"task/qa": CorpusResult.model_validate(result | changes)}
        return {
            row.metric: row.same for row in metric_rows(Evaluation(settings=Settings(resamples=1), corpora=corpora))
        }

    before = same()
    assert same(answers_only=False) == before
    for changed, others in (("questions", same("p")), ("bits_per_byte", same(answers_only=True))):
        assert {metric for metric in before if others[metric] != before[metric]} == {changed}


def test_as_many_other_examples_of_a_task_are_not_the_same() -> None:
    """Earlier versions did not say which they were."""
    task = {"suite": "own", "group": "expert", "backend": "hf", "metric": "acc", "examples": 9, "expert": 1}

    def same(**about: Any) -> str:
        tasks = {"choose": TaskResult.model_validate(task | about)}
        (row,) = metric_rows(Evaluation(settings=Settings(resamples=1), tasks=tasks))
        return row.same

    assert same() == same()
    assert same(digest="a") == same(digest="a")
    assert len({same(), same(digest="a"), same(digest="b")}) == 3


def test_what_the_spec_does_not_name_comes_last_and_is_counted_nowhere(tiny_build: Build, tmp_path: Path) -> None:
    before = report_of(*tiny_build)
    command = f"expertprune evaluate {tiny_build[0]} --other de --other math --other software"
    assert before.missing["others"].command == command
    evaluation = about(tiny_build[0])["evaluation"]
    other = {"other/language/de": evaluation["corpora"]["task/qa"] | {"group": "other"}}
    evaluation["corpora"] = other | evaluation["corpora"]
    folder = copied(tiny_build, tmp_path / "e", evaluation=evaluation)
    found = report_of(folder, tiny_build[1])
    assert (found.retention, found.outcome) == (before.retention, before.outcome)
    assert found.metrics[: len(before.metrics)] == before.metrics
    rest = found.metrics[len(before.metrics) :]
    assert {(row.group, row.name) for row in rest} == {("other", "other/language/de")}
    assert "others" not in found.missing


def test_what_is_missing_names_the_command_that_fills_it_in(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "an expert's", evaluation=None)
    found = report_of(folder, tmp_path / "empty")
    assert (found.metrics, found.relevance, found.alignment) == ([], None, {})
    assert found.retention == {"expert": None, "general": None}
    quoted = f"'{tmp_path}/an expert'\"'\"'s'"
    assert {section: entry.command for section, entry in found.missing.items()} == {
        "metrics": f"expertprune evaluate {quoted}",
        "alignment": f"expertprune evaluate {quoted} --suite general",
        "throughput": f"expertprune bench {quoted}",
        "relevance": f"expertprune profile SPEC --store {tmp_path}/empty",
    }
    assert "language/en, domain/medical, task/qa, general/general" in found.missing["relevance"].reason
    document = about(folder)
    document["spec"]["relevance"]["criterion"] = "magnitude"  # it sees no corpus, so no command fills this in
    (folder / "expertprune.json").write_text(json.dumps(document))
    found = report_of(folder, tiny_build[1])
    assert (found.relevance, found.missing["relevance"].command) == (None, None)


def test_a_plan_that_was_made_without_the_criterions_pass_lacks_no_profile(spec_data: Data, tmp_path: Path) -> None:
    """Of whole layers alone: their profiles have no backward pass, and no command would make one."""
    spec_data |= {"budget": {"layers": 1}, "relevance": {"criterion": "fisher"}, "evaluate": {"enabled": False}}
    (tmp_path / "layers.yaml").write_text(json.dumps(spec_data))
    folder = expertprune.build(tmp_path / "layers.yaml", tmp_path / "expert", store=tmp_path / "store")
    found = report_of(folder, tmp_path / "store")
    assert [corpus.stored for corpus in found.provenance.corpora] == [True] * 4
    assert (found.relevance, found.missing["relevance"].command) == (None, None)
    assert "fisher has not scored any" in found.missing["relevance"].reason


def test_what_cannot_be_read_is_left_out_or_refused(tiny_build: Build, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_build[1], tmp_path / "store"))
    folder = copied(tiny_build, tmp_path / "e")
    profile = about(folder)["plan"]["profiles"]["task/qa"]
    (store / "profiles" / f"{profile}.safetensors").write_bytes(b"no profile")
    found = report_of(folder, store)
    assert found.relevance is None
    assert "no profile of task/qa that" in found.missing["relevance"].reason
    assert [corpus.stored for corpus in found.provenance.corpora] == [True, True, False, True]
    timings = {"[]": "throughput.json: is no timing", json.dumps(throughput(limit="much")): "limit: must be a number"}
    for timing, error in timings.items():
        (folder / "throughput.json").write_text(timing)
        with pytest.raises(CheckpointError, match=error):
            report_of(folder, store)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        report_of(folder, store)


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


def test_an_expert_that_lost_no_whole_layer_has_them_all(tiny_build: Build, spec_data: Data, tmp_path: Path) -> None:
    spec_data |= {"budget": {"layers": 1}, "evaluate": {"enabled": False}}
    (tmp_path / "layers.yaml").write_text(json.dumps(spec_data))
    folder = expertprune.build(tmp_path / "layers.yaml", tmp_path / "expert", store=tmp_path / "store")
    found = lineup([report_of(*tiny_build), report_of(folder, tmp_path / "store")])
    (layers,) = (row for row in found.structures if row.label == "whole layers")
    assert [cell and (cell.kept, cell.units) for cell in layers.cells] == [(3, 3), (2, 3)]


def test_other_bases_tokenizers_and_documents_are_told(tiny_build: Build, tmp_path: Path) -> None:
    first = report_of(*tiny_build)

    def reasons(name: str, **changes: Any) -> dict[tuple[str, str], tuple[str | None, str | None]]:
        found = lineup([first, report_of(copied(tiny_build, tmp_path / name, **changes), tiny_build[1])])
        assert any("different bases" in note for note in found.notes) == ("base" in changes)
        return {(row.name, row.label): (row.values, row.retention) for row in found.rows}

    base, kl = about(tiny_build[0])["base"] | {"digest": "another"}, ("task/qa", "KL to base, bits/token")
    tokens = reasons("tokens", base=base | {"model": "other", "tokenizer_digest": "another"})
    assert tokens["task/qa", "bits per byte"] == (None, "relative to different bases")
    assert tokens["task/qa", "perplexity"] == ("different tokenizers", "different tokenizers")
    assert tokens[kl][0] == "different tokenizers"
    weights = reasons("weights", base=base)
    assert weights["task/qa", "perplexity"][0] is None
    assert weights[kl][0] == "compared with different bases"
    evaluation = about(tiny_build[0])["evaluation"]
    evaluation["corpora"]["task/qa"]["per_document"][0]["digest"] = "another"
    unlike = reasons("documents", evaluation=evaluation)
    notes = lineup([first, report_of(tmp_path / "documents", tiny_build[1])]).notes
    assert [note.partition(";")[0] for note in notes[1:]] == ["The expert retentions are of different documents"]
    assert {name for (name, _), reason in unlike.items() if reason[0] == "not the same documents"} == {"task/qa"}
