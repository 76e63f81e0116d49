"""`expertprune profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertprune.commands.engines import Where, as_team, engine_options, shard_options, show_report
from expertprune.commands.terminal import (
    common,
    limits_options,
    progress_bar,
    reporting,
    say,
    set_option,
    spec_argument,
    store_option,
)
from expertprune.files import to_json


@click.command()
@spec_argument
@set_option
@store_option
@limits_options
@shard_options
@engine_options
@common
@reporting
@as_team
def profile(spec: Path, overrides: dict[str, Any], store: Path | None, where: Where, as_json: bool) -> None:
    """Profile every corpus of a spec; profiles that are stored already are reused.

    \b
    expertprune profile profiles/english-medical-qa.yaml
    """
    from expertprune.stages import profile as stage

    shard = where.share(store)
    if shard is not None:
        show_report(stage.profile_shard(spec, shard, store, overrides, progress_bar), shard, as_json)
        return
    with where.opened(store) as engine:
        profiles = stage.profile(spec, store, overrides, progress_bar, engine)
    data = {str(name): {"path": str(p.path), "tokens": p.tokens, "digest": p.digest} for name, p in profiles.items()}
    if as_json:
        say(to_json({"kind": "profiles", "profiles": data}))
    else:
        for name, entry in data.items():
            say(f"{name}: {entry['tokens']:,} tokens, {entry['path']}")
