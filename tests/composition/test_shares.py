"""What each corpus counts in the repair."""

from __future__ import annotations

from typing import Any

import pytest

from expertprune.composition.shares import corpus_shares
from expertprune.spec.schema import Spec


def shares(general: list[str], part: float, **dimensions: Any) -> dict[str, float]:
    spec = Spec.model_validate(
        {
            "name": "any",
            "base": "any",
            "dimensions": dimensions,
            "general": general,
            "budget": {"ffn": 0.25},
            "compensation": {"general": part},
        }
    )
    return {str(name): share for name, share in corpus_shares(spec).items()}


def test_dimensions_share_what_general_corpora_leave() -> None:
    found = shares(["general", "chat"], 0.4, language=["de", "en"], domain="medical")
    assert found == {
        "language/de": pytest.approx(0.15),
        "language/en": pytest.approx(0.15),
        "domain/medical": pytest.approx(0.3),
        "general/general": pytest.approx(0.2),
        "general/chat": pytest.approx(0.2),
    }


def test_without_general_corpora_the_dimensions_have_all() -> None:
    assert shares([], 0.4, task=["qa", "math"]) == {"task/qa": 0.5, "task/math": 0.5}
