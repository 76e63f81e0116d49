"""The command line: one command per stage. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertprune import __version__
from expertprune.errors import ExpertpruneError, SpecError
from expertprune.files import check_parent, to_json

F = TypeVar("F", bound=Callable[..., Any])
output = Console()
if not output.is_terminal:  # a pipe or a file has no width of its own
    output = Console(width=120)
messages = Console(stderr=True)


def _reporting(command: F) -> F:
    """User's mistakes become a message and exit code 2, an interruption exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A terminated process cleans up as an interrupted one does: staged folders vanish.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return command(*args, **kwargs)
        except ExpertpruneError as error:
            problems = error.problems if isinstance(error, SpecError) else [str(error)]
            for problem in problems:
                click.echo(f"error: {problem}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing half-written is left; stored profiles are kept for the next run", err=True)
            sys.exit(1)

    return run  # type: ignore[return-value]


def _common(command: F) -> F:
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for machines.")(command)
    return click.option("-v", "--verbose", is_flag=True, callback=_logs, expose_value=False, help="Show logs.")(command)


def _logs(_: click.Context, __: click.Parameter, verbose: bool) -> None:
    handler = RichHandler(console=messages, show_path=False, markup=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


_store = click.option(
    "--store", type=click.Path(file_okay=False, path_type=Path), envvar="EXPERTPRUNE_STORE",
    help="Folder of stored profiles [default: EXPERTPRUNE_STORE, else the user's cache].",
)  # fmt: skip
_spec = click.argument("spec", type=click.Path(path_type=Path))
_overwrite = click.option("--overwrite", is_flag=True, help="Replace an expert that is there.")


def _settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    settings = {}
    for value in values:
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE, such as budget.ffn=0.3")
        try:
            settings[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise click.BadParameter(f"{text!r} is not a YAML value") from None
    return settings


_set = click.option(
    "--set", "overrides", multiple=True, callback=_settings, metavar="KEY=VALUE", help="Change a key of the spec."
)


@contextlib.contextmanager
def _track(stage: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages) as progress:
        task = progress.add_task(stage, total=steps)

        def step() -> None:
            done = progress.tasks[0].completed + 1
            progress.update(task, completed=done, total=max(steps, done))

        yield step
        progress.update(task, total=progress.tasks[0].completed)


def _print(as_json: bool, data: Any, text: Callable[[], Any]) -> None:
    if as_json:
        click.echo(to_json(data))
    else:
        output.print(text())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="expertprune")
def main() -> None:
    """Turn a general language model into a compact expert for a language, a domain and a task.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa
    """


@main.command()
@_spec
@_set
@_store
@_common
@_reporting
def validate(spec: Path, overrides: dict[str, Any], store: Path | None, as_json: bool) -> None:
    """Check a spec and all that it names: base, corpora, budget.

    \b
    expertprune validate profiles/english-medical-qa.yaml
    """
    from expertprune import api
    from expertprune.budgets import removed_parameters
    from expertprune.composition import foreseen_widths

    prepared = api.validate(spec, overrides, store)
    widths = foreseen_widths(prepared.spec, prepared.base)
    before = prepared.base.checkpoint.parameters
    after = before - removed_parameters(prepared.base, widths) if widths is not None else None
    budget = widths.summary(prepared.base.layers) if widths is not None and widths.uniform else None
    data = {
        "kind": "validation",
        "name": prepared.spec.name,
        "base": {"model": prepared.base.name, "path": str(prepared.base.folder), "parameters": before},
        "expert": {"parameters": after, "budget": budget},
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
        "  expert  " + (f"{after:,} parameters" if after is not None else "as small as its retention allows"),
    ]
    for name, entry in data["corpora"].items():  # type: ignore[attr-defined]
        lines.append(f"  corpus  {name}: {', '.join(f'{count} {what}' for what, count in entry.items() if count)}")
    if as_json:
        click.echo(to_json(data))
    else:
        click.echo("\n".join(lines))


@main.command()
@_spec
@_set
@_store
@_common
@_reporting
def profile(spec: Path, overrides: dict[str, Any], store: Path | None, as_json: bool) -> None:
    """Measure every corpus of a spec; what is stored already is not measured again.

    \b
    expertprune profile profiles/english-medical-qa.yaml
    """
    from expertprune import api

    profiles = api.profile(spec, store, overrides, _track)
    data = {str(name): {"path": str(p.path), "tokens": p.tokens, "digest": p.digest} for name, p in profiles.items()}
    if as_json:
        click.echo(to_json({"kind": "profiles", "profiles": data}))
    else:
        for name, entry in data.items():
            click.echo(f"{name}: {entry['tokens']:,} tokens, {entry['path']}")


@main.command()
@_spec
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The plan, a JSON file.")
@click.option("--stored-only", is_flag=True, help="Fail where a profile is missing, instead of measuring it.")
@_set
@_store
@_common
@_reporting
def compose(
    spec: Path, out: Path, stored_only: bool, overrides: dict[str, Any], store: Path | None, as_json: bool
) -> None:
    """Decide which units are kept, and write the decision as a plan.

    \b
    expertprune compose profiles/english-medical-qa.yaml --out plan.json
    """
    from expertprune import api, inspection

    check_parent(out)
    plan = api.compose(spec, store, overrides, _track, run=not stored_only)
    plan.save(out)
    _print(as_json, plan.document(), lambda: inspection.explain(plan.document()))


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The expert's folder.")
@_overwrite
@_store
@_common
@_reporting
def prune(plan: Path, out: Path, overwrite: bool, store: Path | None, as_json: bool) -> None:
    """Apply a plan: cut, repair, write the expert.

    \b
    expertprune prune plan.json --out experts/medical-qa
    """
    from expertprune import api

    _print_expert(api.prune(plan, out, overwrite, store, _track), as_json)


@main.command()
@_spec
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The expert's folder.")
@_set
@_overwrite
@_store
@_common
@_reporting
def build(spec: Path, out: Path, overrides: dict[str, Any], overwrite: bool, store: Path | None, as_json: bool) -> None:
    """From a spec to an evaluated expert: profile, compose, prune, evaluate.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa --set budget.ffn=0.3
    """
    from expertprune import api

    _print_expert(api.build(spec, out, overrides, overwrite, store, _track), as_json)


@main.command()
@click.argument("expert", type=click.Path(path_type=Path))
@click.option("--corpus", "corpora", multiple=True, help="One of the spec's corpora, such as medical [default: all].")
@click.option("--base", type=click.Path(path_type=Path), help="The base's folder, if it has moved.")
@click.option("--documents", type=click.IntRange(min=1), help="At most so many documents of each corpus.")
@_store
@_common
@_reporting
def evaluate(
    expert: Path, corpora: tuple[str, ...], base: Path | None, documents: int | None, store: Path | None, as_json: bool
) -> None:
    """Measure what an expert kept of its base, and write it into the expert's folder.

    \b
    expertprune evaluate experts/medical-qa --corpus medical
    """
    from expertprune import api
    from expertprune.report import retention_table

    overrides = {"evaluate.documents": documents} if documents else {}
    result = api.evaluate(expert, list(corpora), base and base.resolve(), store, overrides, _track).document()
    _print(as_json, result, lambda: retention_table(result))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@_common
@_reporting
def inspect(artifact: Path, as_json: bool) -> None:
    """Explain a spec, a profile, a plan or an expert.

    \b
    expertprune inspect experts/medical-qa
    """
    from expertprune import inspection

    about = inspection.describe(artifact)
    _print(as_json, about, lambda: inspection.explain(about))


@main.command()
@_reporting
def schema() -> None:
    """Print the JSON schema of a spec, for editors.

    \b
    expertprune schema > expertprune.schema.json
    """
    from expertprune.spec import Spec

    click.echo(json.dumps(Spec.model_json_schema(by_alias=True), indent=2))


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
    click.echo(f"serve it:   {sys.executable} -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --model {folder}")


if __name__ == "__main__":
    main()
