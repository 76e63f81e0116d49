"""Lookup by name: duplicates refused, near names suggested, plugins imported once and blamed by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertprune.errors import UsageError
from expertprune.registry import Registry, nearest
from tests.plugins import distribution, unpack

# The plugins of these tests register with this one, which they find as an attribute of this module.
SHAPES: Registry[object]


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    global SHAPES
    SHAPES = Registry("shape", group="tests.shapes")
    SHAPES.register("round", module="the.first")(1)
    modules = set(sys.modules)
    yield
    for added in set(sys.modules) - modules:
        if added.startswith("shapes_"):
            del sys.modules[added]


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """One distribution `NAME-plugin` for each module `shapes_NAME`, which sees the registry as `SHAPES`."""
    for name, text in modules.items():
        text = "from tests.test_registry import SHAPES\n" + text
        points = {"tests.shapes": {f"{name} shapes": f"shapes_{name}"}}
        unpack(distribution(f"{name}-plugin", points, {f"shapes_{name}.py": text}, version="2.5"), folder)
    monkeypatch.syspath_prepend(str(folder))


def test_a_registered_entry_is_found_unchanged_and_no_second_one_of_its_name_is_taken() -> None:
    entry = object()
    assert SHAPES.register("flat")(entry) is SHAPES["flat"] is entry
    with pytest.raises(ValueError, match=r"shape 'round' is registered twice, by the\.first and by the\.second"):
        SHAPES.register("round", module="the.second")(2)
    assert dict(SHAPES) == {"round": 1, "flat": entry}
    assert SHAPES.unknown("rond") == "unknown shape 'rond'; did you mean 'round'?"


def test_the_first_lookup_imports_each_plugin_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = "import os\nos.environ['SHAPES_IMPORTED'] = os.environ.get('SHAPES_IMPORTED', '') + 'x'\n"
    looks_up = "assert SHAPES['round'] == 1\nSHAPES.register('oval')(4)\n"
    monkeypatch.setenv("SHAPES_IMPORTED", "")
    _install(tmp_path, monkeypatch, square=counted + "SHAPES.register('square')(3)\n", oval=looks_up)
    registry = SHAPES
    assert "shapes_square" not in sys.modules  # nothing is imported before it is asked for
    assert registry.unknown("sqare") == "unknown shape 'sqare'; did you mean 'square'?"
    assert dict(registry) == {"round": 1, "oval": 4, "square": 3}
    assert os.environ["SHAPES_IMPORTED"] == "x"
    assert dict(Registry[int]("shape", group="tests.others")) == {}


FAILS = {
    "raise RuntimeError('out of paint')\n": "RuntimeError: out of paint",
    "def f(): ...\nSHAPES.register('round')(f)\n": "'round' is registered twice, by the.first and by shapes_bad",
}


@pytest.mark.parametrize("text", FAILS)
def test_a_plugin_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    _install(tmp_path, monkeypatch, bad="SHAPES.register('half')(0.5)\n" + text)
    start = "plugin bad-plugin 2.5: entry point 'bad shapes' (shapes_bad) of group 'tests.shapes'"
    for _ in range(2):  # the second is not answered from what was registered before the failure
        with pytest.raises(UsageError) as caught:
            SHAPES.get("round")
        assert str(caught.value).startswith(start)
        assert FAILS[text] in str(caught.value)


def test_an_error_lists_no_more_names_than_are_read() -> None:
    assert nearest("x", ["aa", "bb"]) == "; valid: aa, bb"
    many = nearest("x", [f"name-{number:05}" for number in range(12_000)])
    assert many.endswith(" and 11,950 more")
    assert len(many) < 1000
