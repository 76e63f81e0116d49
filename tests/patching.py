"""Replace a function of the package wherever a module has imported it, and let a folder refuse to be written."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import expertprune


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let nothing be made in a folder. The superuser may write anywhere, so its mode alone would not do."""
    real = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path.absolute().parent == folder.absolute():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)


def everywhere(monkeypatch: pytest.MonkeyPatch, path: str, new: Any) -> Any:
    """Put `new` in the place of what `path` names, in every module of the package; the original is returned."""
    for each in expertprune.__all__:  # imported only now, a module would keep the new function after the test
        getattr(expertprune, each)
    home, _, name = path.rpartition(".")
    original = getattr(importlib.import_module(home), name)
    for module in [each for key, each in sys.modules.items() if key.partition(".")[0] == "expertprune"]:
        for attribute, value in list(vars(module).items()):
            if value is original:
                monkeypatch.setattr(module, attribute, new)
    return original
