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

HUB = ["arc", "boolq", "gsm8k", "hellaswag", "medmcqa", "mgsm", "mmlu", "piqa", "pubmedqa", "rte", "sst2", "winogrande",
       "xquad"]  # fmt: skip


def write(folder: Path, data: Any, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_suite_hands_on_what_it_says_to_tasks_that_say_nothing_themselves(tmp_path: Path) -> None:
    write(tmp_path, {"task": "local"}, "local.yaml")
    tasks: list[dict[str, Any]] = [{"name": "a"}, {"name": "b", "group": "general", "chat": False}]
    tasks.append({"file": "local.yaml", "measures": "task/math"})
    about = {"name": "mine", "measures": ["domain/medical"], "chat": True}
    suite = load_suite(write(tmp_path, {**about, "tasks": tasks}))
    own, general, local = ((entry.label, entry.group, entry.measures, entry.chat) for entry in suite.tasks)
    assert own == ("a", None, ["domain/medical"], True)
    assert general == ("b", "general", [], False)
    assert local == ("local", None, ["task/math"], True)
    assert suite.tasks[2].file == str(tmp_path / "local.yaml")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "x"}, ["names nothing to measure: give perplexity, tasks or generation"]),
        ({"name": "x", "tasks": [{"name": "a", "file": "b"}]}, ["tasks.0: give exactly one of 'name' and 'file'"]),
        ({"name": "x", "tasks": [{"name": "a", "group": "other"}]}, ["tasks.0.group: must be 'expert' or"]),
        ({"name": "x", "measures": "medical", "perplexity": {}}, ["measures: 'medical' is not one of language, "]),
        ({"nme": "x", "tasks": [{"chance": 3, "name": "a"}]}, ["missing key 'name'", "'nme'", "tasks.0.chance"]),
        ({"name": "x", "alignment": True, "tasks": [{"name": "a"}]}, ["alignment is measured on the documents of"]),
        ({"name": "x", "tasks": [{"file": "no.yaml"}]}, ["tasks.0.file: ", "no.yaml: no such file"]),
        ({"name": "x", "tasks": [{"file": "none.yaml"}]}, ["none.yaml: is no task of lm-evaluation-harness"]),
        (["a"], ["a suite is a mapping of keys"]),
    ],
)
def test_what_is_wrong_is_said_with_its_key(tmp_path: Path, data: Any, expected: list[str]) -> None:
    write(tmp_path, {"dataset_path": "json"}, "none.yaml")
    with pytest.raises(SpecError) as error:
        load_suite(write(tmp_path, data))
    found = "\n".join(error.value.problems)
    assert all(text in found for text in expected), found


def test_the_digest_covers_the_suite_and_its_task_files_but_not_their_place(tmp_path: Path) -> None:
    def digest(folder: str, task: Any = None, **changes: Any) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        write(place, {"task": "t", "num_fewshot": task}, "t.yaml")
        return load_suite(write(place, {"name": "x", "tasks": [{"file": "t.yaml"}], **changes})).digest

    assert digest("one") == digest("two")
    assert len({digest("one"), digest("one", group="general"), digest("one", task=3)}) == 3


def test_a_task_counts_as_expert_unless_it_measures_another_value() -> None:
    dimensions = Dimensions.model_validate({"language": "en", "domain": "medical", "task": "qa"})
    english = Dimensions.model_validate({"language": "en"})  # other dimensions do not matter
    for measures, group in (("", "general"), ("domain/medical", "expert"), ("language/de", "general"),
                            ("language/en task/qa", "expert"), ("language/en task/math", "general"),
                            ("domain/legal domain/medical", "expert")):  # fmt: skip
        entry = TaskEntry(name="a", measures=measures.split())
        assert entry.group_for(dimensions) == group
        assert entry.model_copy(update={"group": "general"}).group_for(dimensions) == "general"
        assert entry.group_for(english) == ("expert" if "language/en" in measures else "general")


def test_the_shipped_suites_are_those_of_the_hub_and_a_local_one_for_every_value_that_ships() -> None:
    values = {name.value: name for name in catalogue_sources(shipped("corpora"))}
    assert sorted(shipped_suites()) == sorted([*values, *HUB])
    for stem, path in shipped_suites().items():
        suite = load_suite(path)
        assert suite.name == stem
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


def test_no_shipped_question_calibrates_a_shipped_expert() -> None:
    calibration: dict[str, Document] = {}
    for path in sorted(shipped("profiles").glob("*.yaml")):
        corpora: list[Corpus] = list(load_corpora(load_spec(path)).values())
        calibration |= {document.digest: document for corpus in corpora for document in corpus.calibration}
    sets = []
    for path in sorted((shipped("profiles") / "suites" / "data").glob("*.jsonl")):
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        texts = [[Document(value) for value in row.values() if isinstance(value, str)] for row in rows]
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
