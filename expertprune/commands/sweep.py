"""`expertprune sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertprune.commands.engines import Where, as_team, engine_options, shard_options, show_report
from expertprune.commands.terminal import (
    common,
    limits_options,
    overwrite_picture,
    progress_bar,
    reporting,
    set_option,
    show,
    spec_argument,
    store_option,
)
from expertprune.commands.tracking import about_spec, log_option, tracked


def _fractions(_: click.Context, __: click.Parameter, text: str) -> list[float]:
    fractions, wrong = [], []
    for part in text.split(","):
        try:
            fractions.append(float(part))
        except ValueError:
            wrong.append(repr(part.strip()))
    if wrong:
        raise click.BadParameter(f"{', '.join(wrong)}: not a number; give fractions such as 0.1,0.25,0.5")
    return fractions


@click.command()
@spec_argument
@click.option(
    "--budgets", required=True, callback=_fractions, metavar="FRACTIONS",
    help="Fractions to remove, such as 0.1,0.25,0.5: of all parameters if the spec's budget has parameters or "
    "max_parameters, else of each structure in the budget.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for sweep.json, written after each budget; a sweep that was stopped continues from it.",
)  # fmt: skip
@click.option("--keep-experts", is_flag=True, help="Keep the experts too, in OUT/NAME-BUDGET.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the curve into this .png or .svg file.")
@overwrite_picture
@set_option
@store_option
@limits_options
@shard_options
@engine_options
@log_option
@common
@reporting
@as_team
def sweep(
    spec: Path,
    budgets: list[float],
    out: Path | None,
    keep_experts: bool,
    picture: Path | None,
    overwrite: bool,
    overrides: dict[str, Any],
    store: Path | None,
    where: Where,
    tracker: str | None,
    as_json: bool,
) -> None:
    """Show what experts of several sizes keep: one profile, many plans.

    \b
    expertprune sweep profiles/english-medical-qa.yaml --budgets 0.1,0.3,0.5 --picture sweep.png
    """
    from expertprune.engine.team import team
    from expertprune.reporting.pictures import check_picture, retention_curve
    from expertprune.reporting.tables import sweep_table
    from expertprune.stages import sweep as sweeping

    if picture is not None:
        team().lead(lambda: check_picture(picture, made=out, overwrite=overwrite))
    shard = where.share(store)
    if shard is not None:
        for key, value in (("--log", tracker), ("--picture", picture), ("--out", None if keep_experts else out)):
            if value is not None:
                raise click.UsageError(f"{key}: a shard knows only its own points; give {key} with --collect")
        report = sweeping.sweep_shard(spec, budgets, shard, out, keep_experts, store, overrides, progress_bar)
        show_report(report, shard, as_json)
        return
    with where.opened(store) as engine, tracked(tracker, lambda: about_spec(spec, overrides)) as run:
        track = progress_bar if run is None else run.track(progress_bar)
        told = None if run is None else run.points
        result = sweeping.sweep(spec, budgets, out, keep_experts, store, overrides, track, engine, told)
        if run is not None:
            run.table(result)
    if picture is not None:
        team().lead(lambda: retention_curve(result, picture, overwrite))
    show(as_json, result.document(), lambda: sweep_table(result))
