"""Write the config of a model that lost decoder layers: its lists by layer lose the same entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expertprune.errors import PlanError

_KINDS = "layer_types"  # transformers' key for the kind of attention of each layer
_LINEAR = "linear_attention"  # the kind that keeps a state, and no keys and values
_SHARED = "num_kv_shared_layers"  # so many of the last layers read keys and values of earlier ones


def check_depth(config: Mapping[str, Any], family: str) -> None:
    """Raises `PlanError` where layers read each other's keys and values, so that none can go alone."""
    if config.get(_SHARED):
        raise PlanError(
            f"budget.layers: whole layers of family {family!r} cannot go: {config[_SHARED]} of them read the keys and "
            f"values of earlier ones ({_SHARED})"
        )


def with_fewer_layers(
    config: Mapping[str, Any], count: str, staying: Sequence[int], routed: Mapping[str, Any]
) -> dict[str, Any]:
    """The config with some of its layers only.

    Lists with one entry per layer lose those of the others. A rule by position that would give a
    layer another kind of attention is written out as such a list.

    Args:
        count: the key for the number of layers.
        staying: the layers that stay, ascending, in the present numbering.
        routed: keys that say which layers have routed experts, and their new values.

    Raises:
        PlanError: only layers with linear attention would stay.
    """
    layers = config[count]
    own: dict[str, Any] = {count: len(staying)}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == layers and "layer" in key:
            own[key] = [value[layer] for layer in staying]
    own |= routed
    kinds = config.get(_KINDS) or _kinds(config)
    if kinds is not None:
        wanted = [kinds[layer] for layer in staying]
        if set(wanted) == {_LINEAR} != set(kinds):
            raise PlanError(
                "budget.layers: no layer would stay that keeps keys and values, which decoding needs; keep more"
            )
        if _KINDS not in own and _kinds({**config, **own}) != wanted:
            own[_KINDS] = wanted
    return {**config, **own}


def _kinds(config: Mapping[str, Any]) -> list[str] | None:
    """The kind of attention of each layer, as transformers' own config class reads it; `None` if it names none."""
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    found = getattr(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), _KINDS, None)
    return list(found) if found is not None else None
