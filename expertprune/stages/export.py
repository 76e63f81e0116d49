"""Write an expert as one file for other engines."""

from __future__ import annotations

from pathlib import Path

from expertprune.artifacts.expert import Expert
from expertprune.errors import CheckpointError, UsageError
from expertprune.files import EXPERT_FILE, GGUF, check_output
from expertprune.models.gguf.writing import TYPES, Exported, write_gguf
from expertprune.registry import nearest

FORMATS = ("gguf",)


def export(
    folder: str | Path, out: str | Path, format: str = "gguf", type: str = "f16", overwrite: bool = False
) -> Exported:
    """Write an expert, or any other model's folder that could be a base, as one file.

    Args:
        format: `gguf`, the only one.
        type: how matrices are stored: `f32`, `f16`, `bf16` or `q8_0`.

    Raises:
        UsageError: no such format or type.
        CheckpointError: `out` is there, lies in the folder or does not end in .gguf, or the model cannot be expressed in
            the format.
    """
    folder, out = Path(folder), Path(out)
    for asked, known, option in ((format, FORMATS, "--format"), (type, TYPES, "--type")):
        if asked not in known:
            raise UsageError(f"{option}: {asked!r} is none of {', '.join(known)}{nearest(asked, known)}")
    check_output(out, overwrite, GGUF, [folder])
    if out.suffix.lower() != ".gguf":
        raise CheckpointError(f"{out}: a GGUF file ends in .gguf; choose another --out")
    if folder.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out}: {folder} would then hold a second model; choose --out outside of it")
    name = Expert.load(folder).name if (folder / EXPERT_FILE).is_file() else folder.resolve().name
    return write_gguf(folder, out, type, name, overwrite)
