"""`expertprune prune`."""

from __future__ import annotations

from pathlib import Path

import click

from expertprune.commands.engines import as_team
from expertprune.commands.terminal import (
    TRUST_HELP,
    common,
    limits_options,
    overwrite_option,
    print_expert,
    progress_bar,
    reporting,
    store_option,
)


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The expert's folder.")
@overwrite_option
@click.option("--trust-remote-code", is_flag=True, help=TRUST_HELP)
@store_option
@limits_options
@common
@reporting
@as_team
def prune(plan: Path, out: Path, overwrite: bool, trust_remote_code: bool, store: Path | None, as_json: bool) -> None:
    """Apply a plan: cut the base, repair it, write the expert.

    \b
    expertprune prune plan.json --out experts/medical-qa
    """
    from expertprune.stages import prune as stage

    print_expert(stage.prune(plan, out, overwrite, store, progress_bar, trust_remote_code), as_json)
