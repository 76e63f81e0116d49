"""`expertprune vocabulary`: what a smaller vocabulary costs and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertprune.commands.terminal import common, progress_bar, reporting, set_option, show, spec_argument, store_option


def _counts(_: click.Context, __: click.Parameter, text: str | None) -> list[int]:
    try:
        return [int(part.replace("_", "")) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(f"{text!r}: give whole numbers of rows, such as 16384,32768") from None


@click.command()
@spec_argument
@click.option(
    "--rows", callback=_counts, metavar="NUMBERS",
    help="Vocabulary sizes to show, such as 16384,32768 [default: the spec's own, and fractions of the base's].",
)  # fmt: skip
@set_option
@store_option
@common
@reporting
def vocabulary(spec: Path, rows: list[int], overrides: dict[str, Any], store: Path | None, as_json: bool) -> None:
    """Show what a smaller vocabulary costs and saves, before anything is cut.

    \b
    expertprune vocabulary profiles/english-medical-qa.yaml --rows 8192,16384
    """
    from expertprune.reporting.tables import vocabulary_tables
    from expertprune.stages import vocabulary as tradeoff

    result = tradeoff.vocabulary(spec, rows, store, overrides, progress_bar)
    show(as_json, result.document(), lambda: vocabulary_tables(result))
