"""Suites as YAML: what is valid, what a suite says of an expert, and those that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertprune.corpora.catalogue import catalogue_sources
from expertprune.corpora.documents import Corpus, Document
from expertprune.corpora.leaks import Examples, LeakGuard
from expertprune.corpora.loading import load_corpora
from expertprune.errors import SpecError
from expertprune.evaluation.harness import tasks as harness
from expertprune.evaluation.suites import TaskEntry, bare_task, find_suite, find_suites, load_suite, shipped_suites
from expertprune.files import shipped
from expertprune.spec.reading import load_spec
from expertprune.spec.schema import Dimensions

FOLDER = shipped("profiles") / "suites"
HUB = ["arc", "boolq", "gsm8k", "hellaswag", "medmcqa", "mgsm", "mmlu", "piqa", "pubmedqa", "rte", "sst2", "winogrande",
       "xquad"]  # fmt: skip


def write(folder: Path, data: Any, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_a_suite_hands_on_what_it_says_to_tasks_that_say_nothing_themselves(tmp_path: Path) -> None:
    write(tmp_path, {"task": "local"}, "local.yaml")
    tasks = [{"name": "a"}, {"name": "b", "group": "general"}, {"file": "local.yaml", "measures": "task/math"}]
    suite = load_suite(write(tmp_path, {"name": "mine", "measures": ["domain/medical"], "tasks": tasks}))
    assert [(entry.label, entry.group, entry.measures) for entry in suite.tasks] == [
        ("a", None, ["domain/medical"]),
        ("b", "general", []),
        ("local", None, ["task/math"]),
    ]
    assert suite.tasks[2].file == str(tmp_path / "local.yaml")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "x"}, ["names nothing to measure: give perplexity, tasks or generation"]),
        ({"tasks": [{"name": "a"}]}, ["missing key 'name'"]),
        ({"name": "x", "task": [{"name": "a"}]}, ["unknown key 'task'; did you mean 'tasks'?"]),
        ({"name": "x", "tasks": [{"nam": "a"}]}, ["unknown key 'tasks.0.nam'; did you mean 'name'?"]),
        ({"name": "x", "tasks": [{"name": "a", "file": "b"}]}, ["tasks.0: give exactly one of 'name' and 'file'"]),
        ({"name": "x", "tasks": [{"name": "a", "chance": 1}]}, ["tasks.0.chance: must be less than 1"]),
        ({"name": "x", "tasks": [{"name": "a", "group": "other"}]}, ["tasks.0.group: must be 'expert' or"]),
        ({"name": "x", "measures": "medical", "perplexity": {}}, ["measures: 'medical' is not one of language, "]),
        ({"nme": "x", "tasks": [{"chance": 3, "name": "a"}]}, ["missing key 'name'", "'nme'", "tasks.0.chance"]),
        ({"name": "x", "alignment": True, "tasks": [{"name": "a"}]}, ["alignment is measured on the documents of"]),
        ({"name": "x", "perplexity": {"corpus": "a"}}, ["unknown key 'perplexity.corpus'; did you mean 'corpora'?"]),
        ({"name": "x", "tasks": [{"file": "no.yaml"}]}, ["tasks.0.file: ", "no.yaml: no such file"]),
        ({"name": "x", "tasks": [{"file": "none.yaml"}]}, ["none.yaml: is no task of lm-evaluation-harness"]),
        (["a"], ["a suite is a mapping of keys"]),
        ("name: [", ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_said_with_its_key(tmp_path: Path, data: Any, expected: list[str]) -> None:
    write(tmp_path, {"dataset_path": "json"}, "none.yaml")
    with pytest.raises(SpecError) as error:
        load_suite(write(tmp_path, data))
    found = "\n".join(error.value.problems)
    assert all(text in found for text in expected), found


def test_the_digest_covers_the_suite_and_its_task_files_but_not_their_place(tmp_path: Path) -> None:
    def digest(folder: str, **changes: Any) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        write(place, {"task": "t", **changes.pop("task", {})}, "t.yaml")
        return load_suite(write(place, {"name": "x", "tasks": [{"file": "t.yaml"}], **changes})).digest

    first = digest("one")
    assert digest("two") == first
    assert digest("two", group="general") != first
    assert digest("two", task={"num_fewshot": 3}) != first


@pytest.mark.parametrize(
    ("measures", "group"),
    [
        ("", "general"),
        ("domain/medical", "expert"),
        ("domain/legal", "general"),
        ("language/de", "general"),
        ("language/en task/qa", "expert"),
        ("language/en task/math", "general"),
        ("domain/legal domain/medical", "expert"),
    ],
)
def test_a_task_counts_as_expert_unless_it_measures_another_value(measures: str, group: str) -> None:
    dimensions = Dimensions.model_validate({"language": "en", "domain": "medical", "task": "qa"})
    entry = TaskEntry(name="a", measures=measures.split())
    assert entry.group_for(dimensions) == group
    assert entry.model_copy(update={"group": "general"}).group_for(dimensions) == "general"
    english = Dimensions.model_validate({"language": "en"})  # other dimensions do not matter
    assert entry.group_for(english) == ("expert" if "language/en" in measures else "general")


def test_the_shipped_suites_are_those_of_the_hub_and_a_local_one_for_every_value_that_ships() -> None:
    values = {name.value: name for name in catalogue_sources(shipped("corpora"))}
    assert sorted(shipped_suites()) == sorted([*values, *HUB])
    for stem, path in shipped_suites().items():
        suite = load_suite(path)
        assert suite.name == stem
        assert path.read_text(encoding="utf-8").startswith("# ")
        if name := values.get(stem):
            assert suite.perplexity is not None
            assert suite.perplexity.corpora == ([name.value] if name.is_general else [str(name)])
            assert suite.measures == ([] if name.is_general else [str(name)])
            assert (suite.group == "general") == name.is_general
            assert all(entry.file is not None for entry in (*suite.tasks, *suite.generation))
    suites = find_suites(list(shipped_suites()))  # no task has the name of another
    assert sum(len(suite.tasks) + len(suite.generation) for suite in suites) > 50
    entry, known = bare_task("gsm8k")  # a task by its name alone comes with what its suite says
    assert (entry.filter, entry.measures, known) == ("flexible-extract", ["task/math"], "gsm8k")
    assert bare_task("triviaqa") == (TaskEntry(name="triviaqa"), "")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "data" / name).read_text(encoding="utf-8").splitlines()]


TEXTS = sorted(str(name) for name, source in catalogue_sources(shipped("corpora")).items() if not source.chat)


@pytest.mark.parametrize("key", TEXTS)
def test_the_right_choice_goes_on_in_a_document_and_the_others_are_from_other_documents(key: str) -> None:
    path = shipped("corpora") / f"{key}.evaluation.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    found = rows(f"{key.split('/')[1]}.continuation.jsonl")
    assert len(found) >= 36
    for row in found:
        (own,) = [text for text in texts if text.startswith(row["context"])]
        right = row["choices"][row["answer"]]
        assert own[len(row["context"]) :].startswith(right)
        wrong = [choice for choice in row["choices"] if choice != right]
        assert len(wrong) == 3
        assert all(any(choice in text for text in texts if text != own) for choice in wrong)
    assert {row["answer"] for row in found} == {0, 1, 2, 3}


def test_questions_on_medicine_are_those_of_the_corpus() -> None:
    corpus = (shipped("corpora") / "task" / "qa.questions.jsonl").read_text(encoding="utf-8").splitlines()
    medical = [row for row in map(json.loads, corpus) if row.pop("domain") == "medical"]
    assert [{k: row[k] for k in ("question", "choices", "answer")} for row in medical] == rows(
        "medical.questions.jsonl"
    )
    assert len(medical) == 60


def test_problems_and_reviews_are_balanced_and_told_apart() -> None:
    problems, reviews = rows("math.problems.jsonl"), rows("sentiment.reviews.jsonl")
    assert len({row["question"] for row in problems}) == len({row["text"] for row in reviews}) == 40
    assert all(row["answer"].isdigit() for row in problems)
    assert sum(row["label"] for row in reviews) == 20


def test_no_shipped_question_calibrates_a_shipped_expert() -> None:
    calibration: dict[str, Document] = {}
    for path in sorted(shipped("profiles").glob("*.yaml")):
        corpora: list[Corpus] = list(load_corpora(load_spec(path)).values())
        calibration |= {document.digest: document for corpus in corpora for document in corpus.calibration}
    sets = []
    for path in sorted((FOLDER / "data").glob("*.jsonl")):
        texts = [[Document(value) for value in row.values() if isinstance(value, str)] for row in rows(path.name)]
        sets.append(Examples(path.name, "examples", texts))
    assert LeakGuard(calibration.values()).problems(*sets) == []


@pytest.mark.slow  # it reads all of its tasks, 12 s
def test_the_harness_knows_every_task_of_the_hub_suites_and_what_is_reported_of_it() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    entries = [
        (entry, key) for name in HUB for key in ("tasks", "generation") for entry in getattr(find_suite(name), key)
    ]
    harness.check_names([entry for entry, _ in entries])
    index = harness._manager(True).task_index
    for entry, key in entries:
        assert (harness.output_type(entry) == "generate_until") == (key == "generation"), entry.name
        found = index[entry.name]
        path = index["mmlu_anatomy"].yaml_path if entry.name == "mmlu" else found.yaml_path
        config = load_yaml(path, resolve_func=False)
        assert entry.metric in [metric["metric"] for metric in config["metric_list"]], entry.name
        filters = [each["name"] for each in config.get("filter_list", [])]
        assert entry.filter is None or entry.filter in filters, entry.name
