"""`expertprune list`: what it names is what ships, and what a spec or a suite accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from expertprune.arch import bundled_models
from expertprune.cli import main
from expertprune.corpora.catalogue import catalogue_sources
from expertprune.evaluation.suites import shipped_suites
from expertprune.files import shipped
from expertprune.relevance import criteria

KINDS = {
    "corpora": lambda: list(map(str, catalogue_sources(shipped("corpora")))),
    "suites": shipped_suites,
    "criteria": lambda: criteria,
    "models": bundled_models,
}


def listed(kind: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(main, ["list", kind, "--json"])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return {record["name"]: record for record in json.loads(result.output)[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_listed_for_machines_and_for_people(kind: str) -> None:
    assert set(listed(kind)) == set(KINDS[kind]())
    table = CliRunner().invoke(main, ["list", kind])
    assert table.exit_code == 0
    assert all(name in table.output for name in KINDS[kind]())


def test_corpora_say_how_much_text_they_have() -> None:
    """The catalogue's own comment: 24 calibration and 8 evaluation documents each."""
    corpora = listed("corpora")
    assert {(entry["calibration"], entry["evaluation"]) for entry in corpora.values()} == {(24, 8)}
    assert [name for name, entry in corpora.items() if entry["questions"]] == ["task/qa"]
    assert corpora["language/de"]["about"] == "German over nine domains and six tasks"


def test_suites_say_whether_they_need_the_hub() -> None:
    suites = listed("suites")
    assert suites["mmlu"]["hub"] is True
    assert suites["medical"]["hub"] is False
    assert suites["medical"]["tasks"] == ["medical_continuation", "medical_questions"]


def test_criteria_say_which_pass_they_need() -> None:
    passes = {name: entry["pass"] for name, entry in listed("criteria").items()}
    assert (passes["fisher"], passes["impact"], passes["magnitude"]) == ("gradient", "forward", "none")


def test_an_unknown_kind_is_refused() -> None:
    result = CliRunner().invoke(main, ["list", "famlies"])
    assert result.exit_code == 2
    assert "corpora" in result.output
