"""Find the source of each corpus that a spec names."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from expertprune.corpora.documents import GENERAL, CorpusName, corpus_names
from expertprune.errors import SpecError
from expertprune.files import shipped
from expertprune.registry import nearest
from expertprune.spec.schema import DIMENSIONS, Source, Spec


def catalogue_sources(folder: Path) -> dict[CorpusName, Source]:
    """The sources of a catalogue folder, their paths made absolute. Raises `SpecError`."""
    path = folder / "catalogue.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"corpora.catalogue: {path}: no such file") from None
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: {error}") from None
    sources: dict[CorpusName, Source] = {}
    problems: list[str] = []
    valid = (*DIMENSIONS, GENERAL)
    for dimension, values in data.items() if isinstance(data, dict) else ():
        if dimension not in valid or not isinstance(values, dict):
            problems.append(f"{path}: {dimension!r} must be one of {', '.join(valid)}, with a mapping of values")
            continue
        for value, entry in values.items():
            try:
                entry = {key: item for key, item in entry.items() if key != "about"}
                source = Source.model_validate(entry)
            except (ValidationError, AttributeError) as error:
                problems.append(f"{path}: {dimension}.{value}: {str(error).splitlines()[-1].strip()}")
                continue
            for key in ("path", "evaluation"):
                if getattr(source, key) is not None:
                    setattr(source, key, [str(folder / item) for item in getattr(source, key)])
            if source.questions is not None:
                source.questions = str(folder / source.questions)
            sources[CorpusName(dimension, str(value))] = source
    if problems:
        raise SpecError(problems)
    return sources


def find_sources(spec: Spec) -> dict[CorpusName, Source]:
    """The source of every corpus that the spec names; raises `SpecError` naming all that have none."""
    folder = Path(spec.corpora.catalogue) if spec.corpora.catalogue else shipped("corpora")
    catalogue = catalogue_sources(folder)
    found: dict[CorpusName, Source] = {}
    problems = []
    for name in corpus_names(spec):
        source = _find(name, spec.corpora.sources, catalogue)
        if source is None:
            known = {each.value for each in catalogue if each.dimension == name.dimension}
            known |= {key.rpartition("/")[2] for key in spec.corpora.sources}
            key = GENERAL if name.is_general else f"dimensions.{name.dimension}"
            problems.append(f"{key}: no corpus for {name.value!r}{nearest(name.value, known)}")
        else:
            found[name] = source
    if problems:
        raise SpecError(problems)
    return found


def _find(name: CorpusName, inline: dict[str, Source], catalogue: dict[CorpusName, Source]) -> Source | None:
    for candidate in (str(name), name.value):
        if candidate in inline:
            return inline[candidate]
    if name in catalogue:
        return catalogue[name]
    if name.is_general:  # any corpus can be one whose capability is to be retained
        matches = [source for other, source in catalogue.items() if other.answers_to(name.value)]
        if len(matches) == 1:
            return matches[0]
    return None
