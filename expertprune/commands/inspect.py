"""`expertprune inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from expertprune.commands.terminal import common, reporting, show


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@common
@reporting
def inspect(artifact: Path, as_json: bool) -> None:
    """Explain a spec, a profile, a plan or an expert.

    \b
    expertprune inspect experts/medical-qa
    """
    from expertprune.reporting import explain as inspection

    found = inspection.read(artifact)
    show(as_json, inspection.describe(artifact) if as_json else None, lambda: inspection.explain(found))
