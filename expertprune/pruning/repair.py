"""Closed-form repair: solve for the kept columns of output projections, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Block, Experts, Family
from expertprune.errors import CheckpointError
from expertprune.models.layers import Call, observed
from expertprune.models.passes import Stream, TextRun, real_tokens
from expertprune.progress import Progress
from expertprune.pruning.routed_repair import solve_routed
from expertprune.pruning.slicing import pruned_layer
from expertprune.registry import Registry
from expertprune.spec.schema import Compensation
from expertprune.units import KeptUnits, LayerShape, Structure

Weights = Iterator[tuple[str, Tensor]]
Method = Callable[[TextRun, Sequence[KeptUnits], Compensation, Progress | None], Weights]


@dataclass(frozen=True)
class Repair:
    """A named way to change the weights of a pruned model in closed form.

    Attributes:
        name: what a spec calls it.
        weights: its arguments are the running base with calibration text, the units that each layer
            keeps, the spec's `compensation`, and a function to call after each layer. It yields
            full names of weights and their new values, in the pruned widths and the model's dtype.
        runs_model: if off, `weights` is never called and no model is loaded for it.
    """

    name: str
    weights: Method
    runs_model: bool = True


repairs: Registry[Repair] = Registry("repair", group="expertprune.repairs")


def repair(name: str, runs_model: bool = True) -> Callable[[Method], Method]:
    """Register a function as the repair `name` (see `Repair`)."""

    def add(function: Method) -> Method:
        repairs.register(name, function.__module__)(Repair(name, function, runs_model))
        return function

    return add


def check_repair(name: str) -> Repair:
    """The repair of a name; raises `SpecError` with the nearest one."""
    return repairs.named(name, "compensation.method")


@dataclass
class Moments:
    """Sums over tokens for the least squares, float32 on the model's device.

    `gram` is `Σ w x xᵀ`, `[kept, kept]`. `cross` is `Σ w r xᵀ`, `[hidden, kept]`, where the
    residual `r` is the target minus the layer's present output.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, kept: int, hidden: int, device: torch.device) -> Moments:
        return cls(torch.zeros(kept, kept, device=device), torch.zeros(hidden, kept, device=device))

    def add(self, inputs: Tensor, residual: Tensor, weight: Tensor) -> None:
        """`inputs` are `[tokens, kept]`, `residual` `[tokens, hidden]`, `weight` `[tokens]`."""
        weighted = inputs * weight[:, None]
        self.gram.addmm_(weighted.T, inputs)
        self.cross.addmm_(residual.T, weighted)


def least_squares(moments: Moments, damping: float) -> Tensor:
    """The change `Δ` of the kept columns, `[hidden, kept]`, float32.

    It minimizes `Σ w ‖r − Δ x‖² + Σ_j d_j ‖Δ_j‖²`, a ridge towards the original columns (`Δ = 0`)
    with `d_j = damping · (h_jj + median(h) / 1000)` and `h_jj` the energy of input `j`. In
    proportion to the input's own energy, the ridge means the same for quiet and for massive
    activations. The second term holds inputs that were hardly seen.

    The solution is `Δ = C (H + D)⁻¹`, with `H` the gram matrix and `C` the cross moment, in float64
    by Cholesky. Where `C = 0`, it is exactly 0.

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

    The next layer normalizes the stream, so an error counts relative to the stream's own size.
    Without weights, a few tokens with massive activations would decide everything.
    """
    return 1.0 / target.square().mean(1).clamp_min(1e-12)


@repair("none", runs_model=False)
def none(text: TextRun, plan: Sequence[KeptUnits], settings: Compensation, progress: Progress | None = None) -> Weights:
    """Leave the kept columns as they are."""
    return iter(())


@repair("least_squares")
@torch.no_grad()
def by_least_squares(
    text: TextRun, plan: Sequence[KeptUnits], settings: Compensation, progress: Progress | None = None
) -> Weights:
    """Solve every output projection that lost inputs again, layer by layer.

    Two streams run through the model: the base's, and the expert's. The target of a projection is
    the base's residual stream behind its block, so it also makes up for what earlier layers lost.

    Raises:
        CheckpointError: the damping is too small for these inputs.
    """
    dense = text.start()
    expert = dense.copy()
    for index, layer in text.layers(progress):
        cut = _Cut(layer, text.family, index, text.shapes[index], plan[index])
        yield from _solve_layer(cut, text.model.config, dense, expert, settings.damping)


@dataclass
class _Cut:
    """A layer of the base and what of it is kept."""

    layer: nn.Module
    family: Family
    index: int
    shape: LayerShape
    kept: KeptUnits

    def touches(self, structure: Structure) -> bool:
        """Whether the output projection of a block lost inputs."""
        if structure is Structure.FFN:
            return self.family.has_ffn and len(self.kept.ffn) < self.shape.ffn
        return len(self.kept.query_heads) < self.shape.query_heads

    @property
    def experts(self) -> Experts | None:
        """The layer's routed experts, where some of them or of their neurons are dropped."""
        return self.family.experts_of(self.shape) if len(self.kept.ffn) < self.shape.neurons else None

    def weight_name(self, structure: Structure) -> str:
        return f"{self.family.layer_prefix(self.index)}{self.family.block(structure).output_weight}"


