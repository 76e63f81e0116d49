"""The house rules that a test can hold: imports go one way, family names live in one place, files stay small."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import expertprune

PACKAGE = Path(expertprune.__file__).parent
# A room may import from itself and from the rooms before it.
ORDER = [
    "errors", "registry", "units", "files", "formats", "progress", "spec", "corpora", "arch", "tokenizing", "relevance",
    "models", "artifacts", "engine", "profiling", "composition", "pruning", "evaluation", "serving", "reporting", "stages",
    "commands", "cli",
]  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(("expertprune", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


@functools.cache
def tree_of(text: str) -> ast.Module:
    return ast.parse(text)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our own package, those inside functions and behind TYPE_CHECKING too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            inside = node.module == "expertprune"
            names = [f"expertprune.{alias.name}" for alias in node.names] if inside else [node.module or ""]
        yield from ((node.lineno, name) for name in names if re.match(r"expertprune\.(?!__)", name))


def breaches(path: Path, text: str) -> list[str]:
    """Imports of a later room."""
    own = room_of(path)
    rooms = [(line, name.split(".")[1]) for line, name in imported(tree_of(text))]
    return [f"{path}, line {line}: imports {each}" for line, each in rooms if ORDER.index(each) > ORDER.index(own)]


def test_every_room_has_a_place_in_the_order() -> None:
    assert sorted({room_of(path) for path in SOURCES} - {"__init__", "__main__"}) == sorted(ORDER)


def test_contributing_shows_the_same_order() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = re.search(r"^    expertprune/\n((?:      .*\n)+)", text, re.MULTILINE)
    assert picture is not None
    assert re.findall(r"^      (\w+)", picture[1], re.MULTILINE) == ORDER


def test_imports_go_up_the_order_only() -> None:
    sources = [path for path in SOURCES if room_of(path) not in ("__init__", "__main__")]
    assert [breach for path in sources for breach in breaches(path, path.read_text(encoding="utf-8"))] == []
    for text in ("import expertprune.stages", "def f():\n    from expertprune import stages"):
        assert len(breaches(PACKAGE / "files.py", text)) == 1
    assert breaches(PACKAGE / "files.py", "from expertprune.errors import SpecError\nimport os") == []


def test_no_modules_import_each_other() -> None:
    """Through others too; what is behind TYPE_CHECKING or in a function counts."""
    known = {module_of(path) for path in SOURCES} - {"expertprune"}
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.name == "__init__.py":  # gathers its own folder's modules
            continue
        tree = tree_of(path.read_text(encoding="utf-8"))
        names = {name for _, name in imported(tree)}
        for node in ast.walk(tree):  # from expertprune.models import layers
            if isinstance(node, ast.ImportFrom) and node.module in known:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[module_of(path)] = names & known
    sorter = graphlib.TopologicalSorter(graph)
    sorter.prepare()  # it raises an error that names the circle


def types_of(text: str) -> Iterator[str]:
    """The public classes of a module, and names such as `Floats` that it assigns to other types."""
    for node in tree_of(text).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            yield from [target.id] if re.fullmatch(r"[A-Z]\w*[a-z]", target.id) else []


def test_no_two_types_share_a_name() -> None:
    names = Counter(name for path in SOURCES for name in types_of(path.read_text(encoding="utf-8")))
    assert [name for name, count in names.items() if count > 1 and not name.startswith("_")] == []
    assert list(types_of("class A: ...\nBc = A\nD = 1")) == ["A", "Bc"]


@functools.cache
def family_names() -> str:
    """A pattern of what the families' own files say: the family's name and its config's model types."""
    files = (PACKAGE / "arch" / "families").glob("*.yaml")
    data = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]
    names = {name for each in data for name in (each["family"], *each["model_types"])}
    return rf"\b({'|'.join(map(re.escape, sorted(names)))})\b"


def names_of_families(text: str) -> list[str]:
    return re.findall(family_names(), text, re.IGNORECASE)


def too_long(text: str) -> list[str]:
    return ["too long"] if len(text.splitlines()) > LONGEST else []


def dangers(text: str) -> list[str]:
    """Calls and imports that could run code from a file: pickle and its relatives, and torch.load."""
    found = []
    for node in ast.walk(tree_of(text)):
        names = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [start + alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        found += [name for name in names if re.match(r"(pickle|dill|joblib|cloudpickle|shelve)\b|torch\.load$", name)]
    return found


def prints(text: str) -> list[str]:
    calls = [node for node in ast.walk(tree_of(text)) if isinstance(node, ast.Call)]
    return [f"line {call.lineno}" for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize(
    ("rule", "exempt", "bad"),
    [
        (names_of_families, "arch", ["x = 'llama'"]),
        (too_long, "", ["\n" * (LONGEST + 1)]),
        (dangers, "", ["from pickle import loads", "import torch\ntorch.load('x')", "from torch import load"]),
        (prints, "", ["print(x)"]),
    ],
)
def test_a_rule_of_the_house_holds(rule: Callable[[str], list[str]], exempt: str, bad: list[str]) -> None:
    assert all(rule(text) for text in bad)
    texts = {str(path): path.read_text(encoding="utf-8") for path in SOURCES if room_of(path) != exempt}
    assert {name: found for name, text in texts.items() if (found := rule(text))} == {}


HEAVY = {"torch", "transformers", "datasets", "numpy", "scipy", "sklearn", "safetensors", "matplotlib"}


def at_import(path: Path, seen: set[Path]) -> set[str]:
    """Packages that a file imports as soon as it is imported itself, through our own modules too."""
    seen.add(path)
    found: set[str] = set()
    for node in tree_of(path.read_text(encoding="utf-8")).body:
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


def test_importing_the_package_the_commands_or_the_spec_loads_no_heavy_library() -> None:
    """`import expertprune`, `--help` and `schema` stay quick: torch and its like come with their first use.

    matplotlib comes with the first picture.
    """
    for path in (PACKAGE / "__init__.py", PACKAGE / "spec" / "schema.py", *(PACKAGE / "commands").glob("*.py")):
        assert at_import(path, set()) & HEAVY == set(), path
    assert "matplotlib" not in at_import(PACKAGE / "stages" / "compare.py", set())
    assert at_import(PACKAGE / "stages" / "build.py", set()) >= {"torch", "safetensors"}  # it would be seen
