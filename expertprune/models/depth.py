"""Check that the config without some layers builds each remaining layer as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expertprune.arch import Family
from expertprune.errors import PlanError, refused
from expertprune.files import temporary_folder
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.layers import decoder_layers
from expertprune.models.loading import build_model
from expertprune.units import GONE, LayerShape, new_positions

_PLACES = frozenset({"layer_idx", "layer_id", "layer_index"})  # attributes that only say where a layer stands
_PLAIN = (bool, int, float, str, type(None))


def check_kinds(
    checkpoint: Checkpoint, family: Family, shapes: Sequence[LayerShape], gone: Sequence[int], trust_remote_code: bool
) -> None:
    """Check that each layer that stays is built as before, from the expert's config and at its new place.

    Both models are built without memory, and the settings of their layers' modules are compared.

    Args:
        gone: the layers that go.

    Raises:
        PlanError: the config cannot say it: a layer would get another attention window, or the like.
    """
    kept = [GONE if layer in gone else shape.all_kept for layer, shape in enumerate(shapes)]
    with temporary_folder() as folder:
        for path in checkpoint.folder.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
        (folder / "config.json").write_text(json.dumps(family.pruned_config(checkpoint.config, kept)))
        after = _settings(folder, family, trust_remote_code)
    before = _settings(checkpoint.folder, family, trust_remote_code)
    for layer, position in new_positions(kept).items():
        old, new = before[layer], after[position]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise PlanError(
                    f"budget.layers: whole layers of family {family.family!r} cannot go: what a layer does depends on its "
                    f"place, and the config cannot say otherwise (layer {layer} would become layer {position}, and its "
                    f"{name} {new.get(name)!r} where it is {old.get(name)!r})"
                )


def _settings(folder: Path, family: Family, trust_remote_code: bool) -> list[dict[str, Any]]:
    """By layer, the plain attributes of its modules: sizes, windows, kinds of attention, switches."""
    with refused(f"{folder / 'config.json'}: transformers builds no model from it"), torch.device("meta"):
        model = build_model(folder, trust_remote_code)
    return [
        {
            f"{name}.{attribute}".lstrip("."): value
            for name, module in layer.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, _PLAIN) and attribute not in _PLACES and not attribute.startswith("_")
        }
        for layer in decoder_layers(model, family)
    ]
