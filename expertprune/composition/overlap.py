"""How much the profiles of several corpora have in common: overlap of irrelevant units, rank
correlation, clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

from expertprune.artifacts.profile import Profile, ProfilePart
from expertprune.composition.scoring import corpus_score, unit_statistics
from expertprune.errors import SpecError
from expertprune.relevance import Criterion
from expertprune.units import Structure

Array = NDArray[np.float64]


CLUSTER_HEIGHT = 0.7  # where the dendrogram is cut, as a part of its height


@dataclass(frozen=True)
class ComparedCorpus:
    """Where one row of a comparison comes from."""

    name: str
    profile: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Clustering:
    """Average linkage of corpora (scipy's conventions).

    Attributes:
        dendrogram: `[corpora - 1, 4]`, one merge a row: the two that are merged (below `corpora`: a
            corpus, otherwise the merge of row `index - corpora`), their distance, and how many
            corpora they hold together.
        order: the corpora as the dendrogram's leaves, neighbours next to each other.
        clusters: the corpora of each flat cluster, in that order.
    """

    dendrogram: Array
    order: list[int]
    clusters: list[list[int]]


@dataclass(frozen=True)
class StructureComparison:
    """What corpora have in common in one structure; matrices are `[corpora, corpora]`.

    Attributes:
        units: how many units were compared, over all layers.
        irrelevant: how many of them are in the irrelevant set of each corpus.
        chance: the overlap of two independent sets of that size.
    """

    units: int
    irrelevant: int
    chance: float
    overlap: Array
    rank_correlation: Array
    clustering: Clustering


@dataclass(frozen=True)
class Comparison:
    """Every pair of corpora of one base, by structure."""

    base: dict[str, str]
    criterion: str
    aggregate: str | float
    fraction: float
    corpora: list[ComparedCorpus]
    structures: dict[Structure, StructureComparison]

    def document(self) -> dict[str, Any]:
        """Plain data; matrices in the order of `corpora`, order and clusters by name."""
        names = [corpus.name for corpus in self.corpora]
        return {
            "kind": "comparison",
            "base": self.base,
            "criterion": self.criterion,
            "aggregate": self.aggregate,
            "fraction": self.fraction,
            "corpora": [asdict(corpus) for corpus in self.corpora],
            "structures": {
                structure.value: {
                    "units": result.units,
                    "irrelevant": result.irrelevant,
                    "chance": result.chance,
                    "overlap": result.overlap.tolist(),
                    "rank_correlation": result.rank_correlation.tolist(),
                    "order": [names[index] for index in result.clustering.order],
                    "clusters": [[names[index] for index in cluster] for cluster in result.clustering.clusters],
                    "dendrogram": result.clustering.dendrogram.tolist(),
                }
                for structure, result in self.structures.items()
            },
        }


def relevance(
    profile: Profile,
    structure: Structure,
    criterion: Criterion,
    aggregate: str | float,
    part: ProfilePart | None = None,
) -> list[Array]:
    """The relevance of a structure's units on a corpus, layer by layer, `[units]`; empty where a layer has none.

    It is not scaled: within one layer and corpus every scale gives the same ranks, and only ranks
    are compared.
    """
    layers = []
    for layer, shape in enumerate(profile.layers):
        if not shape.units(structure):
            layers.append(np.empty(0))
            continue
        statistics = unit_statistics(profile, structure, layer, seed=0, part=part)
        layers.append(corpus_score(criterion, statistics, aggregate).double().numpy())
    return layers


def compare_structure(layers: Sequence[Array], fraction: float) -> StructureComparison | None:
    """Compare every pair of corpora in one structure.

    Args:
        layers: the relevance in each layer, `[corpora, units]`. Layers of a single unit leave
            nothing to choose and do not count.
        fraction: which part of a layer's units is irrelevant, at least one unit and not all of
        them.

    Returns:
        `None` where no layer has two units.
    """
    layers = [scores for scores in layers if scores.shape[1] > 1]
    if not layers:
        return None
    counts = [irrelevant_units(scores.shape[1], fraction) for scores in layers]
    correlation = rank_correlation(layers)
    return StructureComparison(
        units=sum(scores.shape[1] for scores in layers),
        irrelevant=sum(counts),
        chance=chance_overlap([scores.shape[1] for scores in layers], counts),
        overlap=overlap(layers, counts),
        rank_correlation=correlation,
        clustering=cluster(1 - correlation),
    )


def check_fraction(fraction: float) -> None:
    """Raises `SpecError` unless a fraction leaves an irrelevant and a relevant part."""
    if not 0 < fraction < 1:
        raise SpecError(f"fraction: {fraction} is not between 0 and 1; a quarter of each layer is 0.25")


def irrelevant_units(units: int, fraction: float) -> int:
    """The number of units nearest to a fraction of a layer, at least one and not all of them."""
    return min(units - 1, max(1, int(fraction * units + 0.5)))


def overlap(layers: Sequence[Array], counts: Sequence[int]) -> Array:
    """Jaccard index of the irrelevant sets, `|A ∩ B| / |A ∪ B|`, `[corpora, corpora]`.

    A corpus' set holds the `counts[l]` units of lowest relevance of each layer `l`; among equals
    the higher index is the less relevant one, as in composition. Intersections and unions are
    counted over the whole model.

    Args:
        layers: `[corpora, units]` each.
    """
    corpora = layers[0].shape[0]
    shared = np.zeros((corpora, corpora))
    for scores, count in zip(layers, counts, strict=True):
        member = irrelevant_sets(scores, count).astype(np.float64)
        shared += member @ member.T
    return shared / (2 * sum(counts) - shared)


def irrelevant_sets(scores: Array, count: int) -> NDArray[np.bool_]:
    """Which units are among the `count` least relevant of their layer, `[corpora, units]`; ties as
    in `overlap`.

    Args:
        scores: `[corpora, units]`.
    """
    descending = np.argsort(-scores, axis=1, kind="stable")
    member = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(member, descending[:, scores.shape[1] - count :], True, axis=1)
    return member


def chance_overlap(units: Sequence[int], counts: Sequence[int]) -> float:
    """The Jaccard index of independent sets that hold `counts[l]` of the `units[l]` of each layer
    `l`.

    The expected intersection over the expected union, `Σ k²/n / (2 Σ k − Σ k²/n)`; where `k = f n`
    in every layer this is `f / (2 − f)`.
    """
    shared = sum(count**2 / number for number, count in zip(units, counts, strict=True))
    return shared / (2 * sum(counts) - shared)


def rank_correlation(layers: Sequence[Array]) -> Array:
    """Spearman's rank correlation within each layer, averaged over layers by their units,
    `[corpora, corpora]`.

    Ties share the mean of their ranks. In a layer where a corpus finds all units equal there is no
    order to share, and the correlation counts as 0.

    Args:
        layers: `[corpora, units]` each.
    """
    corpora = layers[0].shape[0]
    total = np.zeros((corpora, corpora))
    for scores in layers:
        ranks = rankdata(scores, axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        norms = np.sqrt(np.square(ranks).sum(axis=1, keepdims=True))
        ranks /= np.where(norms > 0, norms, 1)
        total += scores.shape[1] * (ranks @ ranks.T)
    mean = total / sum(scores.shape[1] for scores in layers)
    mean = np.clip((mean + mean.T) / 2, -1, 1)
    np.fill_diagonal(mean, 1)
    return mean


def cluster(distance: Array) -> Clustering:
    """Average linkage of a distance matrix `[corpora, corpora]`, cut at 0.7 of the dendrogram's
    height.

    Corpora that are equally far from each other all stay alone: there are no groups where there are
    none.
    """
    condensed = squareform(distance, checks=False)
    dendrogram = linkage(condensed, method="average", optimal_ordering=True)
    order = [int(index) for index in leaves_list(dendrogram)]
    labels = fcluster(dendrogram, t=CLUSTER_HEIGHT * dendrogram[-1, 2], criterion="distance")
    clusters: dict[int, list[int]] = {}
    for index in order:
        clusters.setdefault(int(labels[index]), []).append(index)
    return Clustering(dendrogram, order, list(clusters.values()))


def compare_corpora(
    corpora: Mapping[ComparedCorpus, Profile],
    base: dict[str, str],
    criteria: Mapping[Structure, Criterion],
    aggregate: str | float,
    fraction: float,
    part: ProfilePart | None = None,
) -> Comparison:
    """Compare every pair of corpora in each structure that has a layer of two units or more.

    Args:
        corpora: two or more, with their profiles.
        criteria: by structure to compare; a structure that its criterion does not score is left out.
        fraction: which part of a layer's units is irrelevant, between 0 and 1.
        part: the part of the profiles that the criteria need (see `scoring.needed_part`).
    """
    results = {}
    for structure, criterion in criteria.items():
        units = any(layer.units(structure) for profile in corpora.values() for layer in profile.layers)
        if not units or structure not in criterion.structures:
            continue
        by_corpus = [relevance(profile, structure, criterion, aggregate, part) for profile in corpora.values()]
        layers = [np.stack(scores) for scores in zip(*by_corpus, strict=True)]
        result = compare_structure(layers, fraction)
        if result is not None:
            results[structure] = result
    names = dict.fromkeys(criterion.name for structure, criterion in criteria.items() if structure in results)
    return Comparison(base, ", ".join(names), aggregate, fraction, list(corpora), results)
