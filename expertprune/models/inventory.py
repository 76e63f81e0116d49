"""Whether the tensors of a checkpoint are those that its config and its family describe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from expertprune.arch import PER_LAYER, USUAL_LAYERS, USUAL_SIZES, Family
from expertprune.errors import CheckpointError, refused, under
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import build_model
from expertprune.units import LayerShape, Segment

# Buffers that older checkpoints stored and newer models compute.
_COMPUTED = r"rotary_emb\.inv_freq$"


def checked_layers(checkpoint: Checkpoint, family: Family | None) -> tuple[LayerShape, ...]:
    """The shape of every layer of a folder's model, for whatever runs or cuts it.

    Of quantized weights nothing is checked, and there are no shapes: packed tensors have other sizes than the model.

    Args:
        family: `None` where it is not known; then only the usual keys of sizes are checked, and there are no shapes.

    Raises:
        CheckpointError: a size, a tensor or a width of the config is not that of the weights.
    """
    if checkpoint.quantization:
        return ()
    shapes = [info.shape for info in checkpoint.tensors.values()]
    refuse_sizes(checkpoint.config, family, shapes, str(checkpoint.folder / "config.json"))
    if family is None:
        return ()
    with under(str(checkpoint.folder)):
        layers = family.layer_shapes(checkpoint.config)
    check_widths(checkpoint, family, layers)
    return layers


def refuse_sizes(
    config: Mapping[str, Any], family: Family | None, shapes: Sequence[tuple[int, ...]], where: str
) -> None:
    """Refuse sizes that the weights do not have, before anything of these sizes is made.

    Args:
        config: the contents of `config.json`.
        family: as above.
        shapes: of the weights.
        where: of the config, for the message.
    """
    largest = max((size for shape in shapes for size in shape), default=0)
    sizes = USUAL_SIZES if family is None else family.size_keys
    limits = dict.fromkeys(sizes, largest) | {USUAL_LAYERS if family is None else family.config.layers: len(shapes)}
    single = config.get(PER_LAYER)
    for each in (config, *(single.values() if isinstance(single, Mapping) else ())):
        for key, limit in limits.items():
            value = each.get(key) if isinstance(each, Mapping) else None
            if isinstance(value, int) and value > limit:
                raise CheckpointError(f"{where}: {key} is {value}, and the weights have no more than {limit} of them")


def check_widths(checkpoint: Checkpoint, family: Family, shapes: Sequence[LayerShape]) -> None:
    """Check the widths of all coupled tensors.

    Raises:
        CheckpointError: a tensor is missing or is of another width than the config says.
    """
    _check_layers(checkpoint, family, len(shapes))
    problems = [each for layer, shape in enumerate(shapes) for each in _of_layer(checkpoint, family, layer, shape)]
    if problems:
        raise _disagreement(checkpoint, problems)


def _check_layers(checkpoint: Checkpoint, family: Family, count: int) -> None:
    """Raises `CheckpointError` where whole layers are missing."""
    numbers = re.compile(re.escape(family.layers) + r"\.(\d+)\.")
    found = {int(match.group(1)) for name in checkpoint.tensors if (match := numbers.match(name))}
    if absent := sorted(set(range(count)) - found):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json disagrees with the weights: {family.config.layers} is {count}, and no tensor "
            f"belongs to {_counted(absent)}; fetch or copy the files of those layers again"
        )


def _counted(layers: Sequence[int]) -> str:
    """Numbers of layers in words: runs of them are shortened."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(parts)


def _of_layer(checkpoint: Checkpoint, family: Family, layer: int, shape: LayerShape) -> Iterator[str]:
    yield from _missing_routed_experts(checkpoint, family, layer, shape.experts)
    yield from _wrong_routed_experts(checkpoint, family, layer, shape)
    for coupled in family.tensors:
        name = family.layer_prefix(layer) + coupled.name
        if name not in checkpoint.tensors:
            if not coupled.optional:
                yield f"{name} is missing"
            continue
        found = checkpoint.tensors[name].shape
        widths: dict[int, int] = {coupled.axis: sum(shape.segment_rows(segment) for segment in coupled.segments)}
        if len(found) == 2 and Segment.EXPERT not in coupled.segments:
            widths[1 - coupled.axis] = shape.hidden
        for axis, width in widths.items():
            if axis >= len(found) or found[axis] != width:
                yield f"{name} is {list(found)}, the config makes axis {axis} {width}"


