"""Tiny distributions that extend expertprune, as files: what is left of a wheel when it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def distribution(
    name: str, points: Mapping[str, Mapping[str, str]], modules: Mapping[str, str], version: str = "1.0"
) -> dict[str, str]:
    """The files of a pure Python distribution by path.

    Args:
        points: entry points, `{group: {name: target}}`.
        modules: the text of each file by its path.
    """
    sections = [
        f"[{group}]\n" + "".join(f"{key} = {target}\n" for key, target in each.items())
        for group, each in points.items()
    ]
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    return {
        **modules,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/entry_points.txt": "\n".join(sections),
    }


def unpack(files: Mapping[str, str], folder: Path) -> Path:
    """The distribution as it lies in a folder of `sys.path`."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder
