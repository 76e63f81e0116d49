"""`expertprune report`."""

from __future__ import annotations

from pathlib import Path

import click

from expertprune.commands.terminal import common, output, overwrite_file, reporting, show, store_option


@click.command()
@click.argument("expert", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--compare", "others", multiple=True, type=click.Path(path_type=Path), help="Show this expert beside it.")
@click.argument("more", metavar="", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="The page [default: DIR/report.html, or DIR/comparison.html with --compare].",
)  # fmt: skip
@overwrite_file
@store_option
@common
@reporting
def report(
    expert: Path,
    others: tuple[Path, ...],
    more: tuple[Path, ...],
    out: Path | None,
    overwrite: bool,
    store: Path | None,
    as_json: bool,
) -> None:
    """Write one HTML page about what an expert kept and lost, and refresh its model card.

    \b
    expertprune report experts/medical-qa --compare experts/legal-qa
    """
    from expertprune.reporting import page

    if more and not others:
        raise click.UsageError(f"{more[0]}: to show several experts side by side, use --compare")
    data = page.report(expert, (*others, *more), out, store, overwrite)
    show(as_json, data, lambda: page.headline_table(data))
    if not as_json:
        output.print(f"page: {data['page']}", markup=False, highlight=False, soft_wrap=True)
