"""How much each corpus counts where their text is pooled. No model."""

from __future__ import annotations

from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.spec.schema import Spec


def corpus_shares(spec: Spec) -> dict[CorpusName, float]:
    """The share of each corpus in the repair's text, whatever its number of tokens; they sum to 1.

    The general corpora share `compensation.general` equally, and the dimensions share the rest
    equally. Within a dimension, its values share equally. Without general corpora the dimensions
    have all.
    """
    chosen, names = spec.dimensions.chosen, corpus_names(spec)
    general = spec.compensation.general if spec.general else 0.0
    return {
        name: general / len(spec.general)
        if name.is_general
        else (1 - general) / len(chosen) / len(getattr(spec.dimensions, name.dimension))
        for name in names
    }
