"""Digests of plain data, and of code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest_of(data: Any) -> str:
    """SHA-256 of plain data. The order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_files(paths: Iterable[Path], root: Path) -> str:
    """Of the contents of files, and of their places below `root`."""
    return digest_of({str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths})


PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_digest(sources: tuple[str, ...], package: Path = PACKAGE) -> str:
    """Of some modules and rooms of this package, with their data about families."""
    places = [package / source for source in sources]
    found = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return digest_of_files([path for path in found if path.suffix in (".py", ".yaml")], package)


def computed_by(sources: tuple[str, ...]) -> str:
    """Digest of what numbers depend on beside their inputs: some code of this package, torch and transformers."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    return digest_of([code_digest(sources), versions])
