"""The oracle for unlisted families: on a tiny random copy of the model, cutting must equal masking.

A permuted row, or a norm over all heads, changes the logits and raises no error. So a family that
was only recognized is checked before the real weights are touched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import PER_LAYER, Experts, Family
from expertprune.artifacts.plan import BaseReference, LayerPlan, Parameters, Plan
from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError, ExpertpruneError, refused
from expertprune.files import temporary_folder
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.inventory import check_widths
from expertprune.models.layers import decoder_layers, observed
from expertprune.models.loading import build_model, load_model
from expertprune.models.masking import masked
from expertprune.models.passes import TextRun
from expertprune.pruning.write import prune
from expertprune.units import GONE, KeptUnits, LayerShape, Structure, new_positions

_LAYERS, _FFN, _HEAD_DIM, _EXPERTS, _VOCABULARY, _TOKENS = 3, 20, 4, 6, 64, 17
_KEPT_EXPERTS = 4
_TOLERANCE = 1e-4  # of the largest logit: rounding is a hundred times smaller, a wrong row far larger


@dataclass(frozen=True)
class TinyCut:
    """How many units of a layer one cut of the tiny copy keeps; `None` keeps all. `gone`: the layer goes whole."""

    ffn: int | None = None
    heads_per_group: int | None = None
    kv_groups: int | None = None
    experts: int | None = None
    gone: bool = False


def check_family(base: ResolvedBase, layer_widths: bool = False, layers: bool = False) -> list[str]:
    """Cut each structure of a tiny random copy of the base, and all together; compare with masking.

    Args:
        layer_widths: cut layers to different widths too.
        layers: cut a whole layer too.

    Returns:
        What was compared, in words.

    Raises:
        CheckpointError: the cut model and the masked one differ, and the message names the tensor; or
            the model's class fails, in whatever way.
    """
    try:
        with temporary_folder() as scratch, refused("its class fails"):
            tiny = _tiny_copy(base, scratch / "base")
            model = load_model(tiny.folder, torch.float32, torch.device("cpu"), base.trust_remote_code)
            if base.family.has_ffn:
                _check_stream(model, tiny)
            done = []
            cuts = _cuts(base.family, tiny.layers[-1], layer_widths)
            if layers:
                cuts["a whole layer"] = [TinyCut(), TinyCut(gone=True), TinyCut()]
            for number, (name, cut) in enumerate(cuts.items()):
                plan = _random_plan(tiny, cut, number)
                folder = scratch / f"expert-{number}"
                folder.mkdir()
                _compare(model, tiny, plan, folder, name)
                done.append(name)
    except CheckpointError as error:
        told = str(error).rstrip(".")
        raise CheckpointError(
            f"{base.folder}: the oracle fails for model_type {base.checkpoint.config.get('model_type')!r} on a tiny "
            f"random copy: {told}. Nothing was cut; docs/families.md in the source says how to describe a family"
        ) from error.__cause__
    return done


def _cuts(family: Family, shape: LayerShape, layer_widths: bool) -> dict[str, list[TinyCut]]:
    groups = shape.kv_heads - 1 or None
    heads = shape.heads_per_group - 1 or None
    cuts: dict[str, list[TinyCut]] = {}
    if Structure.FFN in family.structures:
        cuts["ffn"] = [TinyCut(ffn=12)] * _LAYERS
    if family.experts is not None:
        cuts["experts"] = [TinyCut(experts=_KEPT_EXPERTS)] * _LAYERS
    if family.experts is not None and Structure.FFN in family.structures:
        cuts["experts and ffn"] = [TinyCut(ffn=12, experts=_KEPT_EXPERTS)] * _LAYERS
    if family.heads_are_units:
        cuts |= {"kv_groups": [TinyCut(kv_groups=groups)] * _LAYERS} if groups else {}
        cuts |= {"query_heads": [TinyCut(heads_per_group=heads)] * _LAYERS} if heads else {}
        if layer_widths and family.has_ffn:
            cuts["widths of single layers"] = [TinyCut(12, heads, groups), TinyCut(ffn=7), TinyCut()]
    elif layer_widths and family.has_ffn:
        cuts["widths of single layers"] = [TinyCut(ffn=12), TinyCut(ffn=7), TinyCut()]
    return cuts


def _tiny_copy(base: ResolvedBase, folder: Path) -> ResolvedBase:
    """A model of the base's class and config with small widths and random weights."""
    folder.mkdir()
    for path in base.folder.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(_tiny_config(base)))
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        model = build_model(folder, base.trust_remote_code)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter.data)
            # weights of norms stay near what their class begins with, be that zeros or ones
            parameter.data = 0.3 * noise if parameter.dim() > 1 else parameter.data + 0.1 * noise
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"transformers builds none from its config: {error}") from error
    finally:
        torch.set_rng_state(torch_state)
    model.float().save_pretrained(folder)
    checkpoint = Checkpoint(folder)
    shapes = base.family.layer_shapes(checkpoint.config)
    check_widths(checkpoint, base.family, shapes)
    return replace(base, name="tiny copy", folder=folder, checkpoint=checkpoint, layers=shapes, dtype=torch.float32)


