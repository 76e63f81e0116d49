"""Lookup by name: duplicates refused, unknown names answered with the nearest."""

from __future__ import annotations

import pytest

from expertprune.registry import Registry, nearest


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("impcat", ["impact", "random"], "; did you mean 'impact'?"),
        ("IMPACT", ["impact", "random"], "; did you mean 'impact'?"),
        ("ffn_", ["kv_groups", "ffn"], "; did you mean 'ffn'?"),
        ("zzz", ["random", "impact"], "; valid: impact, random"),
        ("zzz", [], ""),
    ],
)
def test_nearest_suggests_one_name_or_lists_all_of_them(name: str, names: list[str], expected: str) -> None:
    assert nearest(name, names) == expected
    assert nearest(name, iter(names)) == expected


def test_a_registered_entry_is_found_and_handed_back_unchanged() -> None:
    registry: Registry[object] = Registry("shape")
    entry = object()
    assert registry.register("round")(entry) is entry
    assert registry["round"] is entry
    assert "round" in registry
    assert "square" not in registry
    assert (list(registry), len(registry)) == (["round"], 1)


def test_a_name_registered_twice_is_refused_and_the_first_entry_stays() -> None:
    registry: Registry[int] = Registry("shape")
    registry.register("round")(1)
    with pytest.raises(ValueError, match="shape 'round' is registered twice"):
        registry.register("round")(2)
    assert dict(registry) == {"round": 1}


def test_the_message_for_an_unknown_name_says_its_kind_and_the_nearest() -> None:
    registry: Registry[int] = Registry("shape")
    registry.register("round")(1)
    assert registry.unknown("rond") == "unknown shape 'rond'; did you mean 'round'?"
    with pytest.raises(KeyError):
        registry["rond"]
