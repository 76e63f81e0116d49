"""The commands and snippets of README and of the pages in `docs/`, read out of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def page(path: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(language: str, text: str | None = None) -> list[str]:
    """The contents of a text's fenced blocks of a language, in order; default: README's."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text or page("README.md"), re.MULTILINE | re.DOTALL)
    return [inside for named, inside in found if named == language]


def commands() -> list[str]:
    """Every line that README tells a user to type."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
