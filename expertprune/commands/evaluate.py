"""`expertprune evaluate`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertprune.commands.engines import Where, as_team, engine_options, shard_options, show_report
from expertprune.commands.terminal import (
    base_option,
    common,
    limits_options,
    progress_bar,
    reporting,
    say,
    setting,
    show,
    store_option,
)
from expertprune.commands.tracking import about_expert, log_option, tracked

if TYPE_CHECKING:
    from expertprune.artifacts.evaluation import Evaluation


def _floors(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, float]:
    floors: dict[str, float] = {}
    for part in text.split(",") if text is not None else ():
        group, _sign, value = part.partition("=")
        if group.strip() in floors:
            raise click.BadParameter(f"{group.strip()} is there twice")
        try:
            floors[group.strip()] = float(value)
        except ValueError:
            raise click.BadParameter(f"{part!r} is not GROUP=RETENTION, such as expert=0.97") from None
        if group.strip() not in ("expert", "general") or not 0 < floors[group.strip()] < math.inf:
            raise click.BadParameter(f"{part!r}: give expert or general a retention above 0, such as expert=0.97")
    return floors


@click.command()
@click.argument("expert", type=click.Path(path_type=Path))
@click.option("--corpus", "corpora", multiple=True, help="One of the spec's corpora, such as medical [default: all].")
@click.option(
    "--other", "others", multiple=True, metavar="NAME",
    help="Measure and show this corpus too, which the spec does not name, such as de [default: the spec's].",
)  # fmt: skip
@click.option("--suite", "suites", multiple=True, metavar="NAME|FILE", help="Measure this suite instead.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Measure this task of lm-evaluation-harness.")
@click.option(
    "--backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True,
    help="What runs the tasks: transformers, or a vLLM server.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="At most so many examples of each task.")
@click.option(
    "--fail-under", "floors", callback=_floors, metavar="expert=0.97,general=0.9",
    help="Exit with 1 if an average is below: of bits of text and of accuracy, each of expert and of general.",
)  # fmt: skip
@base_option
@click.option("--documents", type=click.IntRange(min=1), help="At most so many documents of each corpus.")
@setting("evaluate.max_tokens=2048")
@store_option
@limits_options
@shard_options
@engine_options
@log_option
@common
@reporting
@as_team
def evaluate(
    expert: Path,
    corpora: tuple[str, ...],
    others: tuple[str, ...],
    suites: tuple[str, ...],
    tasks: tuple[str, ...],
    backend: str,
    limit: int | None,
    floors: dict[str, float],
    base: str | None,
    documents: int | None,
    overrides: dict[str, Any],
    store: Path | None,
    where: Where,
    tracker: str | None,
    as_json: bool,
) -> None:
    """Measure what an expert kept of its base, and record it in the expert's folder.

    \b
    expertprune evaluate experts/medical-qa --suite medical --suite general --fail-under expert=0.97,general=0.9
    """
    overrides |= {"evaluate.documents": documents} if documents else {}
    overrides |= {"evaluate.others": list(others)} if others else {}
    shard = where.share(store)
    if not suites and not tasks:
        if where.tasks:
            raise click.UsageError("--engine ray, --shard and --collect run suites: give --suite or --task")
        if limit is not None or backend != "hf":
            raise click.UsageError("--limit and --backend need --suite or --task")
        from expertprune.stages import evaluate as stage

        with tracked(tracker, lambda: about_expert(expert)) as run:
            track = progress_bar if run is None else run.track(progress_bar)
            result = stage.evaluate(expert, list(corpora), base, store, overrides, track, floors)
            if run is not None:
                run.evaluation(result)
        _finish(result, floors, as_json)
        return
    if corpora or others:
        given = "--corpus" if corpora else "--other"
        raise click.UsageError(f"give {given} without --suite and --task: a suite names its own corpora")
    from expertprune.stages import suites as measuring

    if shard is not None:
        for key, value in (("--log", tracker), ("--fail-under", floors or None)):
            if value is not None:
                raise click.UsageError(f"{key}: a shard knows only its own part; give {key} with --collect")
        asked = measuring.SuiteRequest(
            expert, suites, tasks, backend, limit, base, store, overrides  # type: ignore[arg-type]
        )  # fmt: skip
        show_report(measuring.suites_shard(asked, shard, progress_bar), shard, as_json)
        return
    with where.opened(store) as engine, tracked(tracker, lambda: about_expert(expert)) as run:
        track = progress_bar if run is None else run.track(progress_bar)
        found = measuring.evaluate_suites(
            expert, suites, tasks, backend, limit, base, store, overrides, floors, track, engine  # type: ignore[arg-type]
        )  # fmt: skip
        if run is not None:
            run.evaluation(found)
    _finish(found, floors, as_json)


def _finish(found: Evaluation, floors: dict[str, float], as_json: bool) -> None:
    """Show an evaluation; exit with 1 where an average is below its floor."""
    from expertprune.engine.team import team
    from expertprune.evaluation.retention import held, shortfalls
    from expertprune.reporting.tables import retention_table

    show(as_json, found.document(), lambda: retention_table(found))
    short = shortfalls(found.summary, floors)
    lines = [f"above the floor: {line}" for line in held(found.summary, floors)]
    lines += [f"below the floor: {line}" for line in short]
    for line in lines if team().leads else ():
        say(line, error=True)
    if short:
        sys.exit(1)
