"""Write the config of a model that lost decoder layers: its lists by layer lose the same entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expertprune.arch.single_layers import PER_LAYER
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
    layer another kind of attention, or of positions, is written out as such a list.

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
    read = _by_layer(config, layers)
    kinds = config.get(_KINDS) or read.get(_KINDS)
    if kinds is not None and {kinds[layer] for layer in staying} == {_LINEAR} != set(kinds):
        raise PlanError(
            "budget.layers: no layer would stay that keeps keys and values, which decoding needs; keep more"
        )
    wanted = {key: [value[layer] for layer in staying] for key, value in read.items() if key not in own}
    found = _by_layer({**config, **own}, len(staying)) if wanted else {}
    own |= {key: value for key, value in wanted.items() if found.get(key) != value}
    return {**config, **own}


def _by_layer(config: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """The lists with one entry per layer that transformers' own config class reads or derives from a config."""
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return {}
    own = {key: value for key, value in config.items() if key != PER_LAYER}  # it numbers layers that may be gone
    read = CONFIG_MAPPING[config["model_type"]].from_dict(own)
    return {
        key: list(value)
        for key, value in {**vars(read), _KINDS: getattr(read, _KINDS, None)}.items()
        if isinstance(value, (list, tuple)) and len(value) == layers and "layer" in key and not key.startswith("_")
    }
