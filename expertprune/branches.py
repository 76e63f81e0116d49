"""The linear branch of a gated FFN, solved again by conjugate gradients: a linear least squares problem, never training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BranchProblem:
    """What a change `Δ` of a gated FFN's linear branch can do for the layer's output, on some text.

    A neuron gives `a_j = s_j · (U x)_j`, where the gate `s = act(G x)` is left alone, so the output `W a` is linear in `U`:
    `Σ_t w_t ‖r_t − W (s_t ⊙ Δ x_t)‖² + damping · Σ_ji n_ji Δ_ji²` is to be least, `n` the diagonal of the normal equations.

    Attributes, each a list over batches: `inputs` `[tokens, hidden]`, `gates` `[tokens, ffn]`, `owed` (`r`)
    `[tokens, hidden]` and `weights` `[tokens]`; and `output` (`W`) `[hidden, ffn]`.
    """

    inputs: list[Tensor]
    gates: list[Tensor]
    owed: list[Tensor]
    weights: list[Tensor]
    output: Tensor

    def solve(self, damping: float, iterations: int) -> Tensor:
        """`Δ` after so many steps of preconditioned conjugate gradients from zero, `[ffn, hidden]`, float32.

        Preconditioned by `diag(‖W_j‖² E[s_j²])⁻¹ · Δ · E[x xᵀ]⁻¹`, which is the normal equations' inverse where neurons'
        outputs are orthogonal and gates independent of inputs. Stopping early regularizes as the damping does.
        """
        size = sum(float(w.sum()) for w in self.weights)
        square = self.output.square().sum(0)  # [ffn]
        energy = sum(((s.square()).T @ w for s, w in zip(self.gates, self.weights, strict=True))) / size
        gram = sum((x.T @ (x * w[:, None]) for x, w in zip(self.inputs, self.weights, strict=True))) / size
        diagonal = sum(
            ((s.square() * w[:, None]).T @ x.square() for s, x, w in zip(self.gates, self.inputs, self.weights, strict=True))
        )
        ridge = damping * (diagonal / size) * square[:, None]
        mean = gram.diagonal().mean()
        right = torch.linalg.inv((gram + torch.diag(0.1 * gram.diagonal() + 1e-6 * mean)).double()).float()
        left = 1.0 / (square * energy).clamp_min(1e-12 * float((square * energy).max()) + 1e-30)

        def normal(change: Tensor) -> Tensor:
            result = ridge * change
            for x, s, w in zip(self.inputs, self.gates, self.weights, strict=True):
                out = (s * (x @ change.T)) @ self.output.T
                result += self._back(x, s, out * w[:, None]) / size
            return result

        residual = sum(
            (
                self._back(x, s, r * w[:, None]) / size
                for x, s, r, w in zip(self.inputs, self.gates, self.owed, self.weights, strict=True)
            )
        )
        change = torch.zeros_like(residual)
        scaled = left[:, None] * (residual @ right)
        direction, rho = scaled.clone(), float((residual * scaled).sum())
        for _ in range(iterations):
            if rho <= 0:
                break
            image = normal(direction)
            step = rho / float((direction * image).sum())
            change += step * direction
            residual = residual - step * image
            scaled = left[:, None] * (residual @ right)
            rho, before = float((residual * scaled).sum()), rho
            direction = scaled + rho / before * direction
        return change

    def _back(self, inputs: Tensor, gates: Tensor, out: Tensor) -> Tensor:
        return ((out @ self.output) * gates).T @ inputs