def _tiny_config(base: ResolvedBase) -> dict[str, Any]:
    keys, shape = base.family.config, base.layers[0]
    groups = min(shape.kv_heads, 3) or 2  # an attention that is not described has some heads too
    heads = min(shape.heads_per_group, 2) * groups or groups
    widths: dict[str, Any] = {
        keys.hidden: heads * _HEAD_DIM,
        keys.layers: _LAYERS,
        keys.query_heads: heads,
        keys.kv_heads: groups,
    }
    widths |= {keys.head_dim: _HEAD_DIM} if base.family.has_attention else {}
    widths |= {keys.ffn: _FFN} if keys.ffn is not None else {}
    config = {key: value for key, value in base.checkpoint.config.items() if not key.endswith("_token_id")}
    if (experts := base.family.experts) is not None:
        widths |= {key: _EXPERTS for key in experts.count if key in config}
        widths |= {experts.per_token: 2, experts.width: _FFN} | _tiny_routing(experts, config)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == len(base.layers):  # one entry for each layer
            other = next((each for each in value if each != value[0]), value[0])
            config[key] = [value[0], *[other] * (_LAYERS - 1)]
    if PER_LAYER in config:
        config = {k: v for k, v in config.items() if k not in (PER_LAYER, "auto_map")}
    return config | widths | {"vocab_size": _VOCABULARY, "dtype": "float32", "pad_token_id": 0}


def _tiny_routing(experts: Experts, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config with which the last layer has routed experts, in two groups if there are any."""
    layers, groups = experts.layers, experts.groups
    values: dict[str | None, Any] = {layers.last: -1, layers.without: []}
    for key, most in ((layers.first, 1), (layers.every, _LAYERS)):
        values[key] = min(config.get(key or "") or most, most)
    if groups is not None and (config.get(groups.count) or 1) > 1:
        values |= {groups.count: 2, groups.chosen: 1}
    return {key: value for key, value in values.items() if key is not None and key in config}


def _random_plan(base: ResolvedBase, cut: Sequence[TinyCut], seed: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)

    def choose(count: int | None, of: int) -> list[int]:
        return sorted(torch.randperm(of, generator=generator)[: of if count is None else count].tolist())

    layers = []
    for shape, widths in zip(base.layers, cut, strict=True):
        if widths.gone:
            layers.append(LayerPlan(GONE))
            continue
        groups, of = choose(widths.kv_groups, shape.kv_heads), shape.experts_per_group
        count = None if widths.experts is None else widths.experts // shape.expert_groups
        experts = [run * of + each for run in range(shape.expert_groups) for each in choose(count, of)]
        ffn = [expert * shape.ffn + neuron for expert in experts or [0] for neuron in choose(widths.ffn, shape.ffn)]
        per_group = shape.heads_per_group
        heads = [group * per_group + head for group in groups for head in choose(widths.heads_per_group, per_group)]
        layers.append(LayerPlan(KeptUnits(tuple(ffn), tuple(heads), tuple(groups), tuple(experts))))
    size = base.checkpoint.parameters
    return Plan(
        name="oracle",
        base=BaseReference(model=base.name, digest=base.digest),
        parameters=Parameters(before=size, after=size),
        shapes=base.layers,
        layers=layers,
    )


@torch.no_grad()
def _compare(model: Any, base: ResolvedBase, plan: Plan, folder: Path, name: str) -> None:
    """Raises `CheckpointError` where the cut model and the masked one differ."""
    try:
        prune(plan, base, folder)
        _check_shapes(folder, base.trust_remote_code)
        expert = load_model(folder, torch.float32, torch.device("cpu"), base.trust_remote_code)
    except ExpertpruneError as error:
        raise CheckpointError(f"cutting {name}: {error}") from error
    ids = torch.randint(0, _VOCABULARY, (1, _TOKENS), generator=torch.Generator().manual_seed(1))
    dense = model(input_ids=ids, use_cache=False).logits
    with masked(model, base.family, base.layers, plan.kept), _LeafOutputs(model, base.family) as wanted:
        expected = model(input_ids=ids, use_cache=False).logits
    with _LeafOutputs(expert, base.family) as given:
        found = expert(input_ids=ids, use_cache=False).logits
    scale = max(1.0, float(expected.abs().max()))
    if float((expected - dense).abs().max()) < _TOLERANCE * scale:
        raise CheckpointError(f"cutting {name}: {base.family.ffn.output} and its like hardly change the logits")
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * scale:
        where = _first_difference(base, plan, wanted, given)
        raise CheckpointError(
            f"cutting {name}: {where} is off, and logits differ by {difference:.2g} from the masked model's"
        )


def _check_shapes(folder: Path, trust_remote_code: bool) -> None:
    """Raises `CheckpointError` where the cut model's config and a tensor disagree on a width."""
    stored = Checkpoint(folder).tensors
    try:
        with torch.device("meta"):
            state = build_model(folder, trust_remote_code).state_dict()
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"its config cannot say the widths: {error}") from error
    for name, tensor in state.items():
        if name in stored and stored[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} is off: it has {list(stored[name].shape)}, and the cut model needs {list(tensor.shape)}"
            )


