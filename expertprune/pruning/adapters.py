"""A LoRA adapter of the base, cut along with a plan.

A product `B @ A` beside a weight `[outputs, inputs]` has `A` `[rank, inputs]` and `B` `[outputs, rank]`. Rows of the weight
that go are rows of `B`, columns that go are columns of `A`. Where nothing was repaired, the expert with the cut adapter
computes what the masked base computes with the whole one.

LoRA: https://arxiv.org/abs/2106.09685. Names and layouts of tensors are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from expertprune.arch import CoupledTensor, Experts, ExpertTensor, Family
from expertprune.artifacts.expert import Description
from expertprune.artifacts.plan import Plan
from expertprune.errors import CheckpointError
from expertprune.models.checkpoint import Checkpoint
from expertprune.pruning.slicing import StoredExpert, cut_tensor, kept_positions, select, stored_experts
from expertprune.units import KeptUnits, LayerShape, Structure, new_positions

_PREFIX = "base_model.model."  # of all tensors in adapters of causal language models
_WRAPPED = ".base_layer"
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# What the axes of each tensor of an adapter follow: an axis of the base's weight, the rank, or nothing of the base.
_RANK, _FREE = -1, -2
_FOLLOWS = {
    _A: (_RANK, 1),
    _B: (0, _RANK),
    "lora_B.bias": (0,),
    "lora_embedding_A": (_RANK, 0),
    "lora_embedding_B": (1, _RANK),
    _MAGNITUDE: (0,),
    f"{_MAGNITUDE}.weight": (0,),
    "token_adapter.trainable_tokens_delta": (_FREE, 1),
}
# An axis that is cut, and the positions that stay.
Kept = tuple[int, Tensor]


@dataclass(frozen=True)
class TensorCut:
    """What a plan does to one tensor of an adapter.

    Attributes:
        name: its new name; `None` where the layer or the routed expert that it belongs to goes.
        shape: the shape that the base gives it; `None` for the rank's axis and for others that the base does not say, and
            in place of all of it where the expert has nothing to compare with.
        cut: from its values to those that stay.
        rank_axis: the axis of the rank, if it has one.
        ranks: how many times the rank that axis is long.
    """

    name: str | None
    shape: tuple[int | None, ...] | None
    cut: Callable[[Tensor], Tensor]
    rank_axis: int | None = None
    ranks: int = 1


@dataclass(frozen=True)
class Along:
    """One plan and the tensors of an adapter of its base.

    Attributes:
        family: of the expert; the base's tensors have the same names.
        experts: the expert that the plan made, then those that were cut from it, in order.
        checkpoint: of the last of them. It knows the axes that no plan cuts.
        parameters: the adapter's `target_parameters`, with the layers numbered as in the plan's base.
    """

    family: Family
    experts: Sequence[Description]
    checkpoint: Checkpoint
    parameters: Sequence[str] = ()

    @property
    def plan(self) -> Plan:
        return self.experts[0].plan

    def step(self, name: str) -> TensorCut:
        """What becomes of a tensor.

        Raises:
            CheckpointError: the base has no such module, or the tensor cannot be cut along.
        """
        path = name.removeprefix(_PREFIX)
        if path == name:
            raise CheckpointError(f"{name} does not begin with {_PREFIX}: the adapter is of no causal language model")
        layer, _ = self._layer(path)
        if layer is not None and self._last_position(layer) is None:
            return TensorCut(None, None, lambda tensor: tensor)
        step = self._staying(name, path)
        if layer is None or step.name is None or step.name != name:
            return step
        moved = self.family.layer_prefix(new_positions(self.plan.kept)[layer])
        return replace(step, name=name.replace(self.family.layer_prefix(layer), moved, 1))

    def _staying(self, name: str, path: str) -> TensorCut:
        """What becomes of a tensor, in a layer that stays or in none; of names, only those of routed experts change."""
        ending = next((ending for ending in _FOLLOWS if path.endswith(f".{ending}")), None)
        if ending is None:
            return self._whole(name, path.replace(f"{_WRAPPED}.", "."))
        module = re.sub(rf"({re.escape(_WRAPPED)})+$", "", path.removesuffix(f".{ending}"))
        layer, local = self._layer(module)
        experts = self.family.experts_of(self.plan.shapes[layer]) if layer is not None else None
        if layer is not None and experts is not None and local == experts.module:
            return self._stacked(name, ending, experts, layer)
        return self._beside(name, ending, f"{module}.weight")

    def _last_position(self, layer: int) -> int | None:
        """A layer's position in the last expert; `None` where it goes on the way there."""
        position: int | None = layer
        for expert in self.experts:
            position = None if position is None else new_positions(expert.plan.kept).get(position)
        return position

    def _layer(self, path: str) -> tuple[int | None, str]:
        """The layer of a path, if it is in one, and the path within it."""
        found = re.fullmatch(rf"{re.escape(self.family.layers)}\.(\d+)\.(.+)", path)
        if found is None:
            return None, path
        if int(found[1]) >= len(self.plan.shapes):
            raise CheckpointError(f"{path} is in layer {found[1]}, and there are only {len(self.plan.shapes)}")
        return int(found[1]), found[2]

    # --- beside one weight --------------------------------------------------------------------------------------------

    def _beside(self, name: str, ending: str, weight: str) -> TensorCut:
        base, kept, follows = self._base_shape(weight), self._kept(weight), _FOLLOWS[ending]
        if ending.startswith(_MAGNITUDE):
            self._check_magnitude(weight)
            follows = (1,) if weight == self.family.vocabulary[0] else follows  # of an embedding, one for each channel
        new: str | None = name
        if (single := self._single.get(weight)) is not None:
            new = single.name and name.replace(weight.removesuffix("weight"), single.name.removesuffix("weight"))

        def cut(tensor: Tensor) -> Tensor:
            if kept is None or kept[0] not in follows:
                return tensor
            return select(tensor, follows.index(kept[0]), kept[1])

        shape = tuple(None if axis < 0 else base[axis] for axis in follows)
        return TensorCut(new, shape, cut, follows.index(_RANK) if _RANK in follows else None)

    def _kept(self, weight: str) -> Kept | None:
        """The axis of a weight that is cut, and what of it stays; `None` for a weight that stays whole."""
        if self.plan.vocabulary is not None and weight in self.family.vocabulary:
            return 0, torch.tensor(self.plan.vocabulary.rows.index)
        if (single := self._single.get(weight)) is not None:
            return None if single.tensor.axis is None else (single.tensor.axis, single.positions)
        layer, local = self._layer(weight)
        coupled = self._coupled(local)
        if layer is None or coupled is None:
            return None
        return coupled.axis, kept_positions(coupled, self.plan.shapes[layer], self.plan.kept[layer])

    def _check_magnitude(self, weight: str) -> None:
        """Raises `CheckpointError` where DoRA divides by norms that are others in the expert.

        DoRA divides by the norm of each output's row, or, of an embedding, of each channel's column. A plan cuts these, or
        the repair changes them.
        """
        embedding_is_cut = self.plan.vocabulary is not None and weight == self.family.vocabulary[0]
        if embedding_is_cut or self._may_change_columns(weight):
            raise CheckpointError(
                f"{weight}: the norms that DoRA (use_dora) divides by are others in the expert; train the adapter without "
                "this module, or without DoRA"
            )

    def _may_change_columns(self, weight: str) -> bool:
        """Whether the plan cuts columns of a weight, or a repair changes it: output projections of blocks that lose units.

        The FFN before layers that go takes over what they did. Repairs of plugins may change all output projections.
        """
        layer, local = self._layer(weight)
        if layer is None or not self.plan.cuts_layers:
            return False
        shape, kept, single = self.plan.shapes[layer], self.plan.kept[layer], self._single.get(weight)
        outputs = {structure: block.output_weight for structure, block in self.family.blocks().items()}
        method = self.experts[0].spec.compensation.method
        if method not in ("none", "least_squares"):
            return single is not None or local in outputs.values()
        if local == outputs.get(Structure.QUERY_HEADS):
            return len(kept.query_heads) < shape.query_heads
        if local == outputs.get(Structure.FFN) or (single is not None and single.tensor.axis == 1):
            next_goes = any(units.gone for units in self.plan.kept[layer + 1 : layer + 2])
            return len(kept.ffn) < shape.neurons or (next_goes and method == "least_squares")
        return False

    # --- beside the weights of all routed experts of a layer ----------------------------------------------------------

    def _stacked(self, name: str, ending: str, experts: Experts, layer: int) -> TensorCut:
        """PEFT wraps a module once for each of its parameters, the first one innermost."""
        shape, kept = self.plan.shapes[layer], self.plan.kept[layer]
        inside = [each for each in experts.run if each.name.startswith(f"{experts.module}.")]
        wrapped = [each for each in inside if self._targeted(layer, each)]
        depth = name.count(_WRAPPED)
        if ending not in (_A, _B) or depth >= len(wrapped):
            raise CheckpointError(f"{name}: no parameter in target_parameters of the adapter's config belongs to it")
        tensor = wrapped[len(wrapped) - 1 - depth]
        if tensor.name not in (experts.input, experts.output):
            raise CheckpointError(f"{name}: LoRA of {tensor.name} cannot be cut along")
        width, reads = len(tensor.segments) * shape.ffn, tensor.name == experts.input
        inputs, outputs = (shape.hidden, width) if reads else (width, shape.hidden)
        has_neurons = ending == (_B if reads else _A)

        def cut(values: Tensor) -> Tensor:
            each = _by_expert(values, ending, shape.experts)
            return _together(_those_kept(each, ending, tensor if has_neurons else None, shape, kept), ending)

        if ending == _A:
            return TensorCut(name, (None, inputs), cut, 0, shape.experts)
        return TensorCut(name, (outputs, None), cut, 1, shape.experts)

    def _targeted(self, layer: int, tensor: ExpertTensor) -> bool:
        full = self.family.layer_prefix(layer) + tensor.name
        return any(full == target or full.endswith(f".{target}") for target in self.parameters)

    # --- whole weights ------------------------------------------------------------------------------------------------

    def _whole(self, name: str, weight: str) -> TensorCut:
        """A weight that the adapter brings itself (`modules_to_save`, and embeddings beside their LoRA)."""
        base, (layer, local) = self._base_shape(weight), self._layer(weight)
        routed = self.family.experts
        if routed is not None and (weight in self._single or local.startswith(f"{routed.module}.")):
            raise CheckpointError(f"{weight}: routed experts in modules_to_save cannot be cut along, only their LoRA")
        if layer is None:
            kept = self._kept(weight)
            return TensorCut(name, base, lambda tensor: select(tensor, *kept) if kept is not None else tensor)
        shape, units = self.plan.shapes[layer], self.plan.kept[layer]
        if self._may_change_columns(weight) and self.experts[0].spec.compensation.method != "none":
            raise CheckpointError(
                f"{weight}: this weight of the adapter (modules_to_save) would take the place of one that the expert's "
                "repair has solved for; train the module by LoRA, or build the expert with compensation.method: none"
            )
        return TensorCut(name, base, lambda tensor: cut_tensor(local, tensor, self.family, shape, units))

    # --- the base -----------------------------------------------------------------------------------------------------

    def _base_shape(self, weight: str) -> tuple[int, ...]:
        """The shape of one of the base's tensors: the expert's, with the base's length of the axis that is cut.

        Raises:
            CheckpointError: the base has no such tensor, or it belongs to all routed experts at once.
        """
        layer, local = self._layer(weight)
        single, coupled = self._single.get(weight), self._coupled(local)
        found = self._in_expert(layer, weight, local, single)
        if found is None:
            raise CheckpointError(f"the base has no {weight}, or PEFT would train it in another form")
        shape = list(found)
        if weight in self.family.vocabulary:
            shape[0] = next((each.plan.vocabulary.rows.of for each in self.experts if each.plan.vocabulary), shape[0])
        elif layer is not None and single is not None and single.tensor.axis is not None:
            shape[single.tensor.axis] = self.plan.shapes[layer].ffn * len(single.tensor.segments)
        elif layer is not None and coupled is not None:
            shape[coupled.axis] = sum(map(self.plan.shapes[layer].segment_rows, coupled.segments))
        return tuple(shape)

    def _in_expert(
        self, layer: int | None, weight: str, local: str, single: StoredExpert | None
    ) -> tuple[int, ...] | None:
        """The shape of the same tensor in the last expert; of one of its routed experts, that of the first one's."""
        routed, names = self.family.experts, [local]
        if single is not None and routed is not None:
            patterns = [re.escape(each.name).replace(re.escape("{expert}"), r"\d+") for each in routed.each]
            place = next(place for place, pattern in enumerate(patterns) if re.fullmatch(pattern, local))
            names = [routed.of_one(0)[place].name]
        elif routed is not None:
            names.append(routed.stored.get(local, local))
        if layer is not None:
            position = self._last_position(layer)
            names = [] if position is None else [self.family.layer_prefix(position) + each for each in names]
        if weight in self.family.vocabulary[1:2]:  # a head that is tied to the embedding
            names.append(self.family.vocabulary[0])
        return next((self.checkpoint.tensors[each].shape for each in names if each in self.checkpoint.tensors), None)

    @cached_property
    def _single(self) -> dict[str, StoredExpert]:
        return stored_experts(self.plan, self.family)

    def _coupled(self, local: str) -> CoupledTensor | None:
        return next((each for each in self.family.tensors if each.name == local), None)


def _by_expert(values: Tensor, ending: str, experts: int) -> Tensor:
    """LoRA of stacked weights by routed expert: `A` as `[experts, rank, inputs]`, `B` as `[experts, outputs, rank]`.

    PEFT keeps `A` as `[experts * rank, inputs]`, and `B` as `[outputs, rank * experts]`, where routed experts alternate.
    """
    if ending == _A:
        return values.unflatten(0, (experts, -1))
    return values.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _together(each: Tensor, ending: str) -> Tensor:
    """The inverse of `_by_expert`."""
    return (each.flatten(0, 1) if ending == _A else each.permute(1, 2, 0).flatten(1)).contiguous()


def _those_kept(each: Tensor, ending: str, tensor: ExpertTensor | None, shape: LayerShape, kept: KeptUnits) -> Tensor:
    """Kept routed experts, and the kept neurons of each where `tensor` says how neurons lie on the axis that is no rank."""
    if tensor is None:
        return each[list(kept.experts)]
    axis = 1 if ending == _A else 0
    rows = {expert: tensor.rows(kept.neurons_of(expert, shape), shape.ffn) for expert in kept.experts}
    return torch.stack([each[expert].index_select(axis, positions) for expert, positions in rows.items()])
