"""The specs that ship: each is valid, names corpora that exist, and is a use case of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertprune.arch import bundled_models
from expertprune.composition.defaults import AUTO
from expertprune.composition.scoring import check_criterion
from expertprune.corpora.catalogue import find_sources
from expertprune.corpora.loading import load_corpora
from expertprune.files import shipped
from expertprune.spec.reading import load_spec

PATHS = sorted(shipped("profiles").glob("*.yaml"))
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


@each
def test_a_shipped_spec_loads_under_the_name_of_its_file(path: Path) -> None:
    assert load_spec(path).name == path.stem


@each
def test_the_corpora_of_a_shipped_spec_are_found_and_hold_documents(path: Path) -> None:
    spec = load_spec(path)
    assert set(find_sources(spec)) == set(load_corpora(spec))
    for name, corpus in load_corpora(spec).items():
        assert corpus.calibration, name
        assert corpus.evaluation, name


@each
def test_a_shipped_spec_names_a_known_criterion_and_a_base_that_is_no_path_of_ours(path: Path) -> None:
    spec = load_spec(path)
    if spec.relevance.criterion != AUTO:
        check_criterion(spec.relevance.criterion)
    assert spec.base.model in bundled_models() or spec.base.model.count("/") == 1
    assert not spec.base.trust_remote_code


@each
def test_a_shipped_spec_says_in_its_first_line_what_it_is_for(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_there_are_at_least_eight_specs_and_no_two_say_the_same() -> None:
    assert len(PATHS) >= 8
    contents = []
    for path in PATHS:
        document = load_spec(path).document()
        document.pop("name")
        contents.append(json.dumps(document, sort_keys=True))
    assert len(set(contents)) == len(contents)


def test_the_specs_show_one_two_and_three_dimensions_and_several_values_of_one() -> None:
    chosen = [load_spec(path).dimensions.chosen for path in PATHS]
    assert {len(dimensions) for dimensions in chosen} == {1, 2, 3}
    assert any(len(values) > 1 for dimensions in chosen for values in dimensions.values())
