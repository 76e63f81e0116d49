"""Renumber the layers in an adapter's config after some layers were removed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from expertprune.errors import CheckpointError

# Keys whose value names modules: in a list, as keys of a mapping, or as one regular expression.
_NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
# What changes with no layer's number in a regular expression: any number, and a digit within a name, as in `w[0-9]`.
_ANY_NUMBER = re.compile(r"(?:\[0-9\]|\\d)[+*]|(?<=[A-Za-z_])(?:\[0-9\]|\\d)")
_A_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d|\\d")  # such as a layer's or a routed expert's, or any of one digit
_A_PLACE = re.compile(r"(?<=\\\.)(?:\.|\\w)(?![*+])")  # any one character as a whole name, so any number of one digit
_GROUP = re.compile(r"\([^()]*\)")


def renumbered(config: Mapping[str, Any], layers: str, positions: Mapping[int, int]) -> dict[str, Any]:
    """The contents of `adapter_config.json`, for a model of fewer layers.

    Args:
        layers: the path of the layers in the model, such as `model.layers`.
        positions: from the number of each layer that stays to its new one.

    Raises:
        CheckpointError: a regular expression names layers in a way that cannot be renumbered.
    """
    result = dict(config)
    chosen = config.get("layers_to_transform")
    if chosen is not None and chosen != []:  # an empty list means all layers
        listed = [chosen] if isinstance(chosen, int) else chosen
        stay = [positions[layer] for layer in listed if layer in positions]
        result["layers_to_transform"] = stay or [len(positions)]  # a layer that is not there
    for key in _NAMES:
        value = config.get(key)
        if isinstance(value, dict):
            found = {name: renumbered_names([name], layers, positions) for name in value}
            result[key] = {new: value[name] for name, news in found.items() for new in news}
        elif isinstance(value, list):
            result[key] = renumbered_names(value, layers, positions)
        elif isinstance(value, str):
            result[key] = next(iter(renumbered_names([value], layers, positions)), [])
    return result


def renumbered_names(names: Sequence[str], layers: str, positions: Mapping[int, int]) -> list[str]:
    """Names of modules, or patterns of them, with new numbers; those of layers that go are left out.

    A number is new where it stands alone behind the layers' own name, with or without the backslashes of a regular
    expression, as in `model.layers.3.mlp` and `layers\\.3\\.`.

    Raises:
        CheckpointError: a pattern has numbers elsewhere, or only some of what it names goes.
    """
    numbered = re.compile(rf"(\b{re.escape(layers.rpartition('.')[2])}\\?\.)(\d+)(?=\\?\.)")
    result = []
    for name in names:
        numbers = [int(found[2]) for found in numbered.finditer(name)]
        gone = [number for number in numbers if number not in positions]
        partly = gone and (len(gone) < len(numbers) or not _names_layers_alone(name, numbered))
        rest = _ANY_NUMBER.sub("", numbered.sub("", name))
        if partly or _A_NUMBER.search(rest) or _A_PLACE.search(rest):
            raise CheckpointError(
                f"{name!r} names layers or routed experts by numbers, some of which change in this expert; write it as "
                "a list of full names"
            )
        if not gone:
            result.append(numbered.sub(lambda found: f"{found[1]}{positions[int(found[2])]}", name))
    return result


def _names_layers_alone(name: str, numbered: re.Pattern[str]) -> bool:
    """Whether each alternative of a pattern names a layer, outside of parentheses."""
    outer = _GROUP.sub("", name)
    return "(" not in outer and all(numbered.search(each) for each in outer.split("|"))