def _missing_routed_experts(checkpoint: Checkpoint, family: Family, layer: int, count: int) -> list[str]:
    """Tensors of routed experts that are stored neither together, as the model runs them, nor one by one."""
    if family.experts is None or not count:
        return []
    prefix, problems = family.layer_prefix(layer), []
    for run in family.experts.run:
        names = [prefix + name for name in family.experts.on_disk(run.name, count)]
        if prefix + run.name not in checkpoint.tensors:
            problems += [f"{name} is missing" for name in names if name not in checkpoint.tensors]
    return list(dict.fromkeys(problems))


def _wrong_routed_experts(checkpoint: Checkpoint, family: Family, layer: int, shape: LayerShape) -> Iterator[str]:
    """Tensors of single routed experts that are of other widths than the config says."""
    if family.experts is None:
        return
    prefix = family.layer_prefix(layer)
    for expert in range(shape.experts):
        for tensor in family.experts.of_one(expert):
            info = checkpoint.tensors.get(prefix + tensor.name)
            width = shape.ffn * len(tensor.segments)
            if info is not None and tensor.axis is not None and info.shape[tensor.axis] != width:
                found = list(info.shape)
                yield f"{prefix + tensor.name} is {found}, the config makes axis {tensor.axis} {width}"


def vocabulary_rows(checkpoint: Checkpoint, family: Family) -> int:
    """Rows of the embedding.

    Raises:
        CheckpointError: the embedding, the head and the config's `vocab_size` disagree.
    """
    found = {name: checkpoint.tensors[name].shape[0] for name in family.vocabulary if name in checkpoint.tensors}
    found["config.json's vocab_size"] = checkpoint.config.get("vocab_size", 0)
    if len(set(found.values())) > 1 or family.vocabulary[0] not in found:
        told = ", ".join(f"{name} {rows}" for name, rows in found.items())
        raise CheckpointError(f"{checkpoint.folder}: the rows of the vocabulary disagree: {told}")
    return found[family.vocabulary[0]]


def check_inventory(
    checkpoint: Checkpoint, family: Family, shapes: Sequence[LayerShape], trust_remote_code: bool = False
) -> None:
    """Compare a folder's tensors with those of the model that its config describes, which is built without memory.

    Raises:
        CheckpointError: tensors are missing, unknown to the model, of other shapes, or tied and not the same.
    """
    config = checkpoint.folder / "config.json"
    with refused(f"{config}: transformers builds no model from it"), torch.device("meta"):
        model = build_model(checkpoint.folder, trust_remote_code)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = "|".join([_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])])
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    stored = _stored_otherwise(family, shapes)
    for run, names in stored.items():  # routed experts stored one by one: `check_widths` has looked for them
        if run not in found:
            expected.pop(run, None)
            expected |= {name: found[name] for name in names if name in found}
    problems = [f"{name} is missing" for name in expected if name not in found and name not in tied]
    problems += [
        f"{name} belongs to no part of the model"
        for name in found
        if name not in expected and not re.search(ignored, name)
    ]
    problems += [
        f"{name} is {list(shape)}, the config makes it {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        raise _disagreement(checkpoint, problems)
    checkpoint.check_tied(tied)


def _stored_otherwise(family: Family, shapes: Sequence[LayerShape]) -> dict[str, tuple[str, ...]]:
    """From each tensor of the running model that may be stored under other names to those names."""
    if family.experts is None:
        return {}
    return {
        family.layer_prefix(layer) + run.name: tuple(
            family.layer_prefix(layer) + name for name in family.experts.on_disk(run.name, shape.experts)
        )
        for layer, shape in enumerate(shapes)
        if shape.experts
        for run in family.experts.run
    }


def _disagreement(checkpoint: Checkpoint, problems: Sequence[str]) -> CheckpointError:
    rest = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return CheckpointError(
        f"{checkpoint.folder}: config.json disagrees with the weights: {'; '.join(problems[:5])}{rest}"
    )
