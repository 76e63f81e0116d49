"""Routing and routed experts by hand, in float64: of families with silu, gates and values one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def numbers(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def gates_of(model: Any, layer: int, hidden: Array, kept: Sequence[int] = range(6)) -> Array:
    """Router weights, `[tokens, kept]`, 0 where not chosen; the router chooses two among the kept experts alone."""
    chances = np.exp(hidden @ numbers(model.model.layers[layer].mlp.gate.weight)[list(kept)].T)
    chances /= chances.sum(1, keepdims=True)
    gates = np.where(chances >= np.sort(chances, 1)[:, -2:-1], chances, 0)
    return gates / gates.sum(1, keepdims=True) if getattr(model.config, "norm_topk_prob", True) else gates


def neurons_of(model: Any, layer: int, hidden: Array, expert: int) -> Array:
    """Activations of one expert, `[tokens, neurons]`."""
    gate, up = np.split(hidden @ numbers(model.model.layers[layer].mlp.experts.gate_up_proj[expert]).T, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def into_experts(model: Any, layer: int, ids: Sequence[Sequence[int]]) -> Array:
    """What a layer's router and experts read, `[tokens, hidden]`."""
    seen: list[Array] = []
    mlp = model.model.layers[layer].mlp
    handle = mlp.register_forward_pre_hook(lambda _, given: seen.append(numbers(given[0].flatten(0, 1))))
    with torch.no_grad():
        model(input_ids=torch.tensor(ids), use_cache=False)
    handle.remove()
    return seen[0]
