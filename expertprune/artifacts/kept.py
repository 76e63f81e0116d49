"""The units that a layer keeps, as a plan's document writes them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from expertprune.units import GONE, KeptUnits, LayerShape, Structure, format_indices, parse_indices

_MOST = 2**24  # of anything in one layer: more than any model has
_Count = Annotated[int, Field(ge=0, le=_MOST)]
Width = Annotated[int, Field(ge=1, le=_MOST)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class KeptText(_Strict):
    """The kept units of each structure, as runs (see `units.format_indices`)."""

    ffn: str
    query_heads: str
    kv_groups: str
    experts: str = ""


class ShapeDocument(_Strict):
    """A `LayerShape` within limits."""

    hidden: Width
    ffn: _Count
    query_heads: _Count
    kv_heads: _Count
    head_dim: _Count
    experts: _Count = 0
    expert_groups: Width = 1


def kept_document(kept: KeptUnits, shape: LayerShape) -> dict[str, str] | None:
    """What `kept_units` reads; `None` for a layer that goes whole."""
    if kept.gone:
        return None
    named = [structure for structure in Structure if structure is not Structure.EXPERTS or shape.experts]
    return {structure.value: format_indices(kept.of(structure)) for structure in named}


def kept_units(text: KeptText | None, shape: LayerShape, layer: int) -> KeptUnits:
    """The units that a layer keeps; raises `ValueError` where the layer has no such units, or cannot lose the others."""
    if text is None:
        return GONE
    if shape.kv_heads and shape.query_heads % shape.kv_heads:
        raise ValueError(f"{shape.query_heads} query heads are no multiple of {shape.kv_heads} KV heads")
    kept: dict[str, tuple[int, ...]] = {}
    for name, runs in vars(text).items():
        count = shape.units(Structure(name))
        try:
            kept[name] = parse_indices(runs, count)
        except ValueError as error:
            some = f"some of 0-{count - 1}" if count else "nothing"
            raise ValueError(f"layer {layer}: {name} must keep {some}: {error}") from None
    units = KeptUnits(**kept, gone=False)
    _check_kept(shape, units, layer)
    return units


def _check_kept(shape: LayerShape, kept: KeptUnits, layer: int) -> None:
    for indices, count, what in (
        (kept.ffn, shape.neurons, "ffn"),
        (kept.query_heads, shape.query_heads, "query_heads"),
        (kept.kv_groups, shape.kv_heads, "kv_groups"),
        (kept.experts, shape.experts, "experts"),
    ):
        if not count and not indices:  # the model has none
            continue
        if not indices or indices[-1] >= count:
            raise ValueError(f"layer {layer}: {what} must keep some of 0-{count - 1}")
    per_group = len(kept.query_heads) // max(1, len(kept.kv_groups))
    groups = [head // shape.heads_per_group for head in kept.query_heads]
    if groups != [group for group in kept.kv_groups for _ in range(per_group)]:
        raise ValueError(f"layer {layer}: the query heads are not the same number in each kept KV group")
    neurons = len(kept.ffn) // max(1, len(kept.experts))
    if shape.experts and [unit // shape.ffn for unit in kept.ffn] != [e for e in kept.experts for _ in range(neurons)]:
        raise ValueError(f"layer {layer}: the FFN neurons are not the same number in each kept routed expert")
