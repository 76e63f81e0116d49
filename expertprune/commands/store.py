"""`expertprune store`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from expertprune.commands.terminal import common, records_table, reporting, show, store_option
from expertprune.files import HOLDINGS, StoreEntry, duration, holdings, prune_store, store_folder
from expertprune.formats import megabytes


@click.group(invoke_without_command=True)
@click.pass_context
@store_option
@common
@reporting
def store(context: click.Context, store: Path | None, as_json: bool) -> None:
    """Show what the store holds, and how much of the disk it takes.

    \b
    expertprune store
    expertprune store prune --older-than 30d
    """
    # What is given before `prune` holds for it too. A variable of the environment would win over a default: the option
    # of `prune` reads none, as the one before it has read it.
    context.default_map = {"prune": {"store": store, "as_json": as_json}}
    if context.invoked_subcommand is None:
        folder = store_folder(store)
        _tell(folder, list(holdings(folder)), as_json, "holds")


@store.command("prune")
@click.option(
    "--older-than",
    required=True,
    metavar="TIME",
    help="What was not used for so long, such as 12h, 30d or 4w; 0d: all.",
)
@click.option("--store", type=click.Path(file_okay=False, path_type=Path), help="Folder of stored profiles.")
@common
@reporting
def _prune(older_than: str, store: Path | None, as_json: bool) -> None:
    """Remove what was not used for some time. All of it can be made again; where experts' bases lie is kept.

    \b
    expertprune store prune --older-than 30d
    """
    folder = store_folder(store)
    _tell(folder, prune_store(folder, duration(older_than)), as_json, "removed")


def _tell(folder: Path, entries: Sequence[StoreEntry], as_json: bool, verb: str) -> None:
    records: list[dict[str, Any]] = []
    for kind, about in HOLDINGS.items():
        mine = [each for each in entries if each.kind == kind]
        if mine:
            size, unused = sum(each.bytes for each in mine), max(each.unused for each in mine) / (24 * 3600)
            records.append(
                {"kind": kind, "entries": len(mine), "bytes": size, "unused_days": round(unused, 1), "about": about}
            )
    total = sum(each.bytes for each in entries)
    data = {"kind": "store", "folder": str(folder), verb: records, "bytes": total}

    def text() -> Any:
        if not records:
            return f"{folder}: {verb} nothing"
        rows = [{**record, "bytes": megabytes(record["bytes"])} for record in records]
        table = records_table(rows)
        table.title, table.title_justify = f"{folder}: {verb} {megabytes(total)}", "left"
        return table

    show(as_json, data, text)
