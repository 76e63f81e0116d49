"""`expertprune bench`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertprune.commands.terminal import (
    base_option,
    common,
    overwrite_picture,
    progress_bar,
    reporting,
    show,
    stopped_by_signals,
    store_option,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertprune.artifacts.timing import Timing


_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("folders", metavar="DIR [-- VLLM ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
@base_option
@click.option("--against", type=click.Path(path_type=Path), help="Compare with this folder instead of the base.")
@click.option("--prompts", default=32, show_default=True, type=_COUNT, help="Requests in each run.")
@click.option("--input-tokens", default=128, show_default=True, type=_COUNT, help="Tokens of each prompt.")
@click.option(
    "--output-tokens", default=64, show_default=True, type=click.IntRange(min=2), help="New tokens of each prompt."
)
@click.option("--concurrency", default=8, show_default=True, type=_COUNT, help="Requests at a time.")
@click.option("--rounds", default=3, show_default=True, type=_COUNT, help="Runs of each model, in turn.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the ratios into this .png or .svg file.")
@overwrite_picture
@store_option
@common
@reporting
def bench(
    folders: tuple[str, ...],
    base: str | None,
    against: Path | None,
    picture: Path | None,
    overwrite: bool,
    store: Path | None,
    as_json: bool,
    **load: int,
) -> None:
    """Time an expert and its base through vLLM, in turn and on the same prompts; writes throughput.json into DIR.

    \b
    expertprune bench experts/medical-qa --rounds 5 --picture throughput.png
    """
    from expertprune.artifacts.timing import Load
    from expertprune.reporting.pictures import check_picture, throughput_picture
    from expertprune.serving import throughput

    places = list(itertools.takewhile(lambda text: not text.startswith("-"), folders))
    if len(places) != 1:
        raise click.UsageError("name one folder before --")
    if base is not None and against is not None:
        raise click.UsageError("give --base or --against, not both")
    if picture is not None:
        check_picture(picture, overwrite=overwrite)
    with stopped_by_signals():
        result = throughput.bench(places[0], base, against, Load(**load), store, folders[1:], progress_bar)
    if picture is not None:
        throughput_picture(result, picture, overwrite)
    show(as_json, result.document(), lambda: throughput_table(result))


def throughput_table(result: Timing) -> RenderableType:
    """Medians of both, their ratio with the smallest and largest pair, and the part of the limit that is reached."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from expertprune.artifacts.timing import METRICS

    load = result.load
    table = Table("", title="Base and expert in turn through vLLM", title_justify="left")
    for header in ("base", "expert", "expert / base", "smallest to largest"):
        table.add_column(header, justify="right")
    for metric, (label, _) in METRICS.items():
        values = [getattr(figures, metric) for figures in (result.models["base"], result.models["expert"])]
        ratio = result.ratios.get(metric)
        cells = ["" if value is None else number(value) for value in values]
        told = [f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"] if ratio else ["", ""]
        table.add_row(Text(label), *cells, *told)
    speed = result.ratios["output_tokens_per_second"].median
    asked = "messages" if load.chat else "prompts"
    about = (
        f"{load.rounds} runs of each: {load.prompts} {asked} of {load.input_tokens} tokens, "
        f"{load.output_tokens} new tokens each, {load.concurrency} at a time.\n"
        f"{speed:.3f} times as fast; the weights read per token would allow {result.limit:.3f}: "
        f"{speed / result.limit:.0%} of the limit."
    )
    return Group(table, Text(about))


def number(value: float) -> str:
    """Four significant digits, or a whole number with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
