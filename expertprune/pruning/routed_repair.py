"""Closed-form repair of routed experts: solve for the output projections of those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertprune.arch import Experts
from expertprune.models.passes import Stream, real_tokens
from expertprune.models.routed import Dispatch, RoutedExperts

SWEEPS = 3  # over the routed experts of a layer; after three, the error hardly falls any more


@dataclass(frozen=True)
class RoutedMoments:
    """Sums over the tokens of one routed expert, float32.

    Attributes:
        gram: `Σ ω g² n nᵀ`, `[ffn, ffn]`, of neurons `n`, router weights `g`, token weights `ω`.
        cross: `Σ ω g r nᵀ`, `[hidden, ffn]`, of what the expert should add to its present output.
        tokens: how many tokens of equal weight would say as much: `(Σ ω g²)² / Σ (ω g²)²`.
    """

    gram: Tensor
    cross: Tensor
    tokens: float


def routed_ridge(moments: RoutedMoments, damping: float) -> Tensor:
    """The ridge of each neuron, `[ffn]`, float64.

    `d_j = h_jj · (damping + (ffn / tokens)²) + damping · median(h) / 1000`, with `h_jj` the energy
    of neuron `j`. The first and the last term are those of the repair of a dense FFN. The square
    holds what few tokens say. Of `m` tokens, each lies along a direction of its own as long as `m`
    is below `ffn`; their Gram matrix then has `ffn / m` times the energy that other tokens of the
    expert have there. The square undoes that, so an expert that was hardly seen stays as it is.
    """
    energy = moments.gram.diagonal().double()
    scarcity = globals().get("KAPPA", 1.0) * (energy.numel() / moments.tokens) ** 2
    return energy * (damping + scarcity) + 1e-3 * damping * energy.median() + torch.finfo(torch.float32).tiny


def routed_least_squares(moments: RoutedMoments, damping: float) -> Tensor:
    """The change `Δ` of one routed expert's output projection, `[hidden, ffn]`, float32.

    It minimizes `Σ ω ‖r − g Δ n‖² + Σ_j d_j ‖Δ_j‖²` (see `routed_ridge`): `Δ = C (H + D)⁻¹`, in
    float64 by Cholesky. Tokens count by the square of their router weight, which is how much of the
    expert they see.
    """
    gram = moments.gram.double()
    gram.diagonal().add_(routed_ridge(moments, damping))
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(moments.cross.double().T, factor).T.float()


@dataclass
class _Tokens:
    """All real tokens of a layer, sorted by routed expert.

    `inputs` and `residual` are `[tokens, hidden]`, the residual being float32; `importance` is
    `[tokens]`; `counts` are the pairs of each routed expert.
    """

    inputs: Tensor
    residual: Tensor
    importance: Tensor
    pairs: Dispatch
    counts: list[int]


@torch.no_grad()
def solve_routed(
    small: nn.Module, experts: Experts, stream: Stream, index: int, targets: Sequence[Tensor], damping: float
) -> Tensor:
    """Repair the routed experts of a pruned layer, and advance the stream through it.

    The target is the dense residual stream behind the layer. So the experts that stay make up for
    their lost neurons, for experts that were dropped, on the tokens that come to them instead, for
    the router's weights, whose sum changes with the experts that it chooses among, and for what
    earlier layers lost. Their projections are solved one after the other for the error that the
    others leave, `SWEEPS` times; this comes close to solving them together, whose Gram matrix would
    have all neurons of the layer. An expert that no token comes to stays as it is.

    Args:
        small: the pruned layer; its output projections are replaced.
        stream: that of the expert, before the layer.
        targets: the dense stream behind the layer, `[rows, tokens, hidden]` for each batch.

    Returns:
        The output projections, `[routed experts kept, hidden, ffn]`.
    """
    after, tokens = _collected(small, experts, stream, index, targets)
    runner = RoutedExperts(small, experts)
    weight = runner.written.detach()
    repaired, change = weight.clone(), torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for _ in range(SWEEPS):
        start = 0
        for expert, count in enumerate(tokens.counts):
            here = slice(start, start + count)
            start += count
            if count:
                _solve_one(expert, here, runner, tokens, weight, repaired, change, damping)
    target = getattr(small.get_submodule(experts.module), experts.output.rpartition(".")[2])
    target.data = repaired.transpose(1, 2) if experts.transposed else repaired
    _advance(stream, after, targets, tokens.residual)
    return repaired


def _solve_one(
    expert: int,
    here: slice,
    runner: RoutedExperts,
    tokens: _Tokens,
    weight: Tensor,
    repaired: Tensor,
    change: Tensor,
    damping: float,
) -> None:
    """Solve one routed expert for the residual that the others leave, and take its share off it."""
    place, gate = tokens.pairs.token[here], tokens.pairs.weight[here].float()
    neurons = runner.neurons_of(tokens.inputs[place], expert).float() * gate[:, None]
    importance = tokens.importance[place]
    weighted = neurons * importance[:, None]
    gram = weighted.T @ neurons
    cross = tokens.residual[place].T @ weighted + change[expert] @ gram
    seen = importance * gate.square()
    moments = RoutedMoments(gram, cross, float(seen.sum().square() / seen.square().sum().clamp_min(1e-30)))
    before = change[expert].clone()
    repaired[expert] = (weight[expert].float() + routed_least_squares(moments, damping)).to(weight.dtype)
    change[expert] = repaired[expert].float() - weight[expert].float()
    tokens.residual.index_add_(0, place, neurons @ (before - change[expert]).T)


def _collected(
    small: nn.Module, experts: Experts, stream: Stream, index: int, targets: Sequence[Tensor]
) -> tuple[list[Tensor], _Tokens]:
    """Run every batch through the pruned layer; gather what its routed experts got."""
    calls: list[tuple[Tensor, ...]] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        calls.append((*arguments, *keywords.values()))

    after, gathered = [], []
    handle = small.get_submodule(experts.module).register_forward_pre_hook(note, with_kwargs=True)
    try:
        for number, batch in enumerate(stream.batches):
            after.append(stream.run(small, index, number))
            hidden, chosen, weights = (each.unflatten(0, batch.ids.shape) for each in calls.pop()[:3])
            target = real_tokens(batch, targets[number]).float()
            residual = target - real_tokens(batch, after[-1]).float()
            importance = 1.0 / target.square().mean(1).clamp_min(1e-12)
            gathered.append((*(real_tokens(batch, each) for each in (hidden, chosen, weights)), residual, importance))
    finally:
        handle.remove()
    hidden, chosen, weights, residual, importance = (torch.cat(each) for each in zip(*gathered, strict=True))
    pairs = Dispatch.of(chosen, weights, experts.written(small).shape[0])
    counts = pairs.ends.diff(prepend=pairs.ends.new_zeros(1)).tolist()
    return after, _Tokens(hidden, residual, importance, pairs, counts)


def _advance(stream: Stream, after: Sequence[Tensor], targets: Sequence[Tensor], residual: Tensor) -> None:
    """The stream behind the repaired layer: the target less what is still missing of it."""
    start = 0
    for number, batch in enumerate(stream.batches):
        behind = after[number].clone()  # padding keeps what the layer gave it
        for row, length in enumerate(batch.lengths):
            missing = residual[start : start + length]
            behind[row, :length] = (targets[number][row, :length].float() - missing).to(behind.dtype)
            start += length
        stream.hidden[number] = behind
