"""`expertprune list`: what it names is what ships, and what a spec or a suite accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from expertprune.arch import bundled_models
from expertprune.corpora.catalogue import catalogue_sources
from expertprune.evaluation.suites import shipped_suites
from expertprune.files import shipped
from expertprune.relevance import criteria
from tests.calling import call

KINDS = {
    "corpora": lambda: list(map(str, catalogue_sources(shipped("corpora")))),
    "suites": shipped_suites,
    "criteria": lambda: criteria,
    "models": bundled_models,
}


def listed(kind: str) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in json.loads(call("list", kind, "--json").output)[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_listed_for_machines_and_for_people(kind: str) -> None:
    assert set(listed(kind)) == set(KINDS[kind]())
    table = call("list", kind).output
    assert all(name in table for name in KINDS[kind]())


def test_corpora_say_how_much_text_they_have() -> None:
    """The catalogue's own comment: 24 calibration and 8 evaluation documents each, and more of general text."""
    corpora = listed("corpora")
    sizes = {name: (entry["calibration"], entry["evaluation"]) for name, entry in corpora.items()}
    assert sizes.pop("general/general") == (216, 32)
    assert set(sizes.values()) == {(24, 8)}
    assert [name for name, entry in corpora.items() if entry["questions"]] == ["task/qa"]
    assert corpora["language/de"]["about"] == "German over nine domains and six tasks"


def test_suites_and_criteria_say_what_they_need() -> None:
    suites, criteria_ = listed("suites"), listed("criteria")
    assert (suites["mmlu"]["hub"], suites["medical"]["hub"]) == (True, False)
    assert suites["medical"]["tasks"] == ["medical_continuation", "medical_questions"]
    passes = [criteria_[name]["pass"] for name in ("fisher", "impact", "magnitude")]
    assert passes == ["gradient", "forward", "none"]


def test_an_unknown_kind_is_refused() -> None:
    assert "corpora" in call("list", "famlies", code=2).output
