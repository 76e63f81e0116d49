"""The expert's folder as an object: nothing of the machine that built it, and all that another one needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.arch import bundled_models
from expertprune.artifacts.expert import CorpusRecord, Expert, base_place, portable
from expertprune.errors import CheckpointError, SpecError
from expertprune.files import EXPERT_FILE
from expertprune.reporting.metadata import card_metadata
from expertprune.spec.reading import parse_spec, with_base
from tests.calling import parsed
from tests.experts import about, copied, described


def test_an_expert_is_read_back_and_no_file_of_it_names_a_place_of_the_builder(
    tiny_build: tuple[Path, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    folder, store = tiny_build
    expert, written = Expert.load(folder), (folder / EXPERT_FILE).read_text()
    replace(expert, folder=tmp_path).save()
    assert (tmp_path / EXPERT_FILE).read_text() == written
    corpora = {"language/en", "domain/medical", "task/qa", "general/general"}
    assert json.loads(written)["evaluation"]["corpora"].keys() == corpora
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            assert not [place for place in (folder.parent, store, tiny_llama.parent) if str(place) in text], path
    assert (expert.base.model, expert.spec.base.model, expert.plan.base.model) == ("llama",) * 3
    assert expert.spec.corpora.sources["medical"].path == ["medical.jsonl"]


def test_files_of_one_name_keep_the_folders_that_tell_them_apart(tmp_path: Path) -> None:
    sources = {
        "en": {"path": ["/data/en/train.jsonl", "/data/en/more.jsonl"], "evaluation": "/data/en/test.jsonl"},
        "law": {"path": "/home/me/law/train.jsonl", "questions": "/home/me/law/test.jsonl"},
        "shop": {"dataset": "/home/me/data/shop"},
        "rows": {"dataset": "/home/me/law/rows", "evaluation_split": "test"},
        "more": {"dataset": "/data/en/rows"},
        "hub": {"dataset": "owner/data"},
    }
    data = {"name": "n", "base": "/models/mine", "dimensions": {"language": "en", "domain": "law"}, "budget": {"ffn": 0.5},
            "corpora": {"catalogue": "/home/me/catalogue", "sources": sources}}  # fmt: skip
    plan = portable(replace(described(tmp_path).plan, spec=parse_spec(data, "spec", tmp_path).document()))
    assert plan.spec["corpora"]["catalogue"] == "catalogue"
    english, law = (plan.spec["corpora"]["sources"][name] for name in ("en", "law"))
    assert (english["path"], english["evaluation"]) == (["en/train.jsonl", "more.jsonl"], ["en/test.jsonl"])
    assert (law["path"], law["questions"]) == (["law/train.jsonl"], "law/test.jsonl")
    kept = {name: plan.spec["corpora"]["sources"][name]["dataset"] for name in ("shop", "rows", "more", "hub")}
    assert kept == {"shop": "./shop", "rows": "./law/rows", "more": "./en/rows", "hub": "owner/data"}
    assert card_metadata(replace(described(tmp_path), plan=plan)).datasets == ["owner/data"]
    assert portable(plan) == plan
    # One whose whole path is the end of another's.
    law_source = {**sources["law"], "path": "/mnt/data/en/train.jsonl"}
    data["corpora"] = {"sources": {"en": sources["en"], "law": law_source}}
    plan = portable(replace(described(tmp_path).plan, spec=parse_spec(data, "spec", tmp_path).document()))
    english, law = (plan.spec["corpora"]["sources"][name] for name in ("en", "law"))
    assert (english["path"][0], law["path"]) == ("data/en/train.jsonl", ["mnt/data/en/train.jsonl"])
    assert portable(plan) == plan


@pytest.fixture
def moved(tiny_build: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expert on another machine: an empty store, base and corpora in a folder of their own, another current folder."""
    for path in tiny_build[0].parent.glob("*.jsonl"):
        (tmp_path / "text").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "text")
    shutil.copytree(tiny_llama, tmp_path / "text" / "llama")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return copied(tiny_build, tmp_path / "there" / "expert")


