"""Look into routed experts while they run, and choose among some of them only."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Experts

_GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of torch's grouped products
_ALIGNED = 16  # bytes; torch refuses grouped products over rows of other sizes


@dataclass(frozen=True)
class Dispatch:
    """The pairs of a token and a routed expert in a call, sorted by routed expert.

    Attributes:
        token: `[pairs]`, the token's position in the call.
        expert: `[pairs]`, ascending.
        weight: `[pairs]`, the router's weight.
        ends: `[routed experts]`, int32: where the pairs of each one end.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    ends: Tensor

    @classmethod
    def of(cls, chosen: Tensor, weights: Tensor, experts: int) -> Dispatch:
        """Sort the router's choice; both are `[tokens, per token]`."""
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True, out_int32=True)
        return cls(order // chosen.shape[1], expert, weights.flatten()[order], ends)


@dataclass(frozen=True)
class RoutedCall:
    """What the routed experts of a layer did in one call.

    Attributes:
        pairs: which tokens came to which routed expert.
        neurons: `[pairs, ffn]`, the activations of its neurons.
        written: `[pairs, hidden]`, its output without the router's weight.
    """

    pairs: Dispatch
    neurons: Tensor
    written: Tensor


def grouped_linear(inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each pair by the matrix of its routed expert.

    One kernel does all of them where the device and dtype have one. Otherwise there is a product
    for each routed expert with tokens, and one synchronization.

    Args:
        inputs: `[pairs, in]`, sorted by routed expert.
        weight: `[routed experts, out, in]`.
        ends: see `Dispatch`.

    Returns:
        `[pairs, out]`.
    """
    aligned = all(size * weight.element_size() % _ALIGNED == 0 for size in weight.shape[1:])
    if aligned and weight.dtype in _GROUPED and _has_kernel(weight.device):
        return nn.functional.grouped_mm(inputs, weight.transpose(1, 2), offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    shares = zip(inputs.split(counts), weight, strict=True)
    parts = [nn.functional.linear(share, matrix) for share, matrix in shares if share.shape[0]]
    return torch.cat(parts) if parts else inputs.new_zeros(0, weight.shape[1])


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


class RoutedExperts:
    """The routed experts of a running layer, as this package runs them.

    transformers gives their class `_apply_gate`, from the rows of the input projection to neurons.
    """

    def __init__(self, layer: nn.Module, experts: Experts) -> None:
        self.module: Any = layer.get_submodule(experts.module)
        self.read, self.written = experts.read(layer), experts.written(layer)
        self._biases = [None if name is None else layer.get_parameter(name)
                        for name in (experts.input_bias, experts.output_bias)]  # fmt: skip

    @property
    def count(self) -> int:
        return self.read.shape[0]

    def neurons(self, inputs: Tensor, pairs: Dispatch) -> Tensor:
        """The activations of sorted `inputs`, `[pairs, hidden]` to `[pairs, ffn]`."""
        rows = grouped_linear(inputs, self.read, pairs.ends)
        if self._biases[0] is not None:
            rows = rows + self._biases[0][pairs.expert]
        neurons: Tensor = self.module._apply_gate(rows)
        return neurons

    def neurons_of(self, inputs: Tensor, expert: int) -> Tensor:
        """The activations of one routed expert, `[tokens, hidden]` to `[tokens, ffn]`."""
        bias = None if self._biases[0] is None else self._biases[0][expert]
        neurons: Tensor = self.module._apply_gate(nn.functional.linear(inputs, self.read[expert], bias))
        return neurons

    def run(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, RoutedCall]:
        """The output of the routed experts, `[tokens, hidden]`, and how it came about.

        Args:
            hidden: `[tokens, hidden]`.
            chosen, weights: the router's choice, `[tokens, per token]` each.
        """
        pairs = Dispatch.of(chosen, weights, self.count)
        neurons = self.neurons(hidden.index_select(0, pairs.token), pairs)
        written = grouped_linear(neurons, self.written, pairs.ends)
        if self._biases[1] is not None:
            written = written + self._biases[1][pairs.expert]
        weighted = written * pairs.weight[:, None]
        output = torch.zeros(hidden.shape, dtype=weighted.dtype, device=hidden.device)
        return output.index_add(0, pairs.token, weighted).to(hidden.dtype), RoutedCall(pairs, neurons, written)


@contextlib.contextmanager
def routing_observed(layer: nn.Module, experts: Experts | None, note: Callable[[RoutedCall], None]) -> Iterator[None]:
    """While open, calls `note` with each call of a layer's routed experts, if it has some.

    The layer runs them with sorted tokens, so nothing is computed twice. What a call holds is part
    of the graph where gradients are on.
    """
    if experts is None or not experts.are_in(layer):
        yield
        return
    runner = RoutedExperts(layer, experts)

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        output, call = runner.run(hidden, chosen, weights)
        note(call)
        return output

    runner.module.forward = forward
    try:
        yield
    finally:
        del runner.module.forward


@contextlib.contextmanager
def routed_to(layer: nn.Module, experts: Experts, kept: Tensor) -> Iterator[None]:
    """While open, a layer's router chooses among the `kept` routed experts only.

    It is as if the others' logits were −∞. A copy of the router with the kept rows chooses; its
    choice is translated to the layer's own numbering.

    Args:
        kept: `[routed experts kept]`, int64, ascending; as many of each group.
    """
    router = layer.get_submodule(experts.router)
    small: Any = copy.deepcopy(router)
    small._forward_hooks.clear()
    index = kept.to(next(router.parameters()).device)
    for tensor in experts.run:
        path = tensor.name.removeprefix(f"{experts.router}.")
        if path != tensor.name:
            owner, _, name = path.rpartition(".")
            holder = small.get_submodule(owner)
            value = getattr(holder, name).detach().index_select(tensor.expert_axis, index)
            is_parameter = isinstance(getattr(holder, name), nn.Parameter)
            setattr(holder, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    for name in ("num_experts", "n_routed_experts"):
        if hasattr(small, name):
            setattr(small, name, len(kept))

    def among_kept(_: nn.Module, arguments: tuple[Any, ...], __: Any) -> Any:
        logits, weights, chosen = small(*arguments)
        return logits, weights, index[chosen]

    handle = router.register_forward_hook(among_kept)
    try:
        yield
    finally:
        handle.remove()
