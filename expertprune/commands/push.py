"""`expertprune push`: an expert to the hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from expertprune.commands.terminal import common, reporting, show, store_option


@click.command()
@click.argument("expert", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--base-model", metavar="OWNER/NAME", help="The base on the hub, if you cut it from a local folder.")
@click.option("--overwrite", is_flag=True, help="Replace everything else that is in the repository.")
@store_option
@common
@reporting
def push(
    expert: Path,
    repository: str,
    private: bool,
    base_model: str | None,
    overwrite: bool,
    store: Path | None,
    as_json: bool,
) -> None:
    """Upload an expert to the Hugging Face hub, with its model card.

    Set HF_TOKEN to a token that may write. If the upload breaks off, run the same command again.

    \b
    expertprune push experts/medical-qa owner/medical-qa --private
    """
    from expertprune.stages import push as stage

    pushed = stage.push(expert, repository, private, overwrite, base_model, store)
    data = {"kind": "push", **asdict(pushed)}
    show(as_json, data, lambda: f"{pushed.url}: {len(pushed.files)} files, commit {pushed.commit}")
