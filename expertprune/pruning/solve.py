"""The arithmetic of the closed-form repair: weighted least squares with a ridge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expertprune.engine.memory import stripes
from expertprune.errors import CheckpointError
from expertprune.models.precision import narrow_products

WHOLE = slice(None)
_NO_STREAM = 1e-12  # mean square of a residual stream that is none
_HELD = 0.1  # of the median of `γ²`: how much a block's own output counts behind an output norm; see bench/LOG.md


@dataclass
class Moments:
    """Sums over tokens for the least squares, float32 on the model's device (see `narrow_products`).

    `gram` is `Σ w x xᵀ`, `[kept, kept]`; only its diagonal and what is above it are summed. `cross` is
    `Σ w r xᵀ`, `[hidden, kept]`, where the residual `r` is the target minus the layer's present
    output. `weights` is `Σ w` and `Σ w²`, `[2]`.
    """

    gram: Tensor
    cross: Tensor
    weights: Tensor

    @classmethod
    def zeros(cls, kept: int, hidden: int, device: torch.device) -> Moments:
        sizes = ((kept, kept), (hidden, kept), (2,))
        return cls(*(torch.zeros(size, device=device) for size in sizes))

    def add(self, inputs: Tensor, residual: Tensor, weight: Tensor) -> None:
        """`inputs` are `[tokens, kept]`, `residual` `[tokens, hidden]`, `weight` `[tokens]`."""
        weighted = inputs * weight[:, None]
        with narrow_products(inputs.device):
            for rows in stripes(inputs.shape[1]):
                self.gram[rows, rows.start :].addmm_(weighted[:, rows].T, inputs[:, rows.start :])
            self.cross.addmm_(residual.T, weighted)
        self.weights += weight_sums(weight)

    def sums(self) -> Mapping[str, Tensor]:
        """What is added over the members of a team."""
        return {"gram": self.gram, "cross": self.cross, "weights": self.weights}

    def solved(self, ridge: float, rows: slice = WHOLE) -> Tensor:
        """Some rows of `least_squares`; the others are zero."""
        change = torch.zeros(self.cross.shape, device=self.cross.device)
        self.cross = self.cross[rows]
        change[rows] = least_squares(self, ridge)
        return change

    def taken(self) -> tuple[Tensor, Tensor]:
        """Both in float64. They are no longer here afterwards, so the float32 gram is free."""
        gram, self.gram = self.gram.double(), torch.empty(0)
        cross, self.cross = self.cross.double(), torch.empty(0)
        return gram, cross


@dataclass
class TokenRows:
    """The tokens themselves, for the least squares of fewer tokens than inputs.

    `inputs` are `√w x`, `[tokens, kept]` of each batch, and `residuals` `√w r`, `[tokens, hidden]`,
    float32 on the model's device.
    """

    inputs: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor, residual: Tensor, weight: Tensor) -> None:
        """As `Moments.add`."""
        root = weight.sqrt()[:, None]
        self.inputs.append(inputs * root)
        self.residuals.append(residual * root)
        self.weights.append(weight)

    def sums(self) -> Mapping[str, Tensor]:
        """Nothing: rows of a team's members are not added."""
        return {}

    def solved(self, ridge: float, rows: slice = WHOLE) -> Tensor:
        """The change of `least_squares`, all rows of it, by a system of one equation for each token.

        `Δ = Rᵀ (X D⁻¹ Xᵀ + 1)⁻¹ X D⁻¹`, with `X` the inputs and `R` the residuals: the same as
        `C (H + D)⁻¹`, as `H = Xᵀ X` and `C = Rᵀ X` (Woodbury). In float64 by Cholesky.
        """
        inputs, residuals = torch.cat(self.inputs).double(), torch.cat(self.residuals).double()
        damping = damping_of(ridge, weight_sums(torch.cat(self.weights)))
        scaled = inputs / ridge_of(inputs.square().sum(0), damping)
        system = inputs @ scaled.mT
        system.diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise _unsolved(ridge)
        return (torch.cholesky_solve(residuals, factor).mT @ scaled).float()


def _unsolved(ridge: float) -> CheckpointError:
    return CheckpointError(
        f"the least squares cannot be solved with a ridge of {ridge:g} tokens; raise compensation.ridge"
    )


