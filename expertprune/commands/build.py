"""`expertprune build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertprune.commands.engines import Where, as_team, engine_options
from expertprune.commands.terminal import (
    common,
    limits_options,
    overwrite_option,
    print_expert,
    progress_bar,
    reporting,
    set_option,
    spec_argument,
    store_option,
)


@click.command()
@spec_argument
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The expert's folder.")
@set_option
@overwrite_option
@store_option
@limits_options
@engine_options
@common
@reporting
@as_team
def build(
    spec: Path,
    out: Path,
    overrides: dict[str, Any],
    overwrite: bool,
    store: Path | None,
    where: Where,
    as_json: bool,
) -> None:
    """Build and evaluate an expert: profile, compose, prune and evaluate in a row.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa --set budget.ffn=0.3
    """
    from expertprune.stages import build as stage

    where.check()
    with where.opened(store) as engine:
        stage.build(spec, out, overrides, overwrite, store, progress_bar, engine)
    print_expert(out, as_json)
