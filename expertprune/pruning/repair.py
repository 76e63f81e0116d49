"""Closed-form repair: the kept columns of an output projection take over what the dropped ones did."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Block, Family
from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError
from expertprune.models import layers as layerwise
from expertprune.progress import Progress
from expertprune.pruning.slicing import pruned_layer
from expertprune.registry import Registry
from expertprune.spec.schema import Compensation
from expertprune.units import KeptUnits, LayerShape, Structure

log = logging.getLogger(__name__)

Weights = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Repair:
    """A named way to change the weights of a pruned model in closed form.

    `weights(model, family, shapes, plan, batches, settings, progress)` yields full names of changed weights and their
    values, `[hidden, kept]`, in the model's dtype. Where `runs_model` is off, it is never called and no model is loaded.
    """

    name: str
    weights: Callable[..., Weights]
    runs_model: bool = True


repairs: Registry[Repair] = Registry("repair", group="expertprune.repairs")


def repair(name: str, runs_model: bool = True) -> Callable[[Callable[..., Weights]], Callable[..., Weights]]:
    """Register a function as the repair `name`."""

    def add(function: Callable[..., Weights]) -> Callable[..., Weights]:
        repairs.register(name, function.__module__)(Repair(name, function, runs_model))
        return function

    return add


def check_repair(name: str) -> Repair:
    """The repair of a name; raises `SpecError` with the nearest one."""
    return repairs.named(name, "compensation.method")


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


@repair("none", runs_model=False)
def none(
    model: Any,
    family: Family,
    shapes: Sequence[LayerShape],
    plan: Sequence[KeptUnits],
    batches: Sequence[Batch],
    settings: Compensation,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Leave the kept columns as they are."""
    return iter(())


