"""`expertprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertprune.commands.terminal import (
    common,
    overwrite_picture,
    progress_bar,
    reporting,
    set_option,
    show,
    store_option,
)


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Include every other stored profile of the base.")
@click.option(
    "--fraction", default=0.25, show_default=True, help="Fraction of each layer's units that counts as irrelevant."
)
@click.option(
    "--structure", "structures", multiple=True, type=click.Choice(["ffn", "query_heads", "kv_groups", "experts"]),
    help="Compare these units only [default: all].",
)  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path), help="Draw heat maps into this .png or .svg file.")
@overwrite_picture
@set_option
@store_option
@common
@reporting
def compare(specs: tuple[Path, ...], overrides: dict[str, Any], as_json: bool, **options: Any) -> None:
    """Show how far corpora need the same units, and which corpora are alike.

    \b
    expertprune compare profiles/english-medical-qa.yaml --picture overlap.png
    """
    from expertprune.reporting.tables import comparison_tables
    from expertprune.stages import compare as analysis

    result = analysis.compare(list(specs), overrides=overrides, track=progress_bar, **options)
    show(as_json, result.document(), lambda: comparison_tables(result))
