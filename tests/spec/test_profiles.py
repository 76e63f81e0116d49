"""The specs that ship: each is valid, names corpora that exist, and is a use case of its own."""

from __future__ import annotations

import json

from expertprune.arch import bundled_models
from expertprune.composition.defaults import AUTO
from expertprune.composition.scoring import check_criterion
from expertprune.corpora.loading import load_corpora
from expertprune.files import shipped
from expertprune.spec.reading import load_spec


def test_the_shipped_specs_are_valid_and_differ_and_show_what_dimensions_are_for() -> None:
    """A name is its file's, corpora hold documents, a criterion is known, and a base is no path of ours."""
    documents, chosen = [], []
    for path in sorted(shipped("profiles").glob("*.yaml")):
        spec = load_spec(path)
        assert spec.name == path.stem
        for name, corpus in load_corpora(spec).items():
            assert corpus.calibration, f"{path}: {name}"
            assert corpus.evaluation, f"{path}: {name}"
        if spec.relevance.criterion != AUTO:
            check_criterion(spec.relevance.criterion)
        assert spec.base.model in bundled_models() or spec.base.model.count("/") == 1, path
        assert not spec.base.trust_remote_code, path
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# "), path
        documents.append(json.dumps({**spec.document(), "name": ""}, sort_keys=True))
        chosen.append(spec.dimensions.chosen)
    assert len(set(documents)) == len(documents) >= 8
    assert {len(dimensions) for dimensions in chosen} == {1, 2, 3}
    assert any(len(values) > 1 for dimensions in chosen for values in dimensions.values())
