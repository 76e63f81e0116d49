"""`expertprune schema`."""

from __future__ import annotations

import json

import click

from expertprune.commands.terminal import reporting, say


@click.command()
@reporting
def schema() -> None:
    """Print the JSON schema of a spec, for editors.

    \b
    expertprune schema > expertprune.schema.json
    """
    from expertprune.spec.schema import Spec

    say(json.dumps(Spec.model_json_schema(by_alias=True), indent=2))
