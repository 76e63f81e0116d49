"""How much more a corpus loses than the documents say that chose the units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from expertprune.artifacts.profile import PartOfProfile, Profile, ProfilePart
from expertprune.composition.excess import curvature
from expertprune.corpora.documents import CorpusName
from expertprune.units import KeptUnits

FOLDS = 5

Profiles = Mapping[CorpusName, Profile]


def optimism(
    profiles: Profiles,
    part: ProfilePart,
    kept: Sequence[KeptUnits],
    choose: Callable[[Profiles], Sequence[KeptUnits]],
) -> dict[str, float]:
    """The curvature of documents that chose no units, over that of those that did, by corpus.

    Units are chosen `FOLDS` times without a part of every corpus' documents, which then are measured (cross-fitting).
    The fewer documents there are, the more the choice follows what is by chance in them. A corpus of one document has
    nothing to be held out: it gets 1.

    Args:
        part: the gradient pass to read.
        kept: the units that stay where all documents choose.
        choose: the units that stay by some profiles.
    """
    inside = {name: _total(profile, part, kept) for name, profile in profiles.items()}
    outside = dict.fromkeys(profiles, 0.0)
    for fold in range(FOLDS):
        held = {name: list(range(fold, len(each.documents), FOLDS)) for name, each in profiles.items()}
        held = {name: places if len(profiles[name].documents) > 1 else [] for name, places in held.items()}
        if not any(held.values()):
            continue
        chosen = choose({name: _without(profiles[name], places) for name, places in held.items()})
        for name, places in held.items():
            if places:
                outside[name] += _total(PartOfProfile(profiles[name], places), part, chosen)
    return {
        str(name): outside[name] / inside[name] if inside[name] > 0 and outside[name] > 0 else 1.0 for name in profiles
    }


def _total(profile: Profile, part: ProfilePart, kept: Sequence[KeptUnits]) -> float:
    """The curvature of all tokens of a profile together, in nats."""
    return float((curvature(profile, part, kept) * profile.read("tokens").double()).sum())


def _without(profile: Profile, places: Sequence[int]) -> Profile:
    gone = set(places)
    return PartOfProfile(profile, [index for index in range(len(profile.documents)) if index not in gone])
