"""Renumber the layers in an adapter's config after some layers were removed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from expertprune.errors import CheckpointError

# Keys whose value names modules: in a list, as keys of a mapping, or as one regular expression.
_NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
_ANY_NUMBER = re.compile(r"\[0-9\]")  # in a regular expression
_A_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d")  # such as a layer's or a routed expert's


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
    if chosen is not None:
        listed = [chosen] if isinstance(chosen, int) else chosen
        stay = [positions[layer] for layer in listed if layer in positions]
        result["layers_to_transform"] = stay or [len(positions)]  # an empty list would mean all layers
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
        CheckpointError: a pattern has numbers elsewhere.
    """
    numbered = re.compile(rf"(\b{re.escape(layers.rpartition('.')[2])}\\?\.)(\d+)(?=\\?\.)")
    result = []
    for name in names:
        if _A_NUMBER.search(_ANY_NUMBER.sub("", numbered.sub("", name))):
            raise CheckpointError(
                f"{name!r} names layers or routed experts by numbers, some of which change in this expert; write it as "
                "a list of full names"
            )
        numbers = [int(found[2]) for found in numbered.finditer(name)]
        if all(number in positions for number in numbers):
            result.append(numbered.sub(lambda found: f"{found[1]}{positions[int(found[2])]}", name))
    return result
