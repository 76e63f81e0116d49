"""`expertprune init`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from expertprune.commands.terminal import common, leading_comment, records_table, reporting, show
from expertprune.errors import SpecError
from expertprune.files import OutputKind, check_output, shipped, staged_output
from expertprune.registry import nearest
from expertprune.spec.reading import load_spec

COPY = OutputKind("copy", made=lambda _: False)  # nothing that is there is ever replaced


@click.command()
@click.argument("name", required=False)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="The new spec [default: NAME.yaml, in this folder]."
)
@common
@reporting
def init(name: str | None, out: Path | None, as_json: bool) -> None:
    """Copy a spec that ships with expertprune, to start from. Without NAME, list those specs.

    \b
    expertprune init english-medical-qa --out my-expert.yaml
    """
    specs = {path.stem: path for path in sorted(shipped("profiles").glob("*.yaml"))}
    if name is None:
        if out is not None:
            raise click.UsageError("--out goes with a NAME; without one, the specs are listed")
        listed = [{"name": each, "about": leading_comment(path)} for each, path in specs.items()]
        show(as_json, {"kind": "specs", "specs": listed}, lambda: records_table(listed))
        return
    if name not in specs:
        raise SpecError(f"unknown spec {name!r}{nearest(name, specs)}")
    written = copy_spec(specs[name], out or Path(f"{name}.yaml"))
    data = {"kind": "init", "spec": str(written[0]), "files": [str(path) for path in written]}
    lines = [f"{path}: written" for path in written]
    lines.append(f"edit it, then: expertprune validate {shlex.quote(str(written[0]))}")
    show(as_json, data, lambda: "\n".join(lines))


def copy_spec(spec: Path, out: Path) -> list[Path]:
    """Copy a spec to `out`, and the data files that it names to the same places beside `out`.

    Returns:
        The files that were written, the spec first.

    Raises:
        SpecError: one of them exists already; then none is written.
    """
    copies = {spec: out}
    for source in load_spec(spec).corpora.sources.values():
        named = [*(source.path or []), *(source.evaluation or []), *([source.questions] if source.questions else [])]
        copies |= {Path(file): out.parent / Path(file).relative_to(spec.parent.resolve()) for file in named}
    if there := [str(target) for target in copies.values() if os.path.lexists(target)]:
        raise SpecError(f"{', '.join(there)}: exists already; choose another --out, or remove it")
    for target in copies.values():
        check_output(target, overwrite=False, kind=COPY)
    for original, target in copies.items():
        with staged_output(target, COPY) as temporary:
            temporary.write_bytes(original.read_bytes())
    return list(copies.values())
