"""How much more a corpus loses than the documents say that chose the units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from expertprune.artifacts.profile import VOCABULARY, Profile, ProfilePart
from expertprune.composition.excess import curvature, windows_of
from expertprune.composition.plan import Scored
from expertprune.corpora.documents import CorpusName
from expertprune.units import KeptUnits

FOLDS = 5
# The last part of the names of statistics with a row for each document, and of sums over all of them.
_BY_DOCUMENT = {"rms", "impact", "square", "influence", "tokens", "weights", "routed", "frequency", "norm_sum", "value",
                "norm", "loss"}  # fmt: skip
_SUMS = {"sum", "square_sum"}

Profiles = Mapping[CorpusName, Profile]


class PartOfProfile(Profile):
    """A profile as if only some of its documents had been read.

    Sums over all documents (`*.sum`, `*.square_sum`) are taken to belong to each by its weight. Of the vocabulary the
    whole profile speaks.

    Args:
        chosen: positions of the documents.
    """

    def __init__(self, whole: Profile, chosen: Sequence[int]) -> None:
        self.path, self.chosen = whole.path, list(chosen)
        self.about = whole.about.model_copy(update={"documents": [whole.documents[index] for index in chosen]})

    def read(self, name: str) -> Tensor:
        tensor, kind = super().read(name), name.rpartition(".")[2]
        if kind in _SUMS:
            weights = super().read("weights").double()
            return tensor * (weights[self.chosen].sum() / weights.sum())
        return tensor[self.chosen] if kind in _BY_DOCUMENT else tensor

    def part(self, part: ProfilePart) -> Profile | None:
        found = super().part(part)
        return found if found is None or part == VOCABULARY else PartOfProfile(found, self.chosen)


@dataclass(frozen=True)
class Fold:
    """Some documents of each corpus that choose no units.

    Attributes:
        others: the profiles of all other documents.
        held: the positions of the fold's own, by corpus.
        known: what plans of the others share.
    """

    others: Profiles
    held: Mapping[CorpusName, Sequence[int]]
    known: Scored = field(default_factory=Scored)


def folds_of(profiles: Profiles) -> list[Fold]:
    """`FOLDS` folds, or fewer where no corpus has as many documents; every document of a corpus is in one of them.

    A document goes with all of its windows (`calibration.windows`), and out of every corpus that has it. Where all of
    a corpus is in one fold, as where it has a single document, its documents are held out of none: they would still
    vote in that corpus.
    """
    windows = {name: windows_of(profile) for name, profile in profiles.items()}
    numbers: dict[str, int] = {}  # the fold of each document
    for documents in windows.values():
        there = Counter(numbers[digest] for digest in documents if digest in numbers)
        for digest in documents:
            if digest not in numbers:
                numbers[digest] = min(range(FOLDS), key=lambda fold: there[fold])
                there[numbers[digest]] += 1
    alike = (documents for documents in windows.values() if len({numbers[digest] for digest in documents}) == 1)
    voting = {digest for documents in alike for digest in documents}
    numbers = {digest: fold for digest, fold in numbers.items() if digest not in voting}
    held = [{name: _places(profile, numbers, fold) for name, profile in profiles.items()} for fold in range(FOLDS)]
    return [
        Fold({name: _without(profiles[name], positions) for name, positions in places.items()}, places)
        for places in held
        if any(places.values())
    ]


def optimism(
    profiles: Profiles,
    part: ProfilePart,
    kept: Sequence[KeptUnits],
    folds: Iterable[Fold],
    choose: Callable[[Fold], Sequence[KeptUnits] | None],
) -> dict[str, float]:
    """The curvature of documents where they choose no units, over that where they do, by corpus.

    Each fold is measured on the units that the other documents choose (cross-fitting). The fewer documents there are,
    the more the choice follows what is by chance in them. Documents that no fold holds out do not count. A corpus of
    which nothing is held out gets 1.

    Args:
        part: the gradient pass to read.
        kept: the units that stay where all documents choose.
        choose: the units that stay where a fold's others do; `None` where no units can be chosen by them, and the
            fold does not count.
    """
    all_choose = {name: _curvatures(profile, part, kept) for name, profile in profiles.items()}
    inside, outside = dict.fromkeys(profiles, 0.0), dict.fromkeys(profiles, 0.0)
    for fold in folds:
        chosen = choose(fold)
        for name, places in fold.held.items():
            if places and chosen is not None:
                inside[name] += float(all_choose[name][list(places)].sum())
                outside[name] += float(_curvatures(PartOfProfile(profiles[name], places), part, chosen).sum())
    return {
        str(name): outside[name] / inside[name] if inside[name] > 0 and outside[name] > 0 else 1.0 for name in profiles
    }


def _curvatures(profile: Profile, part: ProfilePart, kept: Sequence[KeptUnits]) -> Tensor:
    """The curvature of all tokens of each document together, in nats, `[documents]`."""
    return curvature(profile, part, kept) * profile.read("tokens").double()


def _places(profile: Profile, numbers: Mapping[str, int], fold: int) -> list[int]:
    """The positions of a fold's documents."""
    return [place for place, digest in enumerate(profile.documents) if numbers.get(digest) == fold]


def _without(profile: Profile, places: Sequence[int]) -> Profile:
    gone = set(places)
    return PartOfProfile(profile, [index for index in range(len(profile.documents)) if index not in gone])
