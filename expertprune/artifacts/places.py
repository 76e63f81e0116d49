"""Where an expert's base and corpora lie on this machine, as the store remembers it."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field

from expertprune.artifacts.record import Record


class KnownPlaces(Record):
    """Where base and corpora lie; corpora by the end of their path (see `portable`).

    Experts of one plan may have been built from several folders, whose evaluation documents differ.

    Attributes:
        corpora: of the last build.
        earlier: of builds before it, where they lie elsewhere; newest first.
    """

    base: str | None = None
    corpora: dict[str, str] = Field(default_factory=dict)
    earlier: dict[str, list[str]] = Field(default_factory=dict)

    def then(self, base: str, corpora: Mapping[str, str]) -> Self:
        """The places after another build."""
        earlier = {
            name: [each for each in self.all_of(name) if each != path and Path(each).exists()]
            for name, path in corpora.items()
        }
        return type(self)(base=base, corpora=dict(corpora), earlier=earlier)

    def all_of(self, name: str) -> list[str]:
        """All places of a corpus' file."""
        last = self.corpora.get(name)
        return [*([] if last is None else [last]), *self.earlier.get(name, [])]

    def chosen(self, name: str, expert: Path) -> list[str]:
        """The places that hold different files; of these, the one that shares most of its path with an expert's folder."""

        def shared(path: str) -> int:
            return len(Path(os.path.commonpath([expert.resolve(), Path(path).resolve()])).parts)

        there = [path for path in self.all_of(name) if Path(path).exists()]
        most = max(map(shared, there), default=0)
        nearest = _different([path for path in there if shared(path) == most])
        return nearest if len(nearest) == 1 else _different(there)


def unclear(key: str, name: str, places: Sequence[str]) -> str:
    """What is wrong where several places of a file are known."""
    listed = " and ".join(places)
    return (
        f"{key}: experts of this plan were built with different files {name}, at {listed}; say which one is this "
        f"expert's with --set {key}=PATH"
    )


def _different(paths: Sequence[str]) -> list[str]:
    """The first place of each of several files."""
    found: list[str] = []
    for path in paths:
        if not any(_same(path, other) for other in found):
            found.append(path)
    return found


def _same(first: str, second: str) -> bool:
    if first == second or not (Path(first).is_file() and Path(second).is_file()):
        return first == second
    return filecmp.cmp(first, second, shallow=False)
