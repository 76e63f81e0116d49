"""`list`, `families` and `init`: what they name is what ships, and what a spec or a suite accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expertprune.arch import bundled_models, families
from expertprune.corpora.catalogue import catalogue_sources
from expertprune.evaluation.suites import shipped_suites
from expertprune.files import shipped
from expertprune.relevance import criteria
from expertprune.spec.reading import load_spec
from tests.calling import call, call_json
from tests.tiny import save_tiny

KINDS = {
    "corpora": lambda: list(map(str, catalogue_sources(shipped("corpora")))),
    "suites": shipped_suites,
    "criteria": lambda: criteria,
    "models": bundled_models,
}


def listed(kind: str) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in call_json("list", kind)[kind]}


def test_every_name_is_listed_with_how_much_it_has_and_what_it_needs() -> None:
    for kind, names in KINDS.items():
        assert set(listed(kind)) == set(names())
        table = call("list", kind).output
        assert all(name in table for name in names())
    corpora, suites, scores = listed("corpora"), listed("suites"), listed("criteria")
    sizes = {name: (entry["calibration"], entry["evaluation"], entry["questions"]) for name, entry in corpora.items()}
    assert (sizes.pop("general/general"), sizes.pop("task/qa")) == ((216, 32, 0), (24, 8, 120))
    assert set(sizes.values()) == {(24, 8, 0)}
    assert corpora["language/de"]["about"] == "German over nine domains and six tasks"
    assert (suites["mmlu"]["hub"], suites["medical"]["hub"]) == (True, False)
    assert suites["medical"]["tasks"] == ["medical_continuation", "medical_questions"]
    assert [scores[name]["pass"] for name in ("fisher", "impact", "magnitude")] == ["gradient", "forward", "none"]
    assert "corpora" in call("list", "famlies", code=2).output


def test_every_family_is_listed_with_what_it_allows() -> None:
    entries = {entry["family"]: entry for entry in call_json("families")["families"]}
    assert set(entries) == {family.family for family in families().values()}
    assert (entries["olmo2"]["structures"], entries["olmo2"]["vllm_routes"]) == (["ffn"], {})
    assert "q_norm and k_norm" in entries["olmo2"]["why_no_heads"]
    assert entries["llama"]["structures"] == ["ffn", "query_heads", "kv_groups"]
    served = {name for name, entry in entries.items() if entry["layer_widths"]["vllm"]}
    assert served == {"gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3"}
    table = call("families").output
    assert all(name in table for name in entries)


def test_a_listed_model_is_checked(tmp_path: Path) -> None:
    absent, folder = tmp_path / "absent", save_tiny(tmp_path / "model", "olmo2")
    assert f"error: --check: {absent}: no such folder" in call("families", "--check", absent, code=2).output
    assert "--trust-remote-code goes with --check" in call("families", "--trust-remote-code", code=2).output
    checked = " ".join(call("families", "--check", folder).output.replace(str(folder), "").split())
    assert "family olmo2 (listed); cutting equals masking: ffn, widths of single layers" in checked


# --- init -----------------------------------------------------------------------------------------------------------

SHIPPED = sorted(shipped("profiles").glob("*.yaml"))
OWN = ["english-math-own-corpus.yaml", "data/word-problems.jsonl"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_copy_of_every_shipped_spec_stands_alone(here: Path) -> None:
    """It reads the same, and the files that it names lie beside it, not in the installed package."""
    for spec in SHIPPED:
        call("init", spec.stem, "--out", f"{spec.stem}/expert.yaml")
        copy = here / spec.stem / "expert.yaml"
        assert copy.read_bytes() == spec.read_bytes()
        for source in load_spec(copy).corpora.sources.values():
            for file in (*(source.path or []), *(source.evaluation or [])):
                assert Path(file).is_relative_to(here)
                assert Path(file).is_file()
    assert call_json("init", "english-math-own-corpus")["files"] == OWN
    assert (here / OWN[1]).read_bytes() == (shipped("profiles") / OWN[1]).read_bytes()


@pytest.mark.parametrize("there", OWN)
def test_nothing_is_overwritten_and_then_nothing_is_written(here: Path, there: str) -> None:
    (here / "data").mkdir()
    (here / there).write_text("mine")
    assert f"{there}: exists already" in call("init", "english-math-own-corpus", code=2).stderr
    assert [str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()] == [there]
    assert (here / there).read_text() == "mine"


def test_without_a_name_the_specs_are_listed(here: Path) -> None:
    listed = call_json("init")["specs"]
    assert [entry["name"] for entry in listed] == [path.stem for path in SHIPPED]
    assert all(entry["about"].endswith(".") for entry in listed)
    assert "--out goes with a NAME" in call("init", "--out", "x.yaml", code=2).stderr
    assert "unknown spec 'germen'; did you mean 'german'?" in call("init", "germen", code=2).stderr
    assert list(here.iterdir()) == []
