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
from expertprune.commands.tracking import about_spec, log_option, tracked


@click.command()
@spec_argument
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The expert's folder.")
@set_option
@overwrite_option
@store_option
@limits_options
@engine_options
@log_option
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
    tracker: str | None,
    as_json: bool,
) -> None:
    """Build and evaluate an expert: profile, compose, prune and evaluate in a row.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa --set budget.ffn=0.3
    """
    from expertprune.artifacts.expert import Expert
    from expertprune.stages import build as stage

    where.check()
    with where.opened(store) as engine, tracked(tracker, lambda: about_spec(spec, overrides)) as run:
        track = progress_bar if run is None else run.track(progress_bar)
        stage.build(spec, out, overrides, overwrite, store, track, engine)
        if run is not None and (measured := Expert.load(out).evaluation) is not None:
            run.evaluation(measured)
    print_expert(out, as_json)
