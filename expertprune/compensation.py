"""Closed-form repair: the kept columns of an output projection take over what the dropped ones did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune import layerwise
from expertprune.arch import Family
from expertprune.corpora import Batch
from expertprune.errors import CheckpointError
from expertprune.units import KeptUnits, LayerShape, Structure

Progress = Callable[[], None]


@dataclass
class Moments:
    """Sums over tokens that the least squares need, float32 on the model's device.

    `gram` is `Σ w x xᵀ`, `[kept, kept]`; `cross` is `Σ w r xᵀ`, `[hidden, kept]`, of the residual `r` that the layer still
    owes with its present columns.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, kept: int, hidden: int, device: torch.device) -> Moments:
        return cls(torch.zeros(kept, kept, device=device), torch.zeros(hidden, kept, device=device))

    def add(self, inputs: Tensor, residual: Tensor, weight: Tensor) -> None:
        """`inputs` `[tokens, kept]`, `residual` `[tokens, hidden]`, `weight` `[tokens]` at least 0; float32."""
        weighted = inputs * weight[:, None]
        self.gram.addmm_(weighted.T, inputs)
        self.cross.addmm_(residual.T, weighted)


def least_squares(moments: Moments, damping: float) -> Tensor:
    """The change `Δ` of the kept columns, `[hidden, kept]`, float32.

    Minimizes `Σ w ‖r − Δ x‖² + damping · Σ_j h_jj ‖Δ_j‖² + ...`: a ridge towards the original columns (`Δ = 0`), in
    proportion to each input's own energy `h_jj`, so that it means the same for quiet and for massive activations, plus a
    thousandth of the median energy, so that inputs that were hardly seen do not move.

    `Δ = C (H + D)⁻¹` with `H` the gram, `C` the cross moment, solved in float64 by Cholesky. With nothing owed
    (`C = 0`) it is exactly zero.

    Raises:
        CheckpointError: the damping is too small for these inputs.
    """
    gram = moments.gram.double()
    energy = gram.diagonal()
    ridge = damping * energy + 1e-3 * damping * energy.median() + torch.finfo(torch.float32).tiny
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge))
    if bool(failed):
        raise CheckpointError(
            f"the least squares cannot be solved with damping {damping:g}; raise compensation.damping"
        )
    return torch.cholesky_solve(moments.cross.double().T, factor).T.float()


def token_weights(target: Tensor) -> Tensor:
    """One over the mean square of each token's residual stream, `[tokens, hidden]` to `[tokens]`.

    The next layer normalizes the stream, so an error counts in proportion to the stream's own size; unweighted, the few
    tokens with massive activations decide everything.
    """
    return 1.0 / target.square().mean(1).clamp_min(1e-12)


def pruned_layer(
    layer: nn.Module, family: Family, index: int, shape: LayerShape, kept: KeptUnits, config: Any
) -> nn.Module:
    """A decoder layer with the kept units only, cut from `layer`.

    Args:
        config: the expert's `transformers` config, in the base's own class; it gives the new layer its widths.
    """
    parameter = next(layer.parameters())
    with torch.device("meta"):
        small = type(layer)(config, index)
    state = {name: cut_tensor(name, tensor, family, shape, kept) for name, tensor in layer.state_dict().items()}
    small.load_state_dict(state, assign=True)
    return small.to(parameter.device).eval().requires_grad_(False)


def cut_tensor(name: str, tensor: Tensor, family: Family, shape: LayerShape, kept: KeptUnits) -> Tensor:
    """The rows (or columns) of a layer's tensor that the kept units own; other tensors come back as they are.

    Args:
        name: within the layer, such as `mlp.down_proj.weight`.
    """
    for coupled in family.tensors:
        if coupled.name == name:
            positions, offset = [], 0
            for segment in coupled.segments:
                positions.append(kept.rows(segment, shape) + offset)
                offset += shape.segment_rows(segment)
            rows = torch.cat(positions)
            if rows.numel() == tensor.shape[coupled.axis]:
                return tensor
            return tensor.index_select(coupled.axis, rows.to(tensor.device))
    return tensor