@repair("least_squares")
@torch.no_grad()
def by_least_squares(
    model: Any,
    family: Family,
    shapes: Sequence[LayerShape],
    plan: Sequence[KeptUnits],
    batches: Sequence[Batch],
    settings: Compensation,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Solve every output projection that lost inputs again, layer by layer.

    Two streams run through the model: the dense one, and the one that the expert will see. The target of a projection is
    the dense residual stream behind its block, so it makes up for what the pruned prefix lost too.
    """
    if any(kept.shape(shape).ffn < shape.ffn and shape.experts for shape, kept in zip(shapes, plan, strict=True)):
        log.warning("neurons inside experts are cut without repair; heads of the same layers are repaired")
    dense = layerwise.start(model, family, batches)
    expert = dense.copy()
    for index, layer in enumerate(layerwise.decoder_layers(model, family)):
        cut = _Cut(layer, family, index, shapes[index], plan[index])
        yield from _solve_layer(cut, model.config, dense, expert, settings.damping)
        if progress is not None:
            progress()


@dataclass
class _Cut:
    """A dense layer and what of it is kept."""

    layer: nn.Module
    family: Family
    index: int
    shape: LayerShape
    kept: KeptUnits

    def touches(self, structure: Structure) -> bool:
        """Whether an output projection lost inputs; those of experts are left as they are."""
        of = self.family.has_ffn and len(self.kept.ffn) < self.shape.ffn
        return of if structure is Structure.FFN else len(self.kept.query_heads) < self.shape.query_heads

    def weight_name(self, structure: Structure) -> str:
        return f"{self.family.layer_prefix(self.index)}{self.family.block(structure).output_weight}"


def _solve_layer(
    cut: _Cut, config: Any, dense: layerwise.Stream, expert: layerwise.Stream, damping: float
) -> Iterator[tuple[str, Tensor]]:
    small = pruned_layer(cut.layer, cut.family, cut.index, cut.shape, cut.kept, config)
    passes = _run_dense(cut, dense, wanted=cut.touches(Structure.QUERY_HEADS))
    for structure, targets in ((Structure.QUERY_HEADS, passes.middle), (Structure.FFN, dense.hidden)):
        if cut.touches(structure):
            yield _solve(cut, small, structure, expert, targets, passes.outputs[structure], damping)
    if not cut.touches(Structure.FFN):
        for number in range(len(expert.batches)):
            expert.hidden[number] = expert.run(small, cut.index, number)


@dataclass
class _DensePass:
    """Per batch: the dense residual stream between attention and FFN, and what each output projection gave."""

    middle: list[Tensor]
    outputs: dict[Structure, list[Tensor]]


def _run_dense(cut: _Cut, stream: layerwise.Stream, wanted: bool) -> _DensePass:
    """Advance the dense stream, noting what the targets need; the middle of the layer only where wanted."""
    family, normed = cut.family, cut.family.residual == "normed"
    noted = _DensePass([], {Structure.QUERY_HEADS: [], Structure.FFN: []})
    for number in range(len(stream.batches)):
        before = stream.hidden[number]
        heads: list[Tensor] = []
        ffn: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(layerwise.observed(cut.layer, family.attention.output, [], heads))
            if family.has_ffn:
                stack.enter_context(layerwise.observed(cut.layer, family.ffn.output, [], ffn))
            stream.hidden[number] = stream.run(cut.layer, cut.index, number)
        if wanted:
            noted.middle.append(before + _joined(cut.layer, family.attention, heads[0]))
        if normed:
            noted.outputs[Structure.QUERY_HEADS] += heads if wanted else []
            noted.outputs[Structure.FFN] += ffn
    return noted


def _joined(layer: nn.Module, block: Block, output: Tensor) -> Tensor:
    """What a block's output adds to the residual stream."""
    result: Tensor = output if block.output_norm is None else layer.get_submodule(block.output_norm)(output)
    return result


def _solve(
    cut: _Cut,
    small: nn.Module,
    structure: Structure,
    stream: layerwise.Stream,
    targets: list[Tensor],
    dense: list[Tensor],
    damping: float,
) -> tuple[str, Tensor]:
    """Repair one output projection of a pruned layer; behind the FFN's, the stream passes the repaired layer too.

    Args:
        targets: the dense residual stream after the block, per batch, `[rows, tokens, hidden]`.
        dense: what the dense output projection gave, per batch; for blocks with an output norm only.
    """
    block, last = cut.family.block(structure), structure is Structure.FFN
    projection = small.get_submodule(block.output)
    weight = small.get_parameter(block.output_weight)
    moments = Moments.zeros(weight.shape[1], weight.shape[0], weight.device)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(len(stream.batches)):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        with layerwise.observed(small, block.output, inputs, outputs):
            after = stream.run(small, cut.index, number)
        if not last:  # the layer's FFN comes after it
            after = stream.hidden[number] + _joined(small, block, outputs[0])
        target = stream.real(number, targets[number]).float()
        residual = target - stream.real(number, after).float()
        weights = token_weights(target)
        if block.output_norm is not None:
            own, wished = (stream.real(number, x).float() for x in (outputs[0], dense[number]))
            joined = stream.real(number, _joined(small, block, outputs[0])).float()
            residual, scale = _before_norm(small.get_submodule(block.output_norm), residual, joined, own, wished)
            weights = weights / scale.square()
        moments.add(stream.real(number, inputs[0]).float(), residual, weights)
        if last:
            seen.append((after, inputs[0], outputs[0]))
    repaired = (weight.float() + least_squares(moments, damping)).to(weight.dtype)
    change = repaired - weight
    projection.weight = nn.Parameter(repaired, requires_grad=False)
    for number, (after, x, output) in enumerate(seen):
        if block.output_norm is None:
            stream.hidden[number] = after + x @ change.T
        else:
            stream.hidden[number] = after - _joined(small, block, output) + _joined(small, block, output + x @ change.T)
    return cut.weight_name(structure), repaired


def _before_norm(
    norm: nn.Module, residual: Tensor, joined: Tensor, own: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """What is owed in front of an output norm, where the projection is linear; all `[tokens, hidden]`.

    The norm maps `v` to `γ ⊙ v / rms(v)`. With the root mean square of the dense output, which the repaired one shall
    come near to, the stream's target `c = joined + residual` needs `v = c · rms / γ`. A channel of small `γ` would have to
    grow out of all proportion for it, and shrink all others through `rms(v)`. So each channel minimizes
    `γ² (v − c · rms / γ)² + m (v − d)²`, with `d` the dense output and `m` the median of `γ²`: the more a channel tells in
    the stream, the more it makes up for what the prefix lost; the others stay what they were.

    Returns:
        The residual in front of the norm, and the root mean square of each token's dense output, `[tokens]`.
    """
    gain = norm(torch.ones(1, dense.shape[1], dtype=torch.float32, device=dense.device).to(_dtype(norm))).float()
    typical = gain.square().median()
    rms = dense.square().mean(1).sqrt().clamp_min(1e-12)
    wished = (gain * (joined + residual) * rms[:, None] + typical * dense) / (gain.square() + typical)
    return wished - own, rms


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
