"""Headers of profiles that tests make up."""

from __future__ import annotations

from collections.abc import Sequence

from expertprune.artifacts.profile import ProfileAbout, ProfileKey
from expertprune.units import LayerShape

KEY = ProfileKey("m", "t", "c", 32, "float32", "cpu", "sdpa", {"torch": "2", "transformers": "5"}, "s")


def made_up_about(
    digest: str = "d",
    corpus: str = "domain/law",
    documents: Sequence[str] = (),
    tokens: int = 0,
    layers: Sequence[LayerShape] = (),
) -> ProfileAbout:
    return ProfileAbout(
        digest=digest,
        key=KEY,
        base="nowhere",
        corpus=corpus,
        documents=list(documents),
        tokens=tokens,
        layers=list(layers),
    )
