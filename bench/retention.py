"""The picture in README: what an expert of today's defaults keeps as it gets smaller.

    python -m bench.retention

It sweeps profiles/english-medical-qa.yaml and draws `bench/pictures/retention.png`. Beside it,
`retention.json` records the points and the digest of the defaults, by which a test sees that the
picture is stale. Points are kept in the store, so a run that was stopped goes on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import portable_spec
from expertprune.artifacts.sweep import Sweep
from expertprune.commands.terminal import progress_bar
from expertprune.files import digest_of, shipped, store_folder
from expertprune.reporting.pictures import retention_curve
from expertprune.reporting.tables import sweep_rows
from expertprune.spec.reading import load_spec
from expertprune.stages.sweep import sweep
from expertprune.stages.validate import find, prepare

from .records import made, read, write

SPEC = shipped("profiles") / "english-medical-qa.yaml"
BUDGETS = (0.1, 0.3, 0.5)
PICTURE = Path(__file__).parent / "pictures" / "retention.png"
RECORD = PICTURE.with_suffix(".json")


def defaults_digest(store: Path) -> str:
    """Digest of all that the picture shows: budgets, every key of the spec as it is decided for its base, its texts."""
    found = prepare(find(load_spec(SPEC), store))
    texts = [
        [str(name), corpus.digest, [each.digest for each in corpus.evaluation]]
        for name, corpus in found.corpora.items()
    ]
    return digest_of([BUDGETS, portable_spec(found.spec).document(), texts])


def draw(record: Path = RECORD, picture: Path = PICTURE) -> None:
    """Draw what a record holds."""
    retention_curve(Sweep.model_validate(read(record)["sweep"]), picture, overwrite=True)


def main() -> None:
    """Sweep, draw and record."""
    store = store_folder()
    with tempfile.TemporaryDirectory() as folder:
        found = sweep(SPEC, BUDGETS, folder, store=store, track=progress_bar)
    about: dict[str, Any] = {"defaults": defaults_digest(store), "made": made(), "sweep": found.document()}
    write(RECORD, about)
    draw()
    for row in sweep_rows(found):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
