"""Weights of linear layers at fewer bits, in memory: rounded to the nearest step, or by GPTQ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import family_of
from expertprune.corpora.batches import Batch
from expertprune.models.layers import decoder_layers, observed
from expertprune.models.passes import Stream, TextRun, real_tokens

STORED_BITS = 16  # of a scale, and of a weight that is not rounded: bfloat16, whatever the model runs in
GROUPS = (128, 32)  # weights of a row that share a scale: the first that divides the row
DAMPING = 0.01  # of the mean of the diagonal, in GPTQ


@dataclass(frozen=True)
class Scheme:
    """`bits` for each weight, and a scale for each row, or for each group of a row; by GPTQ or to nearest."""

    bits: int
    grouped: bool
    gptq: bool = False

    def group(self, width: int) -> int:
        """How many weights of a row of `width` share a scale."""
        return next(size for size in GROUPS if width % size == 0) if self.grouped else width


@torch.no_grad()
def quantized(model: Any, scheme: Scheme, batches: Sequence[Batch] = ()) -> tuple[Any, int]:
    """A copy of a model whose decoder's linear layers are rounded, and the bytes of all its tensors.

    Embeddings, output and norms stay as they are.

    Args:
        batches: calibration text, for GPTQ. Each layer sees what the rounded layers below it put out.
    """
    model = copy.deepcopy(model)
    family = family_of(model.config.model_type)
    stream = TextRun(model, family, (), batches).start() if scheme.gptq else None
    bits = 8 * bytes_of(model)
    for index, layer in enumerate(decoder_layers(model, family)):
        linear = {path: module for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        products = {} if stream is None else second_moments(stream, layer, index, list(linear))
        for path, module in linear.items():
            weight, group = module.weight, scheme.group(module.in_features)
            few = gptq(weight, products[path], scheme.bits, group) if products else nearest(weight, scheme.bits, group)
            bits += weight.numel() // group * STORED_BITS - weight.numel() * (STORED_BITS - scheme.bits)
            weight.copy_(few)
        if stream is not None:
            stream.move(layer, index)
    return model, bits // 8


def bytes_of(model: Any) -> int:
    """Bytes of a model's parameters as they are stored, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters()) * STORED_BITS // 8


def second_moments(stream: Stream, layer: nn.Module, index: int, paths: Sequence[str]) -> dict[str, Tensor]:
    """`Σ x xᵀ` of the inputs of a layer's submodules over the real tokens, `[in, in]` each, float32."""
    found: dict[str, Tensor] = {}
    with observed(layer, *paths) as calls:
        for number, batch in enumerate(stream.batches):
            stream.run(layer, index, number)
            for path in paths:
                inputs = real_tokens(batch, calls[path].input).float()
                here = inputs.T @ inputs
                found[path] = found[path] + here if path in found else here
    return found


def scales_of(weights: Tensor, bits: int) -> Tensor:
    """Symmetric scales over the last axis, `max |w| / (2^(bits − 1) − 1/2)`, as in compressed-tensors; rounded to
    bfloat16.
    """
    scales = weights.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return scales.to(torch.bfloat16).float().clamp_min(torch.finfo(torch.float32).tiny)


def at_steps(weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest of `−2^(bits − 1)` to `2^(bits − 1) − 1` times the scale."""
    top = 2 ** (bits - 1)
    return (weights / scales).round().clamp(-top, top - 1) * scales


def nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """A weight `[out, in]` at the nearest steps; `group` neighbours of a row share a scale."""
    groups = weight.float().unflatten(1, (-1, group))
    return at_steps(groups, scales_of(groups, bits), bits).flatten(1).to(weight.dtype)


def gptq(weight: Tensor, products: Tensor, bits: int, group: int) -> Tensor:
    """GPTQ: columns are rounded from left to right, and each time those to the right take the error.

    With `U` the upper Cholesky factor of `H⁻¹`, `H = Σ x xᵀ` damped, column `j` leaves the error
    `e = (w_j − q_j) / U_jj`, and the columns `k > j` lose `e U_jk`. So at each step they are the
    least squares fit that the rounded ones leave. The scale of a group is taken when its first
    column is reached. Columns stay in their order.

    Paper: https://arxiv.org/abs/2210.17323

    Args:
        weight: `[out, in]`.
        products: `Σ x xᵀ`, `[in, in]`.
    """
    system = products.double()
    system.diagonal().add_(DAMPING * system.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(system), upper=True).float()
    left, found = weight.float().clone(), torch.empty_like(weight, dtype=torch.float32)
    for column in range(left.shape[1]):
        if column % group == 0:
            scales = scales_of(left[:, column : column + group], bits)[:, 0]
        found[:, column] = at_steps(left[:, column], scales, bits)
        error = (left[:, column] - found[:, column]) / factor[column, column]
        left[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
    return found.to(weight.dtype)