def _solve_layer(cut: _Cut, config: Any, dense: Stream, expert: Stream, damping: float) -> Weights:
    small = pruned_layer(cut.layer, cut.family, cut.index, cut.shape, cut.kept, config)
    targets = _run_dense(cut, dense)
    for structure in (Structure.QUERY_HEADS, Structure.FFN):
        if cut.touches(structure):
            yield _solve(cut, small, structure, expert, targets[structure], damping)
    if cut.experts is not None:
        behind = targets[Structure.EXPERTS].stream
        repaired = solve_routed(small, cut.experts, expert, cut.index, behind, damping)
        for number, weight in zip(cut.kept.experts, repaired, strict=True):
            yield cut.family.layer_prefix(cut.index) + cut.experts.output_of(number), weight
    elif not cut.touches(Structure.FFN):
        for _ in expert.advance(small, cut.index):
            pass


@dataclass
class _Targets:
    """Per batch: the dense stream behind a block, and the projection's output if normed."""

    stream: list[Tensor]
    outputs: list[Tensor]


def _run_dense(cut: _Cut, stream: Stream) -> dict[Structure, _Targets]:
    """Advance the dense stream and keep the targets of the projections that lost inputs."""
    blocks = {each: cut.family.block(each) for each in (Structure.QUERY_HEADS, Structure.FFN) if cut.touches(each)}
    targets = {structure: _Targets([], []) for structure in blocks}
    if cut.experts is not None:
        targets[Structure.EXPERTS] = _Targets([], [])
    with observed(cut.layer, *(block.output for block in blocks.values())) as calls:
        for step in stream.advance(cut.layer, cut.index):
            if cut.experts is not None:
                targets[Structure.EXPERTS].stream.append(step.after)
            for structure, block in blocks.items():
                output = calls[block.output].output
                middle = structure is Structure.QUERY_HEADS  # the FFN comes later in the layer
                behind = step.before + _joined(cut.layer, block, output) if middle else step.after
                targets[structure].stream.append(behind)
                if block.output_norm is not None:
                    targets[structure].outputs.append(output)
    return targets


def _joined(layer: nn.Module, block: Block, output: Tensor) -> Tensor:
    """What a block adds to the residual stream, given its projection's output."""
    result: Tensor = output if block.output_norm is None else layer.get_submodule(block.output_norm)(output)
    return result


def _solve(
    cut: _Cut, small: nn.Module, structure: Structure, stream: Stream, targets: _Targets, damping: float
) -> tuple[str, Tensor]:
    """Repair one output projection of a pruned layer; with the FFN's, advance the stream too."""
    block, last = cut.family.block(structure), structure is Structure.FFN
    projection = small.get_submodule(block.output)
    weight = small.get_parameter(block.output_weight)
    moments = Moments.zeros(weight.shape[1], weight.shape[0], weight.device)
    seen: list[tuple[Tensor, Call]] = []
    with observed(small, block.output) as calls:
        for number, batch in enumerate(stream.batches):
            after, call = stream.run(small, cut.index, number), calls[block.output]
            if last:
                seen.append((after, call))
            else:  # leave the layer's FFN out
                after = stream.hidden[number] + _joined(small, block, call.output)
            target = real_tokens(batch, targets.stream[number]).float()
            residual = target - real_tokens(batch, after).float()
            weights = token_weights(target)
            if block.output_norm is not None:
                given = (_joined(small, block, call.output), call.output, targets.outputs[number])
                joined, own, wished = (real_tokens(batch, states).float() for states in given)
                residual, scale = _before_norm(small.get_submodule(block.output_norm), residual, joined, own, wished)
                weights = weights / scale.square()
            moments.add(real_tokens(batch, call.input).float(), residual, weights)
    repaired = (weight.float() + least_squares(moments, damping)).to(weight.dtype)
    change = repaired - weight
    projection.weight = nn.Parameter(repaired, requires_grad=False)
    for number, (after, call) in enumerate(seen):
        more = call.input @ change.T
        if block.output_norm is None:
            stream.hidden[number] = after + more
        else:
            before, now = (_joined(small, block, output) for output in (call.output, call.output + more))
            stream.hidden[number] = after - before + now
    return cut.weight_name(structure), repaired


def _before_norm(
    norm: nn.Module, residual: Tensor, joined: Tensor, own: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual before an output norm, where the projection is linear; all `[tokens, hidden]`.

    The norm maps `v` to `γ ⊙ v / rms(v)`. Take `rms` of the dense output: the repaired one should
    come close to it. Then the stream's target `c = joined + residual` needs `v = c · rms / γ`. A
    channel with a small `γ` would have to grow very large for that, and would shrink all others
    through `rms(v)`. So each channel minimizes `γ² (v − c · rms / γ)² + m (v − d)²`, with `d` the
    dense output and `m` the median of `γ²`. Channels that count in the stream make up for what
    earlier layers lost; the others keep the dense output.

    Returns:
        The residual before the norm, and the root mean square of each token's dense output,
        `[tokens]`.
    """
    gain = norm(torch.ones(1, dense.shape[1], dtype=torch.float32, device=dense.device).to(_dtype(norm))).float()
    typical = gain.square().median()
    rms = dense.square().mean(1).sqrt().clamp_min(1e-12)
    wished = (gain * (joined + residual) * rms[:, None] + typical * dense) / (gain.square() + typical)
    return wished - own, rms


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
