"""The specs that ship: each is valid, names corpora that exist, and is a use case of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertprune.arch import bundled_models
from expertprune.composition.defaults import AUTO
from expertprune.composition.scoring import check_criterion
from expertprune.corpora.loading import load_corpora
from expertprune.files import shipped
from expertprune.spec.reading import load_spec

PATHS = sorted(shipped("profiles").glob("*.yaml"))
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


@each
def test_a_shipped_spec_is_valid_and_says_what_it_is_for(path: Path) -> None:
    """Its name is the file's, its corpora hold documents, its criterion is known, and its base is no path of ours."""
    spec = load_spec(path)
    assert spec.name == path.stem
    for name, corpus in load_corpora(spec).items():
        assert corpus.calibration, name
        assert corpus.evaluation, name
    if spec.relevance.criterion != AUTO:
        check_criterion(spec.relevance.criterion)
    assert spec.base.model in bundled_models() or spec.base.model.count("/") == 1
    assert not spec.base.trust_remote_code
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_the_specs_differ_and_show_one_two_and_three_dimensions_and_several_values_of_one() -> None:
    documents = [load_spec(path).document() for path in PATHS]
    assert len({json.dumps({**each, "name": ""}, sort_keys=True) for each in documents}) == len(documents) >= 8
    chosen = [load_spec(path).dimensions.chosen for path in PATHS]
    assert {len(dimensions) for dimensions in chosen} == {1, 2, 3}
    assert any(len(values) > 1 for dimensions in chosen for values in dimensions.values())
