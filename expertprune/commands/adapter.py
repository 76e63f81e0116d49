"""`expertprune adapter`: a LoRA adapter of the base, for an expert."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from expertprune.commands.terminal import common, reporting, show

_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank; the first is its default


@click.command()
@click.argument("adapter", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option("--expert", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The expert's folder.")
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The cut adapter's folder."
)
@click.option("--overwrite", is_flag=True, help="Replace the cut adapter that is there.")
@click.option("--same-base", is_flag=True, help="Its base is the expert's, though the adapter names it otherwise.")
@common
@reporting
def adapter(adapter: Path, expert: Path, out: Path, overwrite: bool, same_base: bool, as_json: bool) -> None:
    """Cut a LoRA adapter of the base along with an expert.

    ADAPTER is a folder that PEFT wrote. The cut adapter loads in PEFT and in vLLM beside the expert.

    \b
    expertprune adapter adapters/triage --expert experts/medical-qa --out adapters/triage-medical-qa
    """
    from expertprune.stages import adapter as stage

    cut = stage.cut_adapter(adapter, expert, out, overwrite, same_base)
    lora = shlex.quote(f"{out.name}={out}")
    most = next((each for each in _RANKS if each >= cut.rank), cut.rank)
    rank = "" if cut.rank <= _RANKS[0] else f" --max-lora-rank {most}"
    show(
        as_json,
        cut.document(),
        lambda: (
            f"{out}: {cut.after:,} of {cut.before:,} parameters, for the expert {cut.expert}\n"
            f"serve it: expertprune serve {shlex.quote(str(expert))} -- --enable-lora{rank} --lora-modules {lora}"
        ),
    )
