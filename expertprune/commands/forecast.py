"""`expertprune forecast`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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

_STEPS = 10  # of a range


def _fraction(text: str) -> float:
    number = text.strip()
    return round(float(number.removesuffix("%")) / (100 if number.endswith("%") else 1), 6)


def _sizes(_: click.Context, __: click.Parameter, text: str) -> list[float]:
    try:
        if ".." not in text:
            return [_fraction(part) for part in text.split(",")]
        first, last = map(_fraction, text.split("..", 1))
    except ValueError:
        raise click.BadParameter(f"{text!r}: give fractions such as 0.1,0.25, or a range such as 5%..50%") from None
    return sorted({round(first + (last - first) * step / (_STEPS - 1), 6) for step in range(_STEPS)})


@click.command()
@spec_argument
@click.option(
    "--sizes", default="5%..50%", show_default=True, callback=_sizes, metavar="FRACTIONS",
    help="Fractions to remove, such as 0.1,0.25 or 5%..50%, which is ten of them: of all parameters if the spec's budget "
    "has parameters, max_parameters or retention, else of each structure in the budget.",
)  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the curves into this .png or .svg file.")
@click.option(
    "--built", type=click.Path(path_type=Path), metavar="DIR",
    help="An expert of this base that was built and evaluated: what its corpora lost corrects every size.",
)  # fmt: skip
@click.option("--stored-only", is_flag=True, help="Fail if a profile is missing, instead of measuring it.")
@overwrite_picture
@set_option
@store_option
@limits_options
@common
@reporting
def forecast(
    spec: Path,
    sizes: list[float],
    picture: Path | None,
    built: Path | None,
    stored_only: bool,
    overwrite: bool,
    overrides: dict[str, Any],
    store: Path | None,
    as_json: bool,
) -> None:
    """Foresee what experts of several sizes keep, before anything is cut.

    Only profiles that are missing are measured.

    \b
    expertprune forecast profiles/english-medical-qa.yaml --picture forecast.png
    """
    from expertprune.reporting.outlook import outlook_picture, outlook_table
    from expertprune.reporting.pictures import check_picture
    from expertprune.stages import outlook as stage

    if picture is not None:
        check_picture(picture, overwrite=overwrite)
    found = stage.forecast(spec, sizes, store, overrides, progress_bar, run=not stored_only, built=built)
    if picture is not None:
        outlook_picture(found, picture, overwrite)
    show(as_json, found.document(), lambda: outlook_table(found))
