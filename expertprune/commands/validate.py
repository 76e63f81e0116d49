"""`expertprune validate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertprune.commands.terminal import (
    common,
    limits_options,
    reporting,
    set_option,
    show,
    spec_argument,
    store_option,
)

if TYPE_CHECKING:
    from expertprune.stages.validate import Prepared


@click.command()
@spec_argument
@set_option
@store_option
@limits_options
@common
@reporting
def validate(spec: Path, overrides: dict[str, Any], store: Path | None, as_json: bool) -> None:
    """Check a spec and what it names: base, corpora, budget.

    No weights are read, unless a corpus has `generate` and its text is not in the store yet.

    A few seconds of measurement forecast what a build takes where nothing is stored yet.

    \b
    expertprune validate profiles/english-medical-qa.yaml
    """
    from expertprune.spec.values import Coverage
    from expertprune.stages import validate as stage
    from expertprune.stages.forecast import forecast
    from expertprune.stages.outlook import notes

    prepared = stage.validate(spec, overrides, store)
    expected = forecast(prepared)
    data = _document(prepared) | {"notes": list(notes(prepared)), "forecast": expected.document()}
    more = isinstance(prepared.spec.budget.vocabulary, Coverage)
    lines = [*_lines(data, more), *(f"  build   {line}" for line in expected.lines())]
    show(as_json, data, lambda: "\n".join([f"{spec}: valid", *lines]))


def _document(prepared: Prepared) -> dict[str, Any]:
    """What is known before a model runs."""
    from expertprune.composition.parameters import removed_parameters, removed_with_rows
    from expertprune.composition.widths import summary

    spec, base, widths, rows = prepared.spec, prepared.base, prepared.widths, prepared.rows
    before, after, budget = base.checkpoint.parameters, None, None
    if widths is not None:
        after = before - removed_parameters(base, widths) - removed_with_rows(base, rows)
        if len({layer for layer in widths if not layer.gone}) == 1:
            entries = summary(spec.budget, base.layers, widths)
            budget = {structure: entry.document() for structure, entry in entries.items()}
    evaluated = {corpus.name: corpus for corpus in prepared.evaluated}
    return {
        "kind": "validation",
        "name": spec.name,
        "decided": {
            **spec.relevance.model_dump(include={"criterion", "experts"}, exclude_none=True),
            "allocation": spec.compose.allocation,
        },
        "base": {"model": base.name, "path": str(base.folder), "parameters": before},
        "expert": {"parameters": after, "budget": budget, "rows": rows},
        "corpora": {
            str(name): {
                "calibration": len(corpus.calibration),
                "evaluation": len(evaluated[name].evaluation) if name in evaluated else 0,
                "questions": len(evaluated[name].questions) if name in evaluated else 0,
            }
            for name, corpus in prepared.corpora.items()
        },
    }


def _lines(data: dict[str, Any], more: bool) -> Iterator[str]:
    """The same for people; `more` says that vocabulary rows go too, as many as their coverage allows."""
    base, after = data["base"], data["expert"]["parameters"]
    yield f"  base    {base['model']}, {base['parameters']:,} parameters"
    size = f"{after:,} parameters" if after is not None else "as small as its retention allows"
    yield f"  expert  {size}" + ("; coverage decides how many vocabulary rows go as well" if more else "")
    yield "  units   " + ", ".join(f"{key} {value}" for key, value in data["decided"].items())
    for name, counts in data["corpora"].items():
        yield f"  corpus  {name}: {', '.join(f'{count} {what}' for what, count in counts.items() if count)}"
    yield from (f"  note    {note}" for note in data["notes"])
