"""The house rules that a test can hold: imports go one way, family names live in one place, files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import expertprune

PACKAGE = Path(expertprune.__file__).parent
# A module may import what stands before it, never what stands after it. A folder counts as one module.
ORDER = [
    "errors", "registry", "units", "files", "values", "formats", "tokenizing", "spec",
    "arch", "checkpoint", "admission", "gguf_files", "models", "artifacts", "corpora", "suites", "harness", "relevance",
    "layerwise", "passes", "predictions", "profiling", "scoring", "legality", "defaults", "budgets", "allocation",
    "rows", "composition", "comparison", "masking", "compensation", "pruning", "oracle", "evaluation", "alignment",
    "retention", "preparing", "deciding", "retaining", "report", "pictures", "api", "analysis", "sweeping", "tradeoff",
    "inspection", "serving", "measurement", "measuring",
    "page", "terminal", "commands", "cli",
]  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in SOURCES if path != PACKAGE / "__init__.py"]
LONGEST = 400


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our own package, those inside functions and behind TYPE_CHECKING too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [node.module or ""]
            if node.module == "expertprune":
                names = [f"expertprune.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "expertprune" and rest and not rest.startswith("__"):
                yield node.lineno, rest.partition(".")[0]


def breaches(path: Path, text: str) -> list[str]:
    own = module_of(path)
    return [
        f"line {line}: {own} imports {other}"
        for line, other in imported(ast.parse(text))
        if other != own and ORDER.index(other) > ORDER.index(own)
    ]


def test_every_module_has_a_place_in_the_order() -> None:
    assert sorted({module_of(path) for path in MODULES}) == sorted(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_go_up_the_order_only(path: Path) -> None:
    assert breaches(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "from expertprune.cli import main",
        "import expertprune.api",
        "from expertprune import api",
        "def f():\n    from expertprune.api import build",
        "if True:\n    from expertprune.relevance.statistics import criteria",
    ],
)
def test_an_import_that_goes_down_would_be_seen(text: str) -> None:
    assert len(breaches(PACKAGE / "files.py", text)) == 1
    assert breaches(PACKAGE / "files.py", "from expertprune.errors import SpecError\nimport os") == []


def family_names() -> set[str]:
    """What the families' own files say: the family's name and its config's model types."""
    names: set[str] = set()
    for path in (PACKAGE / "arch" / "families").glob("*.yaml"):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        names |= {data["family"], *data["model_types"]}
    return names


@pytest.mark.parametrize("path", [path for path in SOURCES if module_of(path) != "arch"], ids=label)
def test_no_family_is_named_outside_its_own_folder(path: Path) -> None:
    assert "llama" in family_names()
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(family_names())))})\b", re.IGNORECASE)
    found = [
        f"line {number}: {match.group()}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_file_is_longer_than_can_be_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def dangers(text: str) -> list[str]:
    """Calls and imports that could run code from a file: pickle and its relatives, and torch.load."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        found += [name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle", "shelve")]
        found += [name for name in names if name == "torch.load"]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            found += [called] if called == "torch.load" or node.value.id == "pickle" else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_nothing_reads_a_pickle(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text", ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load"]
)
def test_a_pickle_would_be_seen(text: str) -> None:
    assert dangers(text) != []


def prints(text: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


@pytest.mark.parametrize("path", [path for path in SOURCES if module_of(path) != "cli"], ids=label)
def test_only_the_command_line_prints(path: Path) -> None:
    assert prints(path.read_text(encoding="utf-8")) == []


def test_a_print_would_be_seen() -> None:
    assert prints("x = 1\nprint(x)\nconsole.print(x)") == [2]


HEAVY = {"torch", "transformers", "datasets", "numpy", "scipy", "sklearn", "safetensors", "matplotlib"}


def at_import(path: Path, seen: set[Path]) -> set[str]:
    """Packages that a file imports as soon as it is imported itself, through our own modules too."""
    seen.add(path)
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            found.add(package)
            inner = PACKAGE.joinpath(*parts)
            file = inner / "__init__.py" if inner.is_dir() else inner.with_suffix(".py")
            if package == "expertprune" and file not in seen:
                found |= at_import(file, seen)
    return found


@pytest.mark.parametrize("name", ["__init__.py", "cli.py", "spec.py"])
def test_importing_the_package_the_commands_or_the_spec_loads_no_heavy_library(name: str) -> None:
    """`import expertprune`, `--help` and `schema` stay quick: torch and its like come with their first use."""
    assert at_import(PACKAGE / name, set()) & HEAVY == set()


def test_matplotlib_comes_with_the_first_picture() -> None:
    assert "matplotlib" not in at_import(PACKAGE / "analysis.py", set())


def test_a_heavy_library_would_be_seen() -> None:
    assert at_import(PACKAGE / "api.py", set()) >= {"torch", "safetensors"}
