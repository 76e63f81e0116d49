"""`expertprune export`: an expert for other engines."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from expertprune.commands.terminal import common, overwrite_file, reporting, show


@click.command()
@click.argument("expert", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--format", "kind", default="gguf", show_default=True, help="File format; gguf is the only one.")
@click.option(
    "--type", "stored", default="f16", show_default=True, help="Type of the stored matrices: f32, f16, bf16 or q8_0."
)
@overwrite_file
@common
@reporting
def export(expert: Path, out: Path, kind: str, stored: str, overwrite: bool, as_json: bool) -> None:
    """Write an expert as one file for other engines.

    \b
    expertprune export experts/medical-qa --format gguf --type q8_0 --out medical-qa.gguf
    """
    from expertprune.arch import gguf_names
    from expertprune.stages import export as stage

    written = stage.export(expert, out, kind, stored, overwrite)
    size = out.stat().st_size
    data = {
        "kind": "export", "format": kind, "file": str(out), "bytes": size, "architecture": written.architecture,
        "context": written.context, "tensors": written.tensors,
    }  # fmt: skip
    quantize = shlex.join([gguf_names().quantizer, str(out), str(out.with_name(f"{out.stem}-q4_k_m.gguf")), "Q4_K_M"])
    fewer = "" if stored == "q8_0" else f"\nin fewer bits, by {gguf_names().engine}: {quantize}"
    counts = ", ".join(f"{count} {name}" for name, count in sorted(written.tensors.items()))
    what = f"{out}: {size / 1e6:.1f} MB, architecture {written.architecture}, tensors: {counts}"
    show(as_json, data, lambda: what + fewer)