def ridge_of(energy: Tensor, damping: float) -> Tensor:
    """`d_j` of `least_squares`, from the energy of each input; `[kept]`, float64."""
    return damping * energy + 1e-3 * damping * energy.median() + torch.finfo(torch.float32).tiny


def weight_sums(weight: Tensor) -> Tensor:
    """`Σ w` and `Σ w²`, `[2]`."""
    return torch.stack([weight.sum(), weight.square().sum()])


def tokens_of(sums: Tensor) -> Tensor:
    """How many tokens of equal weight say as much, `(Σ w)² / Σ w²` (Kish's effective sample size), a scalar."""
    return sums[0].square() / sums[1].clamp_min(torch.finfo(torch.float32).tiny)


def damping_of(ridge: float, sums: Tensor) -> float:
    """The ridge relative to the inputs' energy: `ridge / tokens`, with one token at least."""
    return ridge / float(tokens_of(sums).clamp_min(1))


def least_squares(moments: Moments, ridge: float) -> Tensor:
    """The change `Δ` of the kept columns, `[hidden, kept]`, float32.

    It minimizes `Σ w ‖r − Δ x‖² + Σ_j d_j ‖Δ_j‖²`, a ridge towards the original columns (`Δ = 0`)
    with `d_j = (ridge / tokens) · (h_jj + median(h) / 1000)` and `h_jj` the energy of input `j`. In
    proportion to the input's own energy, the ridge means the same for quiet and for massive
    activations. The second term holds inputs that were hardly seen. What a fit to tokens owes to
    chance falls as one over their number (`tokens_of`), and so does the ridge.

    The solution is `Δ = C (H + D)⁻¹`, with `H` the gram matrix and `C` the cross moment, in float64
    by Cholesky. Where `C = 0`, it is exactly 0. Both moments are used up: one matrix of `[kept,
    kept]` in float64 is held, and factorized where it lies.

    Raises:
        CheckpointError: the ridge is too small for these inputs.
    """
    damping = damping_of(ridge, moments.weights)
    gram, cross = moments.taken()
    energy = gram.diagonal()
    energy += ridge_of(energy, damping)
    # LAPACK reads one triangle. It wants columns in a row, as the transpose has them: no copy.
    factor, failed = gram.mT, torch.zeros((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if bool(failed):
        raise _unsolved(ridge)
    # Δ (L Lᵀ) = C: first Y Lᵀ = C, then Δ L = Y. Unlike `cholesky_solve`, it copies no factor.
    half = torch.linalg.solve_triangular(factor.mT, cross, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).float()


def token_weights(target: Tensor) -> Tensor:
    """One over the mean square of each token's residual stream, `[tokens, hidden]` to `[tokens]`.

    The next layer normalizes the stream, so an error counts relative to the stream's own size.
    Without weights, a few tokens with massive activations would decide everything. A token without
    a stream, as an untrained row of the embedding gives it, weighs nothing.
    """
    size = target.square().mean(1)
    return torch.where(size > _NO_STREAM, 1.0 / size, 0.0)


def before_norm(norm: nn.Module, residual: Tensor, joined: Tensor, own: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """The residual before an output norm, where the projection is linear; all `[tokens, hidden]`.

    The norm maps `v` to `γ ⊙ v / rms(v)`. Take `rms` of the dense output: the repaired one should
    come close to it. Then the stream's target `c = joined + residual` needs `v = c · rms / γ`. A
    channel with a small `γ` would have to grow very large for that, and would shrink all others
    through `rms(v)`. So each channel minimizes `γ² (v − c · rms / γ)² + m (v − d)²`, with `d` the
    dense output and `m` a tenth of the median of `γ²`. Channels that count in the stream make up for
    what earlier layers lost; the others keep the dense output.

    Returns:
        The residual before the norm, and the root mean square of each token's dense output,
        `[tokens, 1]`. Inputs and residual are to be divided by it: the norm measures an error by it.
    """
    dtype = next(norm.parameters()).dtype
    gain = norm(torch.ones(1, dense.shape[1], dtype=torch.float32, device=dense.device).to(dtype)).float()
    held = _HELD * gain.square().median()
    rms = dense.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    wished = (gain * (joined + residual) * rms + held * dense) / (gain.square() + held)
    return wished - own, rms
