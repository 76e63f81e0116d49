"""No command replaces what it was not told to replace, and none writes over what it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import expertprune
from expertprune.artifacts.expert import Expert
from tests.calling import call
from tests.oracle import contents
from tests.patching import everywhere, read_only


def refused(folder: Path, *arguments: Any) -> str:
    """The message of a command that changes nothing in a folder."""
    before = contents(folder)
    message = call(*arguments, code=2).stderr
    assert contents(folder) == before
    return message


def test_a_build_never_replaces_its_base_or_the_base_of_its_base(
    tmp_path: Path, spec_data: dict[str, Any], tiny_llama: Path
) -> None:
    """Nor a folder in which one of its corpora lies, nor one that is no expert."""
    cuts_nothing = {"budget": {"ffn": 0}, "relevance": "random", "compensation": "none", "evaluate": {"enabled": False}}
    bases = {"first": tiny_llama, "second": tmp_path / "first", "third": tmp_path / "second"}
    for name, base in bases.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**spec_data, **cuts_nothing, "base": str(base)}))
        if name != "third":
            expertprune.build(tmp_path / f"{name}.yaml", tmp_path / name)
    third = tmp_path / "third.yaml"
    for out in ("first", "second"):
        message = refused(tmp_path, "build", third, "--out", tmp_path / out, "--overwrite")
        assert "the command reads" in message
        assert str(tmp_path / out) in message
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    for options, words in (((), "exists; choose another --out"), (("--overwrite",), "is no expert (it has no")):
        assert words in refused(tmp_path, "build", third, "--out", tmp_path / "thesis", *options)
    data = yaml.safe_load(third.read_text())
    shutil.copytree(tmp_path / "first", tmp_path / "other")
    source = data["corpora"]["sources"]["medical"]
    source["path"] = str(shutil.copy(source["path"], tmp_path / "other"))
    third.write_text(yaml.safe_dump(data))
    assert "the command reads" in refused(tmp_path, "build", third, "--out", tmp_path / "other", "--overwrite")


def test_a_plan_and_a_picture_never_replace_what_is_none(tmp_path: Path, spec_file: Path, warm: Path) -> None:
    composed = ("compose", spec_file, "--out")
    (tmp_path / "notes.txt").write_text("precious")
    assert "the command reads" in refused(tmp_path, *composed, spec_file, "--overwrite")
    assert "is no plan" in refused(tmp_path, *composed, tmp_path / "notes.txt", "--overwrite")
    call(*composed, tmp_path / "plan.json")
    assert "exists; choose another --out" in refused(tmp_path, *composed, tmp_path / "plan.json")
    call(*composed, tmp_path / "plan.json", "--overwrite", "--set", "budget.ffn=0.5")
    assert json.loads((tmp_path / "plan.json").read_text())["spec"]["budget"]["ffn"] == 0.5
    compared, picture = ("compare", spec_file, "--picture", tmp_path / "overlap.svg"), tmp_path / "overlap.svg"
    picture.write_text("precious")
    for options, words in (((), "exists; choose another --picture"), (("--overwrite",), "is no picture")):
        assert words in refused(tmp_path, *compared, *options)
    picture.write_text("<svg>")
    call(*compared, "--overwrite")
    assert len(picture.read_text()) > 1000


def test_an_export_and_a_report_never_replace_what_is_none(expert: Path) -> None:
    config = expert / "config.json"
    assert "exists" in refused(expert, "export", expert, "--out", config)
    assert "is no GGUF file" in refused(expert, "export", expert, "--out", config, "--overwrite")
    for options in ((), ("--overwrite",)):  # a name that a model's folder gives to other files
        out = expert / "model.safetensors"
        assert "a GGUF file ends in .gguf" in refused(expert, "export", expert, "--out", out, *options)
    assert "would then hold a second model" in refused(expert, "export", expert, "--out", expert / "model.gguf")
    page = expert / "report.html"
    page.write_text("<p>precious")
    for options in ((), ("--out", page, "--overwrite")):
        assert "is no page of expertprune" in refused(expert, "report", expert, *options)
    assert "exists" in refused(expert, "report", expert, "--out", page)
    page.unlink()
    call("report", expert)
    call("report", expert)  # its own page is made anew


def test_an_output_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, spec_file: Path, no_model: None
) -> None:
    long = "n" * 256
    for command, out in (("build", long), ("compose", long), ("compare", f"{long}.svg"), ("sweep", f"{long}.svg")):
        budgets = ("--budgets", "0.25") if command == "sweep" else ()
        option = "--out" if command in ("build", "compose") else "--picture"
        message = refused(tmp_path, command, spec_file, option, tmp_path / out, *budgets)
        assert "File name too long" in message


def test_an_evaluation_that_cannot_be_written_is_found_before_the_work(
    expert: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(expert.parent)
    Path("mine.yaml").write_text("{name: mine, perplexity: {}}")
    read_only(monkeypatch, expert)
    for options in ((), ("--suite", "mine.yaml")):
        assert "cannot be written: Read-only file system" in refused(expert, "evaluate", expert, *options)


def test_an_evaluation_is_never_written_into_another_expert(expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that took the place of the measured one meanwhile, as a build with --overwrite does."""
    other = json.loads((expert / "expertprune.json").read_text())
    other["plan"]["profiles"] = {}
    written = json.dumps(other)

    def measured(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        (expert / "expertprune.json").write_text(written)
        return result

    original = everywhere(monkeypatch, "expertprune.stages.evaluate.measure_folder", measured)
    assert "another expert took its place" in call("evaluate", expert, code=2).stderr
    assert (expert / "expertprune.json").read_text() == written


def test_outputs_lie_behind_symbolic_links(tmp_path: Path, spec_file: Path, warm: Path) -> None:
    """A folder that is a link takes what is written into it, and so does an expert's folder that is evaluated."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    call("compose", spec_file, "--out", tmp_path / "link" / "plan.json")
    call("build", spec_file, "--out", tmp_path / "link" / "expert")
    assert Expert.load(tmp_path / "disk" / "expert").evaluation is not None
    (tmp_path / "current").symlink_to(tmp_path / "disk" / "expert")
    call("evaluate", tmp_path / "current", "--documents", 1)
    measured = Expert.load(tmp_path / "current").evaluation
    assert measured is not None
    assert {each.documents for each in measured.corpora.values()} == {1}
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to("empty")
    assert "is a symbolic link, which is not replaced" in refused(
        tmp_path, "build", spec_file, "--out", tmp_path / "to-empty"
    )
