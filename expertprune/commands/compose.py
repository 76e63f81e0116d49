"""`expertprune compose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertprune.commands.terminal import (
    common,
    overwrite_file,
    progress_bar,
    reporting,
    set_option,
    show,
    spec_argument,
    store_option,
)
from expertprune.files import PLAN, check_output


@click.command()
@spec_argument
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The plan to write, a JSON file."
)
@click.option("--stored-only", is_flag=True, help="Fail if a profile is missing, instead of measuring it.")
@overwrite_file
@set_option
@store_option
@common
@reporting
def compose(
    spec: Path,
    out: Path,
    stored_only: bool,
    overwrite: bool,
    overrides: dict[str, Any],
    store: Path | None,
    as_json: bool,
) -> None:
    """Decide which units stay, and write the plan.

    \b
    expertprune compose profiles/english-medical-qa.yaml --out plan.json
    """
    from expertprune.reporting import explain as inspection
    from expertprune.stages import compose as stage

    check_output(out, overwrite, PLAN, [spec])
    plan = stage.compose(spec, store, overrides, progress_bar, run=not stored_only)
    plan.save(out, overwrite)
    show(as_json, plan.document(), lambda: inspection.explain(plan))
