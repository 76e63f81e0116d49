"""`expertprune validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertprune.commands.terminal import common, reporting, set_option, spec_argument, store_option
from expertprune.files import to_json


@click.command()
@spec_argument
@set_option
@store_option
@common
@reporting
def validate(spec: Path, overrides: dict[str, Any], store: Path | None, as_json: bool) -> None:
    """Check a spec and what it names: base, corpora, budget. No model is loaded.

    \b
    expertprune validate profiles/english-medical-qa.yaml
    """
    from expertprune.composition.parameters import removed_parameters, removed_with_rows
    from expertprune.composition.widths import summary
    from expertprune.spec.values import Coverage
    from expertprune.stages import validate as stage

    prepared = stage.validate(spec, overrides, store)
    widths, rows = prepared.widths, prepared.rows
    before = prepared.base.checkpoint.parameters
    after = before - removed_parameters(prepared.base, widths) if widths is not None else None
    after = after - removed_with_rows(prepared.base, rows) if after is not None else None
    budget = None
    if widths is not None and len(set(widths)) == 1:
        entries = summary(prepared.spec.budget, prepared.base.layers, widths)
        budget = {structure: entry.document() for structure, entry in entries.items()}
    decided = {**prepared.spec.relevance.model_dump(include={"criterion", "experts"}, exclude_none=True),
               "allocation": prepared.spec.compose.allocation}  # fmt: skip
    data = {
        "kind": "validation",
        "name": prepared.spec.name,
        "decided": decided,
        "base": {"model": prepared.base.name, "path": str(prepared.base.folder), "parameters": before},
        "expert": {"parameters": after, "budget": budget, "rows": rows},
        "corpora": {
            str(name): {
                "calibration": len(corpus.calibration),
                "evaluation": len(corpus.evaluation),
                "questions": len(corpus.questions),
            }
            for name, corpus in prepared.corpora.items()
        },
    }
    lines = [
        f"{spec}: valid",
        f"  base    {prepared.base.name}, {before:,} parameters",
        "  expert  "
        + (f"{after:,} parameters" if after is not None else "as small as its retention allows")
        + (
            "; coverage decides how many vocabulary rows go as well"
            if isinstance(prepared.spec.budget.vocabulary, Coverage)
            else ""
        ),
    ]
    lines.append("  " + "units".ljust(8) + ", ".join(f"{key} {value}" for key, value in decided.items()))
    for name, entry in data["corpora"].items():  # type: ignore[attr-defined]
        lines.append(f"  corpus  {name}: {', '.join(f'{count} {what}' for what, count in entry.items() if count)}")
    if as_json:
        click.echo(to_json(data))
    else:
        click.echo("\n".join(lines))
