"""Find the source of each corpus that a spec names."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from expertprune.corpora.documents import GENERAL, OTHER, CorpusName, corpus_names
from expertprune.errors import SpecError
from expertprune.files import YAML_BYTES, parse_yaml, problems_of, read_text, shipped, user_path
from expertprune.registry import nearest
from expertprune.spec.schema import DIMENSIONS, Spec
from expertprune.spec.sources import Source


def catalogue_sources(folder: Path) -> dict[CorpusName, Source]:
    """The sources of a catalogue folder, their paths made absolute. Raises `SpecError`."""
    path = folder / "catalogue.yaml"
    try:
        return dict(_sources_in(path, read_text(path, YAML_BYTES, SpecError)))
    except SpecError as error:
        raise SpecError([f"corpora.catalogue: {problem}" for problem in error.problems]) from None


@functools.lru_cache(maxsize=8)
def _sources_in(path: Path, text: str) -> dict[CorpusName, Source]:
    """The sources in a catalogue's text, which is parsed once: a command looks its corpora up many times."""
    data, folder = parse_yaml(text, str(path)), path.parent
    if not isinstance(data, dict):
        raise SpecError(f"{path}: must be a mapping of dimensions")
    sources: dict[CorpusName, Source] = {}
    problems: list[str] = []
    valid = (*DIMENSIONS, GENERAL)
    for dimension, values in data.items():
        if dimension not in valid or not isinstance(values, dict):
            problems.append(f"{path}: {dimension!r} must be one of {', '.join(valid)}, with a mapping of values")
            continue
        for value, entry in values.items():
            try:
                entry = {key: item for key, item in entry.items() if key != "about"}
                source = Source.model_validate(entry)
            except ValidationError as error:
                problems += [f"{path}: {dimension}.{value}: {problem}" for problem in problems_of(error, Source)]
                continue
            except AttributeError:
                problems.append(f"{path}: {dimension}.{value}: must be a mapping of keys and values")
                continue
            sources[CorpusName(dimension, str(value))] = source.with_paths(
                lambda _, path: str(folder / user_path(path)), folder
            )
    if problems:
        raise SpecError(problems)
    return sources


def _catalogue_of(spec: Spec) -> dict[CorpusName, Source]:
    return catalogue_sources(_folder(spec))


def _folder(spec: Spec) -> Path:
    return Path(spec.corpora.catalogue) if spec.corpora.catalogue else shipped("corpora")


def source_key(name: CorpusName, spec: Spec) -> str:
    """Where a user finds the source of a corpus: its key in the spec, or its name in the catalogue."""
    own = _inline(name, spec.corpora.sources)
    return f"corpora.sources.{own}" if own is not None else f"{_folder(spec) / 'catalogue.yaml'}: {name.value}"


def find_sources(spec: Spec) -> dict[CorpusName, Source]:
    """The source of every corpus of a spec; raises `SpecError` naming all that have none."""
    catalogue = _catalogue_of(spec)
    found: dict[CorpusName, Source] = {}
    problems = []
    for name in corpus_names(spec):
        source = _find(name, spec.corpora.sources, catalogue)
        if source is None:
            key = GENERAL if name.is_general else f"dimensions.{name.dimension}"
            values = {each.value for each in catalogue if each.dimension == name.dimension}
            problems.append(_lacking(key, name, values, spec))
        else:
            found[name] = source
    if not problems:
        problems += _misspelt(spec)
    if problems:
        raise SpecError(problems)
    return found


def _misspelt(spec: Spec) -> Iterator[str]:
    """Sources that no name means, but one that has no source of its own nearly does."""
    without = {name.value for name in _named(spec) if not any(map(name.answers_to, spec.corpora.sources))}
    for key in unnamed_sources(spec):
        close = difflib.get_close_matches(CorpusName.parse(key).value if "/" in key else key, without, n=1, cutoff=0.75)
        if close:
            yield f"corpora.sources.{key}: no corpus has this name; did you mean {close[0]!r}?"


def unnamed_sources(spec: Spec) -> list[str]:
    """The keys of `corpora.sources` that no corpus of the spec means."""
    return [key for key in spec.corpora.sources if not any(name.answers_to(key) for name in _named(spec))]


def _named(spec: Spec) -> list[CorpusName]:
    return [*corpus_names(spec), *(CorpusName(OTHER, value) for value in spec.evaluate.others)]


def other_sources(spec: Spec) -> dict[CorpusName, Source]:
    """The source of each of `evaluate.others`.

    Raises:
        SpecError: naming all that have none, and all that the spec names already.
    """
    named, catalogue = find_sources(spec), _catalogue_of(spec)
    problems = []
    for value in spec.evaluate.others:
        name = CorpusName(OTHER, value)
        source = _find(name, spec.corpora.sources, catalogue)
        same = [str(each) for each, known in named.items() if each.answers_to(value) or known == source]
        if same:
            problems.append(f"evaluate.others: {value!r} is {same[0]}, which the spec names already: take it out")
        elif source is None:
            problems.append(_lacking("evaluate.others", name, {each.value for each in catalogue}, spec))
        else:
            named[name] = source
    if problems:
        raise SpecError(problems)
    return {name: source for name, source in named.items() if name.dimension == OTHER}


def _lacking(key: str, name: CorpusName, values: set[str], spec: Spec) -> str:
    """That a corpus has no source, with the nearest of some shipped values and the spec's own, or how to give one."""
    hint = nearest(name.value, values | {source.rpartition("/")[2] for source in spec.corpora.sources})
    hint += "" if "did you mean" in hint else _own_source(name)
    return f"{key}: no corpus for {name.value!r}{hint}"


# Shipped corpora of a language, a skill and a subject each, the most unlike first.
_UNLIKE = ("de", "math", "software", "zh", "legal", "qa")


def unnamed(spec: Spec, count: int = 3) -> list[str]:
    """A few corpora that ship and that a spec does not name: what `evaluate.others` may be."""
    if spec.corpora.catalogue is not None:
        return []
    named = {value for name in corpus_names(spec) for value in (name.value, name.value.rpartition("/")[2])}
    return [value for value in _UNLIKE if value not in named][:count]


def _own_source(name: CorpusName) -> str:
    """What to write into a spec for a corpus of the user's own."""
    file = re.sub(r"[^\w.-]+", "-", name.value)

    def pasted(source: str) -> str:
        return f"corpora: {{sources: {{{name}: {{{source}}}}}}}"

    own, openings = f"path: {file}.jsonl", f"path: {file}.jsonl, generate: {{from: continuation, tokens: 200k}}"
    return f"; give your own documents, {pasted(own)}, or a few openings for the base to go on from, {pasted(openings)}"


def _inline(name: CorpusName, sources: Mapping[str, Source]) -> str | None:
    """The key of a corpus' source in the spec itself, if it is there."""
    return next((key for key in (str(name), name.value) if key in sources), None)


def _find(name: CorpusName, inline: dict[str, Source], catalogue: dict[CorpusName, Source]) -> Source | None:
    if (own := _inline(name, inline)) is not None:
        return inline[own]
    if name in catalogue:
        return catalogue[name]
    if name.dimension in (GENERAL, OTHER):  # any corpus can be named so
        matches = [source for other, source in catalogue.items() if other.answers_to(name.value)]
        if len(matches) == 1:
            return matches[0]
    return None