@torch.inference_mode()
def repair(
    model: Any,
    family: Family,
    shapes: Sequence[LayerShape],
    plan: Sequence[KeptUnits],
    config: dict[str, Any],
    batches: Sequence[Batch],
    damping: float,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Repair a plan layer by layer, in the pruned prefix.

    Two streams run through the model: the dense one, and the one that the expert will see. In each layer, the columns of
    an output projection that lost inputs are solved so that the expert's residual stream comes back to the dense one:
    target is the dense contribution plus what the prefix lost so far.

    Args:
        config: the expert's widths, by config key, in the base's own config class.
        batches: calibration text, rows of token ids.

    Yields:
        Full names of the repaired weights and their values, `[hidden, kept]`, in the model's dtype.
    """
    small_config = copy.deepcopy(model.config)
    for key, value in config.items():
        setattr(small_config, key, value)
    dense = layerwise.start(model, family, batches)
    expert = dense.copy()
    for index, layer in enumerate(layerwise.decoder_layers(model, family)):
        shape, kept = shapes[index], plan[index]
        small = pruned_layer(layer, family, index, shape, kept, small_config)
        attention_cut = len(kept.query_heads) < shape.query_heads
        middle = _run_dense(layer, family, index, dense, wanted=attention_cut)
        if attention_cut:
            yield _solve(small, family, Structure.QUERY_HEADS, index, expert, middle, damping, advance=False)
        if len(kept.ffn) < shape.ffn:
            yield _solve(small, family, Structure.FFN, index, expert, dense.hidden, damping, advance=True)
        else:
            for number in range(len(batches)):
                expert.hidden[number] = expert.run(small, index, number)
        if progress is not None:
            progress()


def _run_dense(layer: nn.Module, family: Family, index: int, stream: layerwise.Stream, wanted: bool) -> list[Tensor]:
    """Advance the dense stream; returns, if wanted, the residual stream between attention and FFN, per batch."""
    middle = []
    for number in range(len(stream.batches)):
        before = stream.hidden[number]
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        with layerwise.observed(layer, family.attention.output, inputs, outputs):
            stream.hidden[number] = stream.run(layer, index, number)
        if wanted:
            middle.append(before + outputs[0])
    return middle


def _solve(
    small: nn.Module,
    family: Family,
    structure: Structure,
    index: int,
    stream: layerwise.Stream,
    targets: list[Tensor],
    damping: float,
    advance: bool,
) -> tuple[str, Tensor]:
    """Repair one output projection of a pruned layer; with `advance`, the stream passes the repaired layer too.

    Args:
        targets: the dense residual stream after the block, per batch, `[rows, tokens, hidden]`.
    """
    block = family.block(structure)
    projection = small.get_submodule(block.output)
    weight = small.get_parameter(block.output_weight)
    moments = Moments.zeros(weight.shape[1], weight.shape[0], weight.device)
    seen: list[tuple[Tensor, Tensor]] = []
    for number in range(len(stream.batches)):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        with layerwise.observed(small, block.output, inputs, outputs):
            after = stream.run(small, index, number)
        if not advance:  # the attention's own output: the layer's FFN comes after it
            after = stream.hidden[number] + outputs[0]
        target = stream.real(number, targets[number]).float()
        residual = target - stream.real(number, after).float()
        moments.add(stream.real(number, inputs[0]).float(), residual, token_weights(target))
        if advance:
            seen.append((after, inputs[0]))
    repaired = (weight.float() + least_squares(moments, damping)).to(weight.dtype)
    change = repaired - weight
    projection.weight = nn.Parameter(repaired, requires_grad=False)
    for number, (after, x) in enumerate(seen):
        stream.hidden[number] = after + x @ change.T
    return f"{family.layer_prefix(index)}{block.output_weight}", repaired
