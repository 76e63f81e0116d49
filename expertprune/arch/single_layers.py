"""The `config.json` of an expert whose layers differ in width, as it is or rewritten as another family's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PER_LAYER = "per_layer_config"  # transformers' name for widths of single layers
_PER_LAYER_KEYS = ("allow_global_per_layer_attribute_access", "auto_map")
MODELING = "modeling_expert"  # the module in an expert's folder that builds such layers
# The prefix of the class in the config of such an expert. An engine that does not know the class
# refuses the folder; it would build all layers alike under the stock name.
EXPERT = "Expert"


def stock_architectures(config: Mapping[str, Any]) -> list[str]:
    """The classes of transformers in a config, without the prefix `EXPERT`."""
    return [name.removeprefix(EXPERT) for name in config.get("architectures") or []]


def with_layers(config: dict[str, Any], widths: list[dict[str, int]]) -> dict[str, Any]:
    """The config with the widths of single layers, and the code that reads them."""
    layers = {
        str(index): different
        for index, layer in enumerate(widths)
        if (different := {key: value for key, value in layer.items() if config.get(key) not in (None, value)})
    }
    if config.pop(PER_LAYER, None) is not None:  # the base has such layers itself
        config = {key: value for key, value in config.items() if key not in _PER_LAYER_KEYS}
        config["architectures"] = stock_architectures(config)
    if layers:
        config |= {
            "architectures": [EXPERT + name for name in stock_architectures(config)],
            PER_LAYER: layers,
            "allow_global_per_layer_attribute_access": True,
            # vLLM without our plugin builds AutoModel, transformers AutoModelForCausalLM.
            "auto_map": {
                "AutoModel": f"{MODELING}.ExpertModel",
                "AutoModelForCausalLM": f"{MODELING}.ExpertForCausalLM",
            },
        }
    return config


def with_defaults(config: dict[str, Any], other: str) -> dict[str, Any]:
    """The config with defaults of its own class, for keys that `other` has too."""
    from transformers import CONFIG_MAPPING

    mine = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    theirs = CONFIG_MAPPING[other]().to_dict()
    return {key: value for key, value in mine.items() if key in theirs and key not in config} | config