def test_what_is_nowhere_is_named_with_what_to_give(
    moved: Path, store: Path, tiny_build: tuple[Path, Path], tiny_llama: Path
) -> None:
    expert = Expert.load(moved)
    with pytest.raises(SpecError) as found:
        expert.local_spec(store)
    assert len(found.value.problems) == 8  # four corpora, each with an evaluation split
    assert all("lies neither in the current folder nor beside" in problem for problem in found.value.problems)
    assert "--set corpora.sources.qa.evaluation=PATH" in str(found.value)
    with pytest.raises(CheckpointError, match="say where it is with --base"):
        expert.find_base(store)
    spec = expert.local_spec(tiny_build[1])  # the store that it was built with remembers where things lie
    assert spec.base.model == str(tiny_llama)
    assert spec.corpora.sources["qa"].path == [str(tiny_build[0].parent / "qa.jsonl")]


def test_the_current_folder_and_the_experts_are_looked_into(
    moved: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, expert = moved.parent.parent / "text", Expert.load(moved)
    for folder, current in ((text, text), (moved.parent, text.parent)):
        for path in list(text.iterdir()) if folder != text else ():
            path.rename(folder / path.name)
        monkeypatch.chdir(current)
        assert expert.local_spec(store).corpora.sources["qa"].path == [str(folder / "qa.jsonl")]
        assert expert.find_base(store).folder == folder / "llama"


def test_experts_of_one_plan_are_measured_on_the_documents_of_their_own_folders(tmp_path: Path) -> None:
    """Two copies of a project, with other evaluation documents: both experts have the same plan."""
    store, experts = tmp_path / "store", []
    for number in (0, 1):
        folder = tmp_path / f"project-{number}" / "data"
        folder.mkdir(parents=True)
        for name, text in (("train.txt", "the same"), ("test.txt", f"number {number}")):
            (folder / name).write_text(text)
        sources = {"mine": {"path": str(folder / "train.txt"), "evaluation": str(folder / "test.txt")}}
        data: dict[str, Any] = {"name": "n", "base": "/base", "dimensions": {"domain": "mine"}, "budget": {"ffn": 0.5},
                "corpora": {"sources": sources}}  # fmt: skip
        spec = parse_spec(data, "spec", tmp_path)
        expert = described(folder.parent / "experts" / "mine")
        experts.append(replace(expert, plan=portable(replace(expert.plan, spec=spec.document()))))
        experts[-1].remember_places(spec, store)
    for number, expert in enumerate(experts):
        assert expert.local_spec(store).corpora.sources["mine"].evaluation == [
            str(tmp_path / f"project-{number}/data/test.txt")
        ]
    moved = replace(experts[0], folder=tmp_path / "elsewhere" / "expert")
    with pytest.raises(SpecError, match=r"with --set corpora\.sources\.mine\.evaluation=PATH"):
        moved.local_spec(store)
    own = str(tmp_path / "project-0/data/test.txt")
    given = {"corpora.sources.mine.evaluation": own}
    assert moved.local_spec(store, given).corpora.sources["mine"].evaluation == [own]
    shutil.copy(tmp_path / "project-0/data/test.txt", tmp_path / "project-1/data/test.txt")
    assert moved.local_spec(store).corpora.sources["mine"].evaluation == [str(tmp_path / "project-1/data/test.txt")]


def test_an_expert_is_evaluated_elsewhere_but_with_no_other_base(
    moved: Path, store: Path, tiny_build: tuple[Path, Path]
) -> None:
    text = moved.parent.parent / "text"
    overrides: dict[str, Any] = {}
    for name in ("en", "medical", "qa", "general"):
        overrides[f"corpora.sources.{name}.path"] = f"../text/{name}.jsonl"
        overrides[f"corpora.sources.{name}.evaluation"] = str(text / f"{name}.evaluation.jsonl")
    found = expertprune.evaluate(moved, base=text / "llama", overrides=overrides).document()
    assert found["corpora"] == about(tiny_build[0])["evaluation"]["corpora"]
    expert = Expert.load(moved)
    base = expert.local_base(store, text / "llama")
    assert expert.find_base(store, base).digest == expert.base.digest
    other = replace(expert, base=expert.base.model_copy(update={"digest": "f" * 64}))
    with pytest.raises(CheckpointError, match=r"is not the base of this expert .* recorded ffffffffffff"):
        other.find_base(store, base)


def test_an_expert_in_a_folder_of_its_bases_name_is_not_its_base(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(bundled_models()))
    experts = [described(tmp_path / each) for each in (name, "mine")]
    for expert in experts:
        expert.folder.mkdir()
        expert.plan.spec["base"]["model"] = expert.folder.name
        expert.save()
        assert base_place(expert, expert.folder, store) == expert.folder.name
    found = [experts[0].local_spec(store, changes) for changes in ({}, {"base.model": name})]
    assert [spec.base.model for spec in found] == [name, name]
    given = [parsed(["expertprune", "evaluate", "x", "--base", base])["base"] for base in (name, f"./{name}")]
    assert given == [name, str(experts[0].folder)]
    folder = tmp_path / "models" / name  # a base that has the name too
    folder.mkdir(parents=True)
    experts[0].remember_places(with_base(experts[0].spec, model=str(folder)), store)
    assert base_place(experts[0], experts[0].folder, store) == str(folder)


def test_the_documents_of_all_ancestors_calibrated_an_expert(tmp_path: Path) -> None:
    def corpora(*digests: str) -> dict[str, CorpusRecord]:
        return {"language/en": CorpusRecord(digest="c", documents=list(digests))}

    eldest = described(tmp_path, "eldest", corpora=corpora("a"))
    middle = described(tmp_path, "middle", corpora=corpora("b"), ancestor=eldest.description)
    youngest = described(tmp_path, "youngest", corpora=corpora("c", "a"), ancestor=middle.description)
    youngest.save()
    read = Expert.load(tmp_path)
    assert [each.name for each in read.lineage] == ["youngest", "middle", "eldest"]
    assert read.calibration_digests == {"a", "b", "c"}
    assert middle.calibration_digests == {"a", "b"}


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"schema": 1}, "an expert of schema 1, and this version reads schema 2: build the expert again"),
    ({"base": {"model": "m"}}, "missing key 'base.digest'"),
    ({"corpora": {"language/en": {"digest": "c", "documents": [1]}}}, "corpora.language/en.documents.0"),
    ({"plan": 3}, "plan: must be a mapping"),
    ({"ancestor": {"kind": "expert"}}, f"{EXPERT_FILE}: ancestor: an expert of an older version"),
    ({"evaluation": {"corpora": {}}}, "damaged: evaluation: missing key 'settings'; evaluate the expert again"),
    ({"wrong": 1}, "unknown key 'wrong'"),
]


def test_a_damaged_description_is_named_with_its_key(tmp_path: Path) -> None:
    described(tmp_path).save()
    path = tmp_path / EXPERT_FILE
    whole = json.loads(path.read_text())
    for change, words in DAMAGE:
        path.write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError) as found:
            Expert.load(tmp_path)
        assert str(path) in str(found.value)
        assert words in str(found.value)


def test_a_spec_that_this_version_cannot_read_does_not_keep_the_expert_from_being_served(tmp_path: Path) -> None:
    expert = described(tmp_path)
    expert.plan.spec["budget"]["columns"] = 3
    expert.save()
    assert Expert.load(tmp_path) == expert
    with pytest.raises(CheckpointError, match=r"unknown key 'budget\.columns'"):
        _ = Expert.load(tmp_path).spec