class _LeafOutputs:
    """While open, keeps the outputs of the layers' innermost modules by name, in their order."""

    def __init__(self, model: Any, family: Family) -> None:
        self._layers, self._prefix = decoder_layers(model, family), family.layers

    def __enter__(self) -> Mapping[str, Tensor]:
        noted: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            def note(_: nn.Module, __: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    noted[name] = output

            return note

        self._handles = [
            module.register_forward_hook(hook(f"{self._prefix}.{name}"))
            for name, module in self._layers.named_modules()
            if name and not list(module.children())
        ]
        return noted

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _first_difference(base: ResolvedBase, plan: Plan, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first module in the layers whose output differs from the masked model's."""
    positions = new_positions(plan.kept)
    moved = {
        base.family.layer_prefix(position): base.family.layer_prefix(layer) for layer, position in positions.items()
    }
    owners = {
        base.family.layer_prefix(position) + tensor.name.rpartition(".")[0]: (layer, tensor)
        for layer, position in positions.items()
        for tensor in base.family.tensors
        if tensor.axis == 0
    }
    for name, mine in given.items():
        prefix = next(each for each in moved if name.startswith(each))
        theirs = wanted[moved[prefix] + name.removeprefix(prefix)]
        if name in owners:
            layer, tensor = owners[name]
            rows, offset = [], 0
            for segment in tensor.segments:
                rows.append(plan.kept[layer].rows(segment, base.layers[layer]) + offset)
                offset += base.layers[layer].segment_rows(segment)
            theirs = theirs[..., torch.cat(rows)]
        if theirs.shape != mine.shape:
            return f"{name} (its output is {list(mine.shape)}, the masked model's {list(theirs.shape)})"
        if float((theirs - mine).abs().max()) > _TOLERANCE * max(1.0, float(theirs.abs().max())):
            return f"{name}.weight, or what goes into it,"
    return "a tensor outside the layers"


@torch.no_grad()
def _check_stream(model: Any, base: ResolvedBase) -> None:
    """Raises `CheckpointError` unless a layer adds its two blocks' outputs to its input."""
    family = base.family
    ids = torch.randint(0, _VOCABULARY, (1, _TOKENS), generator=torch.Generator().manual_seed(1))
    text = TextRun(model, family, base.layers, [Batch(ids, (_TOKENS,), (0,))])
    stream, blocks = text.start(), (family.attention, family.ffn)
    for index, layer in text.layers():
        with observed(layer, *(block.output for block in blocks)) as calls:
            (step,) = stream.advance(layer, index)
        expected = step.before
        for block in blocks:
            output = calls[block.output].output
            expected = expected + (layer.get_submodule(block.output_norm)(output) if block.output_norm else output)
        if float((step.after - expected).abs().max()) > _TOLERANCE * max(1.0, float(step.after.abs().max())):
            raise CheckpointError(
                f"{family.layer_prefix(index)}{family.ffn.output_weight} is off: the layer does not add its blocks' outputs "
                f"to its input as they are ({family.residual}), which the repair relies on"
            )
