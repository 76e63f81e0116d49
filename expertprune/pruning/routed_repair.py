"""Closed-form repair of routed experts: solve for the output projections of those that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertprune.arch import Experts
from expertprune.engine.routed import KEPT, SWEEPS
from expertprune.models.passes import Stream, alone, real_tokens
from expertprune.models.precision import narrow_products
from expertprune.models.routed import Dispatch, RoutedExperts
from expertprune.models.spool import SHARE, Spool
from expertprune.pruning.solve import damping_of, token_weights, tokens_of, weight_sums


@dataclass(frozen=True)
class RoutedMoments:
    """Sums over the tokens of one routed expert, float32.

    Attributes:
        gram: `H = Σ ω g² n nᵀ`, `[ffn, ffn]`, of neurons `n`, router weights `g`, token weights `ω`.
        tokens: how many tokens of equal weight would say as much: `(Σ ω g²)² / Σ (ω g²)²`, a scalar.
    """

    gram: Tensor
    tokens: Tensor


def routed_ridge(moments: RoutedMoments, damping: float) -> Tensor:
    """The ridge of each neuron, `[ffn]`, float64.

    `d_j = h_jj · (damping + (ffn / tokens)²) + damping · median(h) / 1000`, with `h_jj` the energy
    of neuron `j`. The first and the last term are those of the repair of a dense FFN. The square
    holds what few tokens say. Of `m` tokens, each lies along a direction of its own as long as `m`
    is below `ffn`; their Gram matrix then has `ffn / m` times the energy that other tokens of the
    expert have there. The square undoes that, so an expert that was hardly seen stays as it is.
    """
    energy = moments.gram.diagonal().double()
    scarcity = (energy.numel() / moments.tokens.clamp_min(1e-6)) ** 2  # finite for an expert without tokens
    return energy * (damping + scarcity) + 1e-3 * damping * energy.median() + torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class RoutedSystem:
    """The equations of one routed expert, `H + D`, which stay the same while others change.

    Attributes:
        factor: the Cholesky factor of `H + D`, `[ffn, ffn]`, float64.
        ridge: the diagonal of `D`, `[ffn]`, float64 (see `routed_ridge`).
    """

    factor: Tensor
    ridge: Tensor

    @classmethod
    def of(cls, moments: RoutedMoments, damping: float) -> RoutedSystem:
        gram, ridge = moments.gram.double(), routed_ridge(moments, damping)
        gram.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(gram)  # waits for nothing
        return cls(torch.where(failed > 0, torch.nan, factor), ridge)  # what is not finite is refused later

    def change(self, cross: Tensor, before: Tensor) -> Tensor:
        """The change `Δ` of the expert's output projection since the start, `[hidden, ffn]`, float32.

        It minimizes `Σ ω ‖r + g Δ₀ n − g Δ n‖² + Σ_j d_j ‖Δ_j‖²`, with `Δ₀` the change before, and
        `r` the residual that it has left. That is `Δ = (C + Δ₀ H) (H + D)⁻¹ = Δ₀ + (C − Δ₀ D) (H +
        D)⁻¹`, in float64. Tokens count by the square of their router weight, which is how much of
        the expert they see.

        Args:
            cross: `C = Σ ω g r nᵀ`, `[hidden, ffn]`.
            before: `Δ₀`, `[hidden, ffn]`.
        """
        wished = cross.double() - before.double() * self.ridge
        return before + torch.cholesky_solve(wished.T, self.factor).T.float()


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


@dataclass(frozen=True)
class RoutedRepair:
    """The routed experts of a pruned layer, which are repaired.

    The target is the dense residual stream behind the layer. So the experts that stay make up for
    their lost neurons, for experts that were dropped, on the tokens that come to them instead, for
    the router's weights, whose sum changes with the experts that it chooses among, and for what
    earlier layers lost.

    Their projections are solved one after the other for the error that the others leave, `SWEEPS`
    times. This comes close to solving them together, whose Gram matrix would have all neurons of
    the layer. An expert that no token comes to stays as it is. Every member of a team solves the
    same sums.

    Attributes:
        small: the pruned layer. Its output projections are replaced.
        stored: the dtype that they are written in; default: as they run.
        together: adds sums of the other members of a team, in place (see `TextRun`).
    """

    small: nn.Module
    experts: Experts
    index: int
    ridge: float
    stored: torch.dtype | None = None
    together: Callable[[dict[str, Tensor]], None] = alone

    @torch.no_grad()
    def solve(self, stream: Stream, targets: Spool, attend: Callable[[int], None]) -> Tensor:
        """Solve for the output projections, and advance the stream through the layer.

        Args:
            stream: that of the expert, before the layer.
            targets: the dense stream behind the layer, `[rows, tokens, hidden]` for each batch.
            attend: called before each batch, with its number.

        Returns:
            The output projections, `[routed experts kept, hidden, ffn]`.
        """
        tokens = self._collected(stream, targets, attend)
        runner = RoutedExperts(self.small, self.experts)
        ffn, free = runner.written.shape[2], SHARE * stream.hidden.room.free()
        factors, neurons = 8 * runner.count * ffn**2, 4 * sum(tokens.counts) * ffn
        lacks = factors > min(KEPT, free)
        counts = torch.tensor([float(lacks), *tokens.counts], dtype=torch.float64, device=tokens.residual.device)
        weights = weight_sums(tokens.importance)
        self.together({"counts": counts, "weights": weights})
        (lacking, *seen) = counts.tolist()
        stored, damping = self.stored or runner.written.dtype, damping_of(self.ridge, weights)
        keeps_neurons = neurons <= min(KEPT, free if lacking else free - factors)
        solution = _Solution(runner, tokens, damping, stored, self.together, not lacking, keeps_neurons)
        for _ in range(SWEEPS):
            start = 0
            for expert, count in enumerate(tokens.counts):
                if seen[expert]:  # by any member
                    solution.solve(expert, slice(start, start + count))
                start += count
        weight = self.small.get_parameter(self.experts.output)
        weight.data = solution.repaired.transpose(1, 2) if self.experts.transposed else solution.repaired
        self._advance(stream, targets, tokens.residual)
        return solution.repaired

    def _collected(self, stream: Stream, targets: Spool, attend: Callable[[int], None]) -> _Tokens:
        """Run every batch through the layer; the stream is then behind it, without the repair."""
        calls: list[tuple[Tensor, ...]] = []

        def note(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            calls.append((*arguments, *keywords.values()))

        gathered = []
        module = self.small.get_submodule(self.experts.module)
        handle = module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            for number, batch in enumerate(stream.batches):
                attend(number)
                after = stream.run(self.small, self.index, number)
                stream.hidden[number] = after
                inputs = [real_tokens(batch, each.unflatten(0, batch.ids.shape)) for each in calls.pop()[:3]]
                target = real_tokens(batch, targets[number]).float()
                weights = token_weights(target) * real_tokens(batch, batch.on(target.device).weights)
                gathered.append((*inputs, target - real_tokens(batch, after).float(), weights))
        finally:
            handle.remove()
        gathered = gathered or [self._nothing()]
        hidden, chosen, weights, residual, importance = (torch.cat(each) for each in zip(*gathered, strict=True))
        pairs = Dispatch.of(chosen, weights, self.experts.written(self.small).shape[0])
        counts = pairs.ends.diff(prepend=pairs.ends.new_zeros(1)).tolist()
        return _Tokens(hidden, residual, importance, pairs, counts)

    def _nothing(self) -> tuple[Tensor, ...]:
        """What a member of a team without documents collects."""
        written = self.experts.written(self.small)
        states, pairs, floats = (0, written.shape[1]), written.new_empty(0, 1), written.new_empty(0).float()
        return written.new_empty(states), pairs.long(), pairs, floats.new_empty(states), floats

    def _advance(self, stream: Stream, targets: Spool, residual: Tensor) -> None:
        """The stream behind the repaired layer: the target less what is still missing of it."""
        start = 0
        for number, batch in enumerate(stream.batches):
            behind, target = stream.hidden[number], real_tokens(batch, targets[number])
            own = (target.float() - residual[start : start + batch.tokens]).to(behind.dtype)
            start += batch.tokens
            # padding stays as the layer gave it
            flat = behind.flatten(0, 1).index_copy(0, batch.on(behind.device).real, own)
            stream.hidden[number] = flat.view_as(behind)


class _Solution:
    """The output projections so far: `repaired` as they are written, and `change` since the start.

    Args:
        keeps: keep the factorized equations of the first sweep for the others. All members of a team
            do, or none.
        keeps_neurons: keep what the neurons of the first sweep were.
    """

    def __init__(
        self,
        runner: RoutedExperts,
        tokens: _Tokens,
        damping: float,
        stored: torch.dtype,
        together: Callable[[dict[str, Tensor]], None],
        keeps: bool,
        keeps_neurons: bool,
    ) -> None:
        self.runner, self.tokens, self.damping, self.stored, self.together = runner, tokens, damping, stored, together
        self.weight = runner.written.detach()
        self.repaired = self.weight.clone()
        self.change = torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        self._keeps, self._kept = keeps, dict[int, RoutedSystem]()
        self._keeps_neurons, self._neurons = keeps_neurons, dict[int, Tensor]()

    def solve(self, expert: int, here: slice) -> None:
        """Solve one routed expert for the residual that the others leave, and take its share off it."""
        tokens, before = self.tokens, self.change[expert].clone()
        place, gate = tokens.pairs.token[here], tokens.pairs.weight[here].float()
        neurons = self._neurons.get(expert)
        if neurons is None:
            neurons = self.runner.neurons_of(tokens.inputs[place], expert).float() * gate[:, None]
            if self._keeps_neurons:
                self._neurons[expert] = neurons
        importance = tokens.importance[place]
        weighted = neurons * importance[:, None]
        system = self._kept.get(expert)
        with narrow_products(neurons.device):
            sums = {"cross": tokens.residual[place].T @ weighted}
            if system is None:
                sums |= {"gram": weighted.T @ neurons, "counts": weight_sums(importance * gate.square())}
        self.together(sums)
        if system is None:
            moments = RoutedMoments(sums["gram"], tokens_of(sums["counts"]))
            system = RoutedSystem.of(moments, self.damping)
            if self._keeps:
                self._kept[expert] = system
        wished = self.weight[expert].float() + system.change(sums["cross"], before)
        self.repaired[expert] = wished.to(self.stored).to(self.weight.dtype)
        self.change[expert] = self.repaired[expert].float() - self.weight[expert].float()
        tokens.residual.index_add_(0, place, neurons @ (before - self.change[expert]).T)
