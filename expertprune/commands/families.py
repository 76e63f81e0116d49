"""`expertprune families`: which model families can be cut, and whether one model can."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertprune.commands.terminal import common, reporting, show, store_option
from expertprune.errors import SpecError
from expertprune.files import not_a_folder

if TYPE_CHECKING:
    from expertprune.arch import Family


@click.command()
@click.option(
    "--check",
    "folder",
    type=click.Path(path_type=Path),
    help="Check the model in this folder: on a tiny random copy, cutting must equal masking.",
)
@click.option("--trust-remote-code", is_flag=True, help="With --check: run Python code that comes with the model.")
@store_option
@common
@reporting
def families(folder: Path | None, trust_remote_code: bool, store: Path | None, as_json: bool) -> None:
    """List the model families that can be cut, or check one model.

    \b
    expertprune families
    expertprune families --check path/to/model
    """
    if folder is None:
        if trust_remote_code:
            raise click.UsageError("--trust-remote-code goes with --check: a list runs no code of a model")
        from expertprune.arch import families as known

        listed = sorted({each.family: each for each in known().values()}.values(), key=lambda each: each.family)
        data = {"kind": "families", "families": [_document(each) for each in listed]}
        show(as_json, data, lambda: _table(listed))
        return
    if problem := not_a_folder(folder):
        raise SpecError(f"--check: {folder}: {problem}")
    checked = _checked(folder, trust_remote_code, store)
    how = "listed" if checked["listed"] else "not listed, recognized by its tensors"
    text = f"{folder}: family {checked['family']} ({how}); cutting equals masking: {', '.join(checked['held'])}"
    show(as_json, checked, lambda: text)


# Both ways work for the same families: those with a class that builds layers one by one.
_ROUTES = {"plugin": "own class", "stock": "Transformers backend"}
_WIDTHS = {"plugin": "different widths per layer: vLLM with the plugin", "stock": "stock vLLM"}


def _document(family: Family) -> dict[str, Any]:
    """What a family allows: the structures that can be cut, and how vLLM serves layers of different widths.

    Of `vllm_routes`, `plugin` is this package's plugin around vLLM's own class. `stock` is vLLM's Transformers
    backend, which runs the expert's modeling file.
    """
    return {
        "family": family.family,
        "model_types": list(family.model_types),
        "structures": [structure.value for structure in family.structures],
        "why_no_heads": family.why_no_heads,
        "layer_widths": {"transformers": True, "vllm": bool(family.vllm_single_layers)},
        "vllm_routes": _routes(family),
    }


def _routes(family: Family) -> dict[str, str]:
    return dict(_ROUTES) if family.vllm_single_layers else {}


def _table(families: Sequence[Family]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("family", "model_type", "structures that can be cut", *(_WIDTHS[route] for route in _ROUTES))
    for each in families:
        structures = ", ".join(structure.value for structure in each.structures)
        routes = (_routes(each).get(route, "no") for route in _ROUTES)
        table.add_row(each.family, ", ".join(each.model_types), structures, *routes)
    notes = [f"{each.family}: no heads, since {each.why_no_heads}" for each in families if each.why_no_heads]
    notes.append(
        "Where vLLM has no way, compose.allocation: uniform gives all layers the same widths. The Transformers backend "
        "needs --trust-remote-code."
    )
    notes.append(
        "A model of another family is accepted if its tensors look like a gated FFN (gate_proj, up_proj, down_proj) and "
        "attention heads (q_proj, k_proj, v_proj, o_proj), and if cutting equals masking on a tiny random copy. "
        "To test this, run: expertprune families --check FOLDER."
    )
    return Group(table, *(Text(note) for note in notes))


def _checked(folder: Path, trust_remote_code: bool, store: Path | None) -> dict[str, Any]:
    from expertprune.arch import families as known
    from expertprune.files import store_folder
    from expertprune.models.admission import log as admission
    from expertprune.models.base import resolve_base
    from expertprune.pruning.selfcheck import check_family
    from expertprune.spec.schema import Base

    level = admission.level
    admission.setLevel(logging.ERROR)  # the result below says the same
    try:
        base = resolve_base(Base(model=str(folder), trust_remote_code=trust_remote_code), store_folder(store))
    finally:
        admission.setLevel(level)
    held = check_family(base, layer_widths=True, layers=True)
    listed = base.checkpoint.config["model_type"] in known()
    return {"kind": "family check", "family": base.family.family, "listed": listed, "held": held}
