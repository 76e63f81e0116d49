"""The command line: one command per stage. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from expertprune import __version__
from expertprune.commands.evaluating import evaluate
from expertprune.commands.exporting import export
from expertprune.commands.families import families
from expertprune.commands.reporting import report
from expertprune.commands.serving import serve
from expertprune.commands.throughput import bench
from expertprune.commands.vocabulary import vocabulary
from expertprune.files import check_parent, to_json
from expertprune.terminal import (
    common,
    output,
    overwrite_option,
    progress_bar,
    reporting,
    set_option,
    show,
    spec_argument,
    store_option,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="expertprune")
def main() -> None:
    """Turn a general language model into a compact expert for a language, a domain and a task.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa
    """


@main.command()
@spec_argument
@set_option
@store_option
@common
@reporting
def validate(spec: Path, overrides: dict[str, Any], store: Path | None, as_json: bool) -> None:
    """Check a spec and all that it names: base, corpora, budget.

    \b
    expertprune validate profiles/english-medical-qa.yaml
    """
    from expertprune import api
    from expertprune.budgets import removed_parameters, removed_with_rows
    from expertprune.composition import foreseen_widths
    from expertprune.rows import foreseen_rows

    prepared = api.validate(spec, overrides, store)
    widths = foreseen_widths(prepared.spec, prepared.base)
    before = prepared.base.checkpoint.parameters
    rows = foreseen_rows(prepared.spec, prepared.base)
    after = before - removed_parameters(prepared.base, widths) if widths is not None else None
    after = after - removed_with_rows(prepared.base, rows) if after is not None else None
    budget = widths.summary(prepared.base.layers) if widths is not None and widths.uniform else None
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
        + (", less the rows that its coverage needs not" if isinstance(prepared.spec.budget.vocabulary, dict) else ""),
    ]
    lines.append("  " + "units".ljust(8) + ", ".join(f"{key} {value}" for key, value in decided.items()))
    for name, entry in data["corpora"].items():  # type: ignore[attr-defined]
        lines.append(f"  corpus  {name}: {', '.join(f'{count} {what}' for what, count in entry.items() if count)}")
    if as_json:
        click.echo(to_json(data))
    else:
        click.echo("\n".join(lines))


@main.command()
@spec_argument
@set_option
@store_option
@common
@reporting
def profile(spec: Path, overrides: dict[str, Any], store: Path | None, as_json: bool) -> None:
    """Measure every corpus of a spec; what is stored already is not measured again.

    \b
    expertprune profile profiles/english-medical-qa.yaml
    """
    from expertprune import api

    profiles = api.profile(spec, store, overrides, progress_bar)
    data = {str(name): {"path": str(p.path), "tokens": p.tokens, "digest": p.digest} for name, p in profiles.items()}
    if as_json:
        click.echo(to_json({"kind": "profiles", "profiles": data}))
    else:
        for name, entry in data.items():
            click.echo(f"{name}: {entry['tokens']:,} tokens, {entry['path']}")


@main.command()
@spec_argument
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The plan, a JSON file.")
@click.option("--stored-only", is_flag=True, help="Fail where a profile is missing, instead of measuring it.")
@set_option
@store_option
@common
@reporting
def compose(
    spec: Path, out: Path, stored_only: bool, overrides: dict[str, Any], store: Path | None, as_json: bool
) -> None:
    """Decide which units are kept, and write the decision as a plan.

    \b
    expertprune compose profiles/english-medical-qa.yaml --out plan.json
    """
    from expertprune import api, inspection

    check_parent(out)
    plan = api.compose(spec, store, overrides, progress_bar, run=not stored_only)
    plan.save(out)
    show(as_json, plan.document(), lambda: inspection.explain(plan.document()))


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The expert's folder.")
@overwrite_option
@store_option
@common
@reporting
def prune(plan: Path, out: Path, overwrite: bool, store: Path | None, as_json: bool) -> None:
    """Apply a plan: cut, repair, write the expert.

    \b
    expertprune prune plan.json --out experts/medical-qa
    """
    from expertprune import api

    _print_expert(api.prune(plan, out, overwrite, store, progress_bar), as_json)


@main.command()
@spec_argument
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The expert's folder.")
@set_option
@overwrite_option
@store_option
@common
@reporting
def build(spec: Path, out: Path, overrides: dict[str, Any], overwrite: bool, store: Path | None, as_json: bool) -> None:
    """From a spec to an evaluated expert: profile, compose, prune, evaluate.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa --set budget.ffn=0.3
    """
    from expertprune import api

    _print_expert(api.build(spec, out, overrides, overwrite, store, progress_bar), as_json)


def _fractions(_: click.Context, __: click.Parameter, text: str) -> list[float]:
    fractions, wrong = [], []
    for part in text.split(","):
        try:
            fractions.append(float(part))
        except ValueError:
            wrong.append(repr(part.strip()))
    if wrong:
        raise click.BadParameter(f"{', '.join(wrong)}: not a number; give fractions such as 0.1,0.25,0.5")
    return fractions


@main.command()
@spec_argument
@click.option(
    "--budgets", required=True, callback=_fractions, metavar="FRACTIONS",
    help="What is removed, such as 0.1,0.25,0.5: of all parameters if the spec's budget says parameters or "
    "max_parameters, else of each structure that it names.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for sweep.json, written after each budget; the same sweep goes on from there.",
)  # fmt: skip
@click.option("--keep-experts", is_flag=True, help="Keep the experts too, in OUT/NAME-BUDGET.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the curve into this .png or .svg file.")
@set_option
@store_option
@common
@reporting
def sweep(
    spec: Path,
    budgets: list[float],
    out: Path | None,
    keep_experts: bool,
    picture: Path | None,
    overrides: dict[str, Any],
    store: Path | None,
    as_json: bool,
) -> None:
    """Show what experts of several sizes keep: one profile, many plans.

    \b
    expertprune sweep profiles/english-medical-qa.yaml --budgets 0.1,0.3,0.5 --picture sweep.png
    """
    from expertprune import sweeping
    from expertprune.pictures import check_picture, retention_curve
    from expertprune.report import sweep_table

    if picture is not None:
        check_picture(picture, made=out)
    result = sweeping.sweep(spec, budgets, out, keep_experts, store, overrides, progress_bar).document()
    if picture is not None:
        retention_curve(result["points"], picture)
    show(as_json, result, lambda: sweep_table(result))


@main.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Compare with every other stored profile of the base too.")
@click.option("--fraction", default=0.25, show_default=True, help="Which part of each layer's units is irrelevant.")
@click.option(
    "--structure", "structures", multiple=True, type=click.Choice(["ffn", "query_heads", "kv_groups", "experts"]),
    help="Compare these units only [default: all three].",
)  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path), help="Draw heat maps into this .png or .svg file.")
@set_option
@store_option
@common
@reporting
def compare(specs: tuple[Path, ...], overrides: dict[str, Any], as_json: bool, **options: Any) -> None:
    """Show how much the units that corpora need have in common, and which corpora are alike.

    \b
    expertprune compare profiles/english-medical-qa.yaml --picture overlap.png
    """
    from expertprune import analysis
    from expertprune.report import comparison_tables

    result = analysis.compare(list(specs), overrides=overrides, track=progress_bar, **options).document()
    show(as_json, result, lambda: comparison_tables(result))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@common
@reporting
def inspect(artifact: Path, as_json: bool) -> None:
    """Explain a spec, a profile, a plan or an expert.

    \b
    expertprune inspect experts/medical-qa
    """
    from expertprune import inspection

    about = inspection.describe(artifact)
    show(as_json, about, lambda: inspection.explain(about))


@main.command()
@reporting
def schema() -> None:
    """Print the JSON schema of a spec, for editors.

    \b
    expertprune schema > expertprune.schema.json
    """
    from expertprune.spec import Spec

    click.echo(json.dumps(Spec.model_json_schema(by_alias=True), indent=2))


for command in (bench, evaluate, export, families, report, serve, vocabulary):
    main.add_command(command)


def _print_expert(folder: Path, as_json: bool) -> None:
    from expertprune.api import load_expert
    from expertprune.report import folder_size, retention_table

    about = load_expert(folder)
    if as_json:
        click.echo(to_json({**about, "folder": str(folder), "bytes": folder_size(folder)}))
        return
    if about["evaluation"]:
        output.print(retention_table(about["evaluation"]))
    before, after = about["parameters"]["before"], about["parameters"]["after"]
    click.echo(f"expert:     {folder} ({folder_size(folder) / 1e6:.1f} MB)")
    click.echo(f"parameters: {after:,} of {before:,} ({after / before:.1%})")
    click.echo(f"serve it:   expertprune serve {shlex.quote(str(folder))}")


if __name__ == "__main__":
    main()
