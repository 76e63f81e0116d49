"""Compare corpora by their profiles: how far they need the same units. Nothing is cut."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertprune.artifacts.profile import Profile, ProfileKey, ProfilePart
from expertprune.composition.overlap import ComparedCorpus, Comparison, check_fraction, compare_corpora
from expertprune.composition.scoring import check_criterion, criterion_name, needed_part
from expertprune.errors import CheckpointError, SpecError
from expertprune.profiling.store import profile_key
from expertprune.progress import Track, silent
from expertprune.relevance import Criterion
from expertprune.reporting.pictures import check_picture, draw_comparison
from expertprune.spec.schema import Spec
from expertprune.stages.profile import profiles_of
from expertprune.stages.validate import Prepared, SpecLike, validate
from expertprune.units import Structure

log = logging.getLogger(__name__)


def compare(
    specs: SpecLike | Sequence[SpecLike],
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    fraction: float = 0.25,
    structures: Sequence[str] = (),
    everything: bool = False,
    picture: str | Path | None = None,
    overwrite: bool = False,
    track: Track = silent,
) -> Comparison:
    """How much the profiles of corpora have in common; profiles that are missing are made first.

    Args:
        specs: their corpora are compared, by the criterion and the aggregation that they agree on.
        fraction: which part of each layer's units is irrelevant.
        structures: `ffn`, `query_heads`, `kv_groups`; none named: all of them.
        everything: compare all other stored profiles of the base too.
        picture: a .png or .svg file to draw the comparison into.
        overwrite: replace the picture that is there.

    Raises:
        SpecError: specs of different bases, a criterion that does not see the corpus, fewer than two corpora.
        CheckpointError: the picture cannot be written.
    """
    check_fraction(fraction)
    if picture is not None:
        check_picture(Path(picture), overwrite=overwrite)
    wanted = [_structure(name) for name in structures] or list(Structure)
    prepared = [
        validate(spec, overrides, store) for spec in ([specs] if isinstance(specs, Spec | str | Path) else specs)
    ]
    if not prepared:
        raise SpecError("a comparison needs a spec")
    _check_agreement(prepared)
    settings, base, store = prepared[0].spec, prepared[0].base, prepared[0].store
    named = {structure: check_criterion(criterion_name(settings.relevance, structure)) for structure in wanted}
    part = needed_part(settings.relevance)
    stored = _stored(store, _keys(prepared[0])[0], part) if everything else []
    _check_two(prepared, stored)
    found: dict[str, tuple[str, Profile]] = {}
    while prepared:  # one at a time, so that one running model is in memory
        for name, made in profiles_of(prepared.pop(0), track, also=[part] if part is not None else []).items():
            found.setdefault(made.digest, (str(name), made))
    for other in stored:
        found.setdefault(other.digest, (other.corpus, other))
    about = {"model": base.name, "digest": base.digest}
    comparison = compare_corpora(_named(list(found.values())), about, named, settings.compose.aggregate, fraction, part)
    if not comparison.structures:
        raise SpecError(f"{', '.join(wanted)}: {_nothing(named)}, so there is nothing to compare")
    if picture is not None:
        draw_comparison(comparison, Path(picture), overwrite)
    return comparison


def _nothing(criteria: Mapping[Structure, Criterion]) -> str:
    """Why no structure was compared."""
    blind = {each.name for structure, each in criteria.items() if structure not in each.structures}
    scored = len(blind) < len({each.name for each in criteria.values()})
    return "no layer has more than one" if scored or not blind else f"{' and '.join(sorted(blind))} does not score them"


def _structure(name: str) -> Structure:
    try:
        return Structure(name)
    except ValueError:
        raise SpecError(f"structures: {name!r} is none of {', '.join(Structure)}") from None


def _check_agreement(prepared: Sequence[Prepared]) -> None:
    """Raises `SpecError` unless all specs are of one base and score units alike, by what they see."""
    first, problems = prepared[0], []
    for other in prepared[1:]:
        both = f"specs {first.spec.name!r} and {other.spec.name!r}"
        if other.base.digest != first.base.digest:
            problems.append(
                f"base.model: {both} have different bases ({first.base.name}, {other.base.name}): profiles of different "
                "models have no units in common"
            )
        loss = needed_part(first.spec.relevance) is not None and first.spec.relevance.loss
        for key, ours, theirs in (
            ("relevance.criterion", first.spec.relevance.criterion, other.spec.relevance.criterion),
            ("relevance.experts", first.spec.relevance.experts, other.spec.relevance.experts),
            ("relevance.loss", loss, loss and other.spec.relevance.loss),
            ("compose.aggregate", first.spec.compose.aggregate, other.spec.compose.aggregate),
        ):
            if ours != theirs and None not in (ours, theirs):  # None: a base without routed experts
                problems.append(f"{key}: {both} differ ({ours}, {theirs}); set one for all with --set {key}={ours}")
    name = first.spec.relevance.criterion
    if not check_criterion(name).sees_data:
        problems.append(
            f"relevance.criterion: {name} does not look at the corpus, so all corpora are the same to it by "
            "construction; compare with --set relevance.criterion=impact"
        )
    if problems:
        raise SpecError(problems)


def _check_two(prepared: Sequence[Prepared], stored: Sequence[Profile]) -> None:
    """Raises `SpecError`, before a model is loaded, where there is one corpus only."""
    digests = {profile.digest for profile in stored}
    for one in prepared:
        digests |= {key.digest for key in _keys(one)}
    if len(digests) < 2:
        names = ", ".join(dict.fromkeys(str(name) for one in prepared for name in one.corpora))
        raise SpecError(
            f"dimensions: a comparison needs two different corpora, found {names}; name another value, another spec, or "
            "compare with all stored profiles of the base (--all)"
        )


def _keys(prepared: Prepared) -> list[ProfileKey]:
    """The keys of the profiles of a spec's corpora, in their order."""
    longest = prepared.spec.calibration.max_tokens
    return [profile_key(prepared.base, prepared.calibration[name].digest, longest) for name in prepared.corpora]


def _stored(store: Path, key: ProfileKey, part: ProfilePart | None) -> list[Profile]:
    """Every stored profile that compares with one of this key and has a part, by the name of its corpus.

    What cannot be read is left out.
    """
    profiles = []
    for path in sorted((store / "profiles").glob("*.safetensors")):
        try:
            found = Profile(path)
            about = found.about
            mine = about.key.model == key.model and key.same_means(about.digest) and about.part is None
            if mine and (part is None or found.part(part) is not None):
                profiles.append(found)
        except CheckpointError as error:
            log.warning("%s is left out: %s", path, error)
    return sorted(profiles, key=lambda found: (found.corpus, found.digest))


def _named(found: Sequence[tuple[str, Profile]]) -> dict[ComparedCorpus, Profile]:
    """Corpora by a name that is theirs alone: where several have one name, with the head of the profile's digest."""
    counts = Counter(name for name, _ in found)
    return {
        ComparedCorpus(
            name if counts[name] == 1 else f"{name} ({made.digest[:8]})", made.digest, len(made.documents), made.tokens
        ): made
        for name, made in found
    }
